"""LoRA files of all formats, read into one form: layers of the transformer, with their strength in the matrices.

Trainers store the strength of a layer, alpha / rank, in different places: in the header (diffusers), in
adapter_config.json (peft), in a tensor `<layer>.alpha` (kohya and others), or nowhere, which means 1.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gdro.common.errors import UserError
from gdro.common.reading import cause, parse_json, read_json, reading

WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' name and peft's
CONFIG = "adapter_config.json"
AGAIN = "run `gdro export` again"
HEADER = "lora_adapter_metadata"
_MATRIX = re.compile(
    r"(?P<layer>.+)\.(?P<side>lora_A|lora_B|lora_down|lora_up|lora(?:_linear_layer)?\.(?:down|up))(?:\.default)?\.weight"
)
_PREFIX = re.compile(r"^(base_model\.model\.)?(transformer\.|diffusion_model\.)?")
_NO_LORA = re.compile(r"dora_scale|lora_magnitude_vector|\.lokr_|\.hada_")
# Fields of peft's configuration that make the matrices mean something other than W + alpha / rank * B A, and
# initializations that change W itself.
_OTHER_METHODS = (
    *("use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config"),
    *("layer_replication", "alora_invocation_tokens"),
)
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adapter_files(folder: Path) -> list[Path]:
    """The files that make up the adapter in `folder`, weights first; [] if there are no weights.

    If there are both kinds of weights, diffusers' are used, without the configuration, which belongs to peft's.
    """
    weights, config = [folder / name for name in WEIGHTS if (folder / name).is_file()], folder / CONFIG
    return [*weights, config] if len(weights) == 1 and config.is_file() else weights[:1]


def read_adapter(
    folder: Path, layers: Mapping[str, nn.Linear], convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """`<layer>.lora_A.weight` and `<layer>.lora_B.weight` of the adapter in `folder`, float32, with alpha = rank.

    `layers` are the transformer's; `convert` is diffusers' conversion from other programs' names for them. Raises
    UserError if a file is missing or damaged, holds something other than a LoRA of these layers, or does not give its
    strength.
    """
    files = adapter_files(folder)
    if not files:
        raise UserError(f"adapter: {folder / WEIGHTS[0]} not found; expected a folder holding {' or '.join(WEIGHTS)}")
    path = files[0]
    tensors, header = _read(path)
    pairs = _pairs(path, tensors)
    for layer, strength in _strengths(files, header, tensors, pairs).items():
        down, up = pairs[layer]
        tensors[up] *= strength
        if f"{layer}.alpha" in tensors:  # converters look for it
            tensors[f"{layer}.alpha"] = torch.tensor(float(tensors[down].shape[0]))
    state = {
        f"{_PREFIX.sub('', layer)}.lora_{side}.weight": tensors[key]
        for layer, keys in pairs.items()
        for side, key in zip("AB", keys, strict=True)
    }
    known = {key for layer, keys in pairs.items() for key in (*keys, f"{layer}.alpha")}
    if not set(tensors) <= known or not {_PREFIX.sub("", layer) for layer in pairs} <= set(layers):
        state = _converted(path, tensors, convert)
    return _fitting(path, state, layers)


def check_adapter(folder: Path) -> None:
    """Raise UserError unless `folder` holds an adapter exactly as gdro wrote it, to the last bit."""
    path = folder / WEIGHTS[0]
    _, header = _read(path)
    if _sealed(header) is None:
        raise UserError(f"adapter: {path} is damaged: its header was altered; {AGAIN}")


def digest_of(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> str:
    """Digest of an adapter that gdro writes: its matrices (float32, on the CPU) and header entry without the digest."""
    total = hashlib.sha256(json.dumps(entry, sort_keys=True).encode())
    for key in sorted(tensors):
        total.update(f"{key} {tuple(tensors[key].shape)}".encode())
        total.update(tensors[key].contiguous().numpy().tobytes())
    return total.hexdigest()


def _sealed(header: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    """(digest, the entry it covers) of an adapter that gdro wrote; None for any other."""
    try:
        entry = parse_json(header.get(HEADER, "{}"), "it")
        return entry["gdro"].pop("digest"), entry
    except (UserError, LookupError, TypeError, AttributeError):
        return None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in float32, and the header. Raises UserError naming a tensor that is not finite, and for one of gdro's
    own adapters that was altered."""
    with reading(path, "a safetensors file", f"adapter: {path}"), safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (no mapping)
        header = dict(file.metadata() or {})
    own = _sealed(header)
    if own is not None and own[0] != digest_of(tensors, own[1]):
        raise UserError(f"adapter: {path} is damaged: its bytes were altered; {AGAIN}")
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"adapter: {path}: {key} holds values that are not finite; expected a trained LoRA")
    return tensors, header


def _pairs(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """layer: the names of its two matrices, A and B."""
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        if match := _MATRIX.fullmatch(key):
            found.setdefault(match["layer"], {})["A" if match["side"].endswith(("A", "down")) else "B"] = key
        elif _NO_LORA.search(key):
            raise UserError(f"adapter: {path} holds {key}; expected LoRA, not DoRA, LoKr or LoHa")
    for layer, sides in found.items():
        if len(sides) < 2:
            raise UserError(f"adapter: {path} holds {next(iter(sides.values()))} without the other matrix of {layer}")
    for key in tensors:
        if key.endswith(".alpha") and key.removesuffix(".alpha") not in found:
            raise UserError(f"adapter: {path} holds {key} without the matrices it scales")
    return {layer: (sides["A"], sides["B"]) for layer, sides in found.items()}


def _strengths(
    files: list[Path], header: Mapping[str, str], tensors: Mapping[str, Tensor], pairs: Mapping[str, tuple[str, str]]
) -> dict[str, float]:
    """alpha / rank of each layer, from wherever this file keeps it; 1 for formats without it."""
    path = files[0]
    place, config = _config(files, header)
    if config is None and not any(f"{layer}.alpha" in tensors for layer in pairs):
        if path.name == WEIGHTS[1] or any(layer.startswith("base_model.") for layer in pairs):
            raise UserError(f"adapter: {path} is peft's, which keeps its strength in {CONFIG}; expected that beside it")
        alpha, dim = (header.get(f"ss_network_{name}") for name in ("alpha", "dim"))
        if alpha != dim:
            raise UserError(
                f"adapter: {path} was trained with alpha {alpha} and rank {dim}, but holds no .alpha tensors; expected "
                "them, or a header that agrees with the matrices"
            )
    strengths = {}
    for layer, (down, _) in pairs.items():
        rank, alpha_tensor = tensors[down].shape[0], tensors.get(f"{layer}.alpha")
        said = {}
        try:
            if alpha_tensor is not None:
                said[f"{layer}.alpha"] = alpha_tensor.item() / rank
            if config is not None:
                said[place] = _configured(config, _PREFIX.sub("", layer), rank)
        except Exception as error:
            where = place if config is not None else path
            raise UserError(f"adapter: {where} makes no sense for {layer} of rank {rank} ({cause(error)})") from None
        values = list(said.values()) or [1.0]
        if not (0 < values[0] < math.inf and math.isclose(values[0], values[-1], rel_tol=1e-3)):
            found = ", ".join(f"{value:g} in {where}" for where, value in said.items())
            raise UserError(f"adapter: {path}: alpha / rank is {found}; expected one positive number")
        strengths[layer] = values[0]
    return strengths


def _config(files: list[Path], header: Mapping[str, str]) -> tuple[str, dict[str, Any] | None]:
    """peft's configuration of the adapter, with its place: the file's header, or a file beside it."""
    place = f"the header of {files[0]}"
    try:
        config = parse_json(header.get(HEADER, "{}"), "it")
        own = {
            key.removeprefix("transformer."): value for key, value in config.items() if key.startswith("transformer.")
        }
        config = own or config
        if "r" not in config and len(files) > 1:
            place = str(files[1])
            config = read_json(files[1], "a JSON object")
        if not isinstance(config, dict):
            raise ValueError(f"it is a {type(config).__name__}")
    except Exception as error:
        raise UserError(f"adapter: {place} is damaged ({cause(error)}); expected peft's configuration") from None
    for field in _OTHER_METHODS:
        if config.get(field):
            raise UserError(f"adapter: {place} says {field}: {config[field]}; expected plain LoRA")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(_OTHER_BASES):
        raise UserError(
            f"adapter: {place} says init_lora_weights: {begun}, which changes the base; expected plain LoRA"
        )
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"adapter: {place} says peft_type: {config['peft_type']}; expected LORA")
    return place, config if "r" in config or len(files) > 1 else None


def _configured(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / rank of a layer as peft reads it from its configuration."""
    from peft.utils.other import get_pattern_key

    r, alpha = (
        (config.get(patterns) or {}).get(get_pattern_key(config.get(patterns) or {}, layer), config[field])
        for field, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    if r != rank:
        raise ValueError(f"it says rank {r}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _converted(
    path: Path, tensors: Mapping[str, Tensor], convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors, renamed to diffusers' names."""
    try:
        state = {key: value for key, value in convert(dict(tensors)).items() if not key.endswith(".alpha")}
    except Exception as error:  # it asserts, indexes and splits by one model's names and widths
        raise UserError(f"adapter: {path} does not fit the model ({cause(error)})") from None
    for key in state:
        if not (key.startswith("transformer.") and _MATRIX.fullmatch(key)):
            raise UserError(f"adapter: {path} holds {key}; expected LoRA layers of the transformer only")
    return {key.removeprefix("transformer."): value for key, value in state.items()}


def _fitting(path: Path, state: Mapping[str, Tensor], layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """The state, if its matrices have the layers' widths."""
    if not state:
        raise UserError(f"adapter: {path} holds no tensors; expected LoRA layers of the transformer")
    for key, value in state.items():
        layer, _, side = key.removesuffix(".weight").rpartition(".lora_")
        if layer not in layers or f"{layer}.lora_{'BA'[side == 'B']}.weight" not in state:
            raise UserError(f"adapter: {path} does not fit the model (layer {layer})")
        rank = state[f"{layer}.lora_A.weight"].shape[0]
        linear = layers[layer]
        expected = (rank, linear.in_features) if side == "A" else (linear.out_features, rank)
        if tuple(value.shape) != expected:
            raise UserError(
                f"adapter: {path} does not fit the model ({key} is {tuple(value.shape)}, expected {expected})"
            )
    return dict(state)
