"""A model's components by file: each is present, complete and of the family's kind, or rejected before any work.

The libraries would fill in what is missing: they build a tokenizer without a vocabulary, take the fields they know from
a scheduler of another class, and draw missing tensors at random.
"""

import hashlib
import importlib.util
import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from gdro.common.errors import UserError
from gdro.common.hub import fetch
from gdro.common.reading import cause, read_json

SCHEDULER = diffusers.FlowMatchEulerDiscreteScheduler
_SCHEDULERS = f"a {SCHEDULER.__name__}, whose times the model was trained for"
_ALWAYS = ("num_train_timesteps", "shift")  # scheduler fields that must be given: their defaults may be wrong
_DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")  # with use_dynamic_shifting
_PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}  # by quant_method of stored weights


@dataclass(frozen=True)
class Components:
    """The components of the model `name` that `family` (a DiffusersModel) uses, in a folder or at a Hub commit."""

    name: str
    source: str  # folder or Hub id
    commit: str | None
    family: Any

    # ---- files

    def json(self, file: str) -> dict[str, Any]:
        """The contents of a JSON file such as `vae/config.json`."""
        return read_json(self.path(file), "a JSON object", f"model: {self.name}: {file}")

    def path(self, file: str) -> Path:
        """The file's local path; UserError if it is not found."""
        try:
            return fetch(self.source, self.commit, file)
        except (OSError, ValueError) as error:
            found = "" if self.commit is None else f" ({type(error).__name__})"
            raise self.error(f"{file} not found{found}; expected what {self._declared(file)} is made of") from None

    def has(self, file: str) -> bool:
        """Whether the file exists."""
        try:
            return fetch(self.source, self.commit, file).is_file()
        except (OSError, ValueError):
            return False

    def error(self, what: str) -> UserError:
        """A UserError about this model."""
        return UserError(f"model: {self.name}: {what}")

    @contextmanager
    def refusing(self, part: str) -> Iterator[None]:
        """Turn anything a library raises about component `part` into a UserError with its cause."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # a list of exceptions is never whole: ImportError, AttributeError, its own ones
            raise self.error(f"{part} cannot be loaded ({cause(error)})") from None

    def _declared(self, file: str) -> str:
        part = file.partition("/")[0]
        return f"the {self.kinds[part].__name__}" if part in self.kinds else f"a {self.family.pipeline.__name__}"

    @property
    def kinds(self) -> dict[str, Any]:
        """Every component used, with its class in diffusers or transformers."""
        family = self.family
        networks = {"transformer": family.transformer_class, "vae": family.vae_class}
        return {"scheduler": SCHEDULER, **networks, **family.text_parts}

    @property
    def index(self) -> dict[str, Any]:
        """The contents of model_index.json."""
        return self.json("model_index.json")

    def files(self, part: str) -> list[Path]:
        """The files of component `part` in a folder, sorted; UserError if weights are missing."""
        kind, folder = self.kinds[part], Path(self.source) / part
        if part == "scheduler":
            return [self.path("scheduler/scheduler_config.json")]
        if is_tokenizer(kind):
            self.path(f"{part}/tokenizer_config.json")
            return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        stem = "diffusion_pytorch_model" if issubclass(kind, diffusers.ModelMixin) else "model"
        config, single = self.path(f"{part}/config.json"), folder / f"{stem}.safetensors"
        if single.is_file():
            return [config, single]
        index = f"{stem}.safetensors.index.json"
        if not self.has(f"{part}/{index}"):
            raise self.error(f"{part}/{single.name} not found{_instead(folder, stem)}; expected it, or {index}")
        shards = self.json(f"{part}/{index}").get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise self.error(f"{part}/{index} has no weight_map; expected the file of each tensor")
        return sorted([config, folder / index, *(self.path(f"{part}/{shard}") for shard in set(shards.values()))])

    # ---- identity

    def revision(self) -> str:
        """The Hub commit, or a digest of every file used in the folder, including its name."""
        if self.commit is not None:
            return self.commit
        root = Path(self.source)
        used = sorted({root / "model_index.json", *(path for part in self.kinds for path in self.files(part))})
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(_digest, used, map(_stamp, used)))
        lines = [f"{path.relative_to(root).as_posix()} {found}" for path, found in zip(used, digests, strict=True)]
        return f"sha256:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}"

    def stamp(self, part: str) -> Any:
        """Changes when the files of component `part` are replaced or written to."""
        return self.commit or tuple((path.name, _stamp(path)) for path in self.files(part))

    # ---- checks before any work

    def check(self) -> None:
        """Raise UserError naming component and file unless the files make up the family's pipeline.

        Reads only configurations and, in a folder, the names of weights. Tokenizers have their own check.
        """
        index = self.index
        for part, kind in self.kinds.items():
            declared = index.get(part)
            if not isinstance(declared, list) or len(declared) != 2 or not all(isinstance(x, str) for x in declared):
                raise self.error(f"model_index.json has {part} {json.dumps(declared)}; expected a {kind.__name__}")
            if self.commit is None:
                self.files(part)
        self.check_configurations()
        if index["scheduler"][1] != SCHEDULER.__name__:
            raise self.error(f"model_index.json has a {index['scheduler'][1]} as scheduler; expected {_SCHEDULERS}")

    def check_configurations(self) -> None:
        """The part of `check` that needs only configurations."""
        self.scheduler()
        self.vae()
        for part, kind in self.kinds.items():
            if not issubclass(kind, nn.Module):
                continue
            file = f"{part}/config.json"
            config = self.json(file)
            own = issubclass(kind, diffusers.ModelMixin)
            key, expected = ("_class_name", kind.__name__) if own else ("model_type", kind.config_class.model_type)
            if config.get(key) != expected:
                raise self.error(f"{file} has {key} {json.dumps(config.get(key))}; expected {json.dumps(expected)}")
            stored = config.get("quantization_config")
            method = stored.get("quant_method") if isinstance(stored, dict) else None
            package = _PACKAGES.get(str(method))
            if package is not None and importlib.util.find_spec(package) is None:
                raise self.error(
                    f"{file} says the weights were stored with {package}, which is not installed; "
                    'expected pip install "gdro[quantization]", or weights in 16 or 32 bits'
                )

    def scheduler(self) -> dict[str, Any]:
        """The scheduler's configuration, checked to be complete and a deterministic flow."""
        file = "scheduler/scheduler_config.json"
        config = self.json(file)
        if config.get("_class_name") != SCHEDULER.__name__:
            raise self.error(f"{file} is of a {config.get('_class_name')}; expected {_SCHEDULERS}")
        known = inspect.signature(SCHEDULER.__init__).parameters
        strange = [field for field in config if field not in known and not field.startswith("_")]
        if strange:
            raise self.error(f"{file} has {strange[0]}, which diffusers {diffusers.__version__}'s class does not know")
        for field in (*_ALWAYS, *(_DYNAMIC if config.get("use_dynamic_shifting") else ())):
            self._number(file, config, field)
            if config[field] <= 0:
                raise self.error(f"{file} has {field} {config[field]}; expected a number above 0")
        for field in ("stochastic_sampling", "invert_sigmas"):
            if config.get(field):
                raise self.error(f"{file} has {field} true; expected false: noise is at 1, and no step adds any")
        return config

    def vae(self) -> dict[str, Any]:
        """The VAE's configuration, checked to have the fields that scale latents."""
        file = "vae/config.json"
        config = self.json(file)
        for field in self.family.vae_fields:
            self._number(file, config, field)
        return config

    def _number(self, file: str, config: Mapping[str, Any], field: str) -> None:
        found = config.get(field)
        values = found if isinstance(found, list) and found else [found]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
            raise self.error(f"{file} has {field} {json.dumps(found)}; expected what its pipeline computes with")


def is_tokenizer(kind: Any) -> bool:
    """Whether a class of transformers is a tokenizer."""
    return kind is not SCHEDULER and not issubclass(kind, nn.Module)


def _instead(folder: Path, stem: str) -> str:
    """The weights found instead of those that are read."""
    others = [path.name for kind in ("safetensors", "bin") for path in folder.glob(f"*.{kind}")]
    variants = [name for name in others if name.startswith(f"{stem}.")]
    if not others:
        return ""
    found = min(variants or others)
    variant = re.fullmatch(rf"{stem}\.(\w+?)(-\d+-of-\d+)?\.safetensors", found)
    return f", only {found}" + (f" (variant {variant[1]}: save it again without)" if variant else "")


def _stamp(path: Path) -> tuple[int, int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ino


@lru_cache(maxsize=256)
def _digest(path: Path, stamp: tuple[int, int, int]) -> str:
    """Digest of the file as of `stamp`; read once per process."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
