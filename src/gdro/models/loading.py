"""From a model's name to the model: `tiny`, a folder in diffusers' layout, or a Hub id."""

import hashlib
import json
import re
from pathlib import Path

import torch

from gdro.errors import UserError
from gdro.models.base import FlowModel

EXPECTED = '"tiny", a folder with a model_index.json, or a Hub id such as black-forest-labs/FLUX.1-dev'


def load_model(name: str, *, device: torch.device, dtype: torch.dtype) -> FlowModel:
    """The model called `name`, its transformer on `device` in `dtype` (float32 or bfloat16).

    Text encoders and VAE are loaded when first used. Raises UserError if it is missing, of an unknown class, or
    without safetensors weights.
    """
    source, commit = check_model(name)
    # These take seconds to import, which neither `--help` nor a misspelt name should cost.
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    from gdro.models.flux import FluxModel

    return FluxModel(name, source, commit, device=device, dtype=dtype)


def check_model(name: str) -> tuple[str, str | None]:
    """(folder or Hub id, Hub commit if any) of a model that is there and of a known class; loads no weights.

    Raises UserError otherwise.
    """
    source, commit, index = _find(name)
    kind = index.get("_class_name")
    if kind != "FluxPipeline":
        raise UserError(f"model: {name} is a {kind}; expected a FluxPipeline")
    return source, commit


def model_revision(name: str) -> str:
    """`FlowModel.revision` of the model called `name`, without loading it."""
    return revision_of(*check_model(name))


def revision_of(source: str, commit: str | None) -> str:
    """The Hub commit, or the digest of the transformer's weights in the folder `source`."""
    if commit:
        return commit
    digest = hashlib.sha256()
    for path in sorted((Path(source) / "transformer").glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"


def _find(name: str) -> tuple[str, str | None, dict[str, object]]:
    """(folder or Hub id, Hub commit if any, model_index.json) of the model called `name`."""
    if name == "tiny":
        from gdro.tiny import MODEL_FOLDER

        folder = Path(MODEL_FOLDER)
    else:
        folder = Path(name).expanduser()
    if folder.exists():
        return str(folder), None, _read_index(name, folder / "model_index.json")
    if name == "tiny" or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"model: {name} not found; expected {EXPECTED}")
    from huggingface_hub import HfApi, hf_hub_download

    commit, cause = None, ""
    try:
        commit = HfApi().model_info(name, timeout=10).sha
    except Exception as error:  # no network, or no such model: at once, where a download would try again and again
        cause = type(error).__name__
    try:
        path = Path(hf_hub_download(name, "model_index.json", revision=commit, local_files_only=commit is None))
    except (OSError, ValueError) as error:
        cause = cause or type(error).__name__
        raise UserError(f"model: {name} is no folder here, nor on the Hub ({cause}); expected {EXPECTED}") from None
    return name, path.parent.name, _read_index(name, path)


def _read_index(name: str, path: Path) -> dict[str, object]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"model: {name} has no model_index.json; expected {EXPECTED}") from None
    except ValueError as error:
        raise UserError(f"model: {path} is not JSON ({error})") from None
    if not isinstance(index, dict):
        raise UserError(f"model: {path} is not a JSON object")
    return index
