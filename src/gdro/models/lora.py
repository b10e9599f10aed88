"""LoRA on a diffusers transformer, through peft: adding, naming, reading and writing it.

Names are those of the exported file without its `transformer.` prefix, e.g.
`transformer_blocks.0.attn.to_q.lora_A.weight`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from gdro.errors import UserError, did_you_mean
from gdro.files import write_bytes
from gdro.rng import torch_rng

ADAPTER = "default"


def resolve_targets(
    transformer: nn.Module, targets: str | Sequence[str], presets: Mapping[str, str]
) -> str | list[str]:
    """peft's `target_modules` for a preset's name, "all-linear" or a list of name endings.

    Raises UserError for an unknown preset, for one that names no layer, and for an ending that no linear layer has.
    """
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if targets == "all-linear":
        return linears
    if isinstance(targets, str):
        if targets not in presets:
            hint = did_you_mean(targets, [*presets, "all-linear"])
            raise UserError(f"train.target_modules: {targets!r} is not a preset{hint}")
        if not any(re.fullmatch(presets[targets], name) for name in linears):
            raise UserError(f"train.target_modules: {targets!r} matches no linear layer of the transformer")
        return presets[targets]
    if not targets:
        raise UserError("train.target_modules: the list is empty; expected at least one layer name")
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            raise UserError(f"train.target_modules: {target!r} matches no linear layer of the transformer")
    return list(targets)


def add_lora(transformer: Any, *, rank: int, alpha: float, targets: str | list[str], seed: int) -> None:
    """Add a LoRA with B = 0 (the model is unchanged) and A = U(-1/sqrt(in), 1/sqrt(in)), peft's own distribution.

    A is drawn per layer from (seed, "lora", name), so it depends on no global state and no order.
    """
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), ADAPTER)
    for name, parameter in own_in_float32(transformer).items():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=torch_rng(seed, "lora", name))
            parameter.data.copy_(values)
        else:
            parameter.data.zero_()


def own_in_float32(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, made float32 and trainable whatever the base's dtype."""
    found = {}
    for name, parameter in transformer.named_parameters():
        if f".{ADAPTER}." in name and ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            found[name.replace(f".{ADAPTER}.", ".")] = parameter
    return found


def read_lora(pipeline_class: Any, transformer: Any, folder: Path) -> None:
    """Add the adapter in `folder`/pytorch_lora_weights.safetensors, as diffusers itself reads it.

    Raises UserError if it is missing, damaged, made for another model, or also trains text encoders.
    """
    path = folder / LORA_WEIGHT_NAME_SAFE
    if not path.is_file():
        raise UserError(f"adapter: {path} not found; expected a folder holding {LORA_WEIGHT_NAME_SAFE}")
    # FLUX.1's reader hands the alphas of other trainers' files over apart; the others put them into the weights.
    apart = "return_alphas" in signature(pipeline_class.lora_state_dict).parameters
    try:
        with safe_open(path, "pt") as file:
            dora = [key for key in file.keys() if "dora_scale" in key]  # noqa: SIM118 (no mapping)
        if dora:  # diffusers would drop them and give other images than the trainer's
            raise UserError(f"adapter: {path} holds {dora[0]}; expected LoRA, not DoRA")
        state, *alphas, metadata = pipeline_class.lora_state_dict(
            str(folder),
            weight_name=LORA_WEIGHT_NAME_SAFE,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
            **({"return_alphas": True} if apart else {}),
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"adapter: {path} is damaged ({_first_line(error)}); expected a safetensors file") from None
    foreign = [key for key in state if not key.startswith("transformer.") or ".lora_" not in key]
    if foreign or not state:
        found = foreign[0] if foreign else "no tensor"
        raise UserError(f"adapter: {path} holds {found}; expected LoRA layers of the transformer only")
    names = {key.removeprefix("transformer.") for key in state}
    try:
        pipeline_class.load_lora_into_transformer(
            state,
            transformer=transformer,
            adapter_name=ADAPTER,
            metadata=metadata,
            **({"network_alphas": alphas[0]} if apart else {}),
        )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"adapter: {path} does not fit the model ({_first_line(error)})") from None
    strange = names ^ set(own_in_float32(transformer))
    if strange:
        raise UserError(f"adapter: {path} does not fit the model (layer {min(strange)})")


def write_lora(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Write diffusers' `pytorch_lora_weights.safetensors` for the named tensors; atomic.

    `config` holds peft's `r` and `lora_alpha` (and `rank_pattern`, `alpha_pattern` if any): without them in the file a
    reader would take alpha = rank. `about` is kept beside it under "gdro". Both share one metadata entry, because
    safetensors writes several in random order and the same adapter should be the same file.
    """
    modules = sorted({re.sub(r"\.lora_[AB]\.weight$", "", name) for name in state})
    header = {f"transformer.{k}": v for k, v in {**config, "target_modules": modules}.items()}
    tensors = {f"transformer.{name}": value.detach().float().cpu().contiguous() for name, value in state.items()}
    path = folder / LORA_WEIGHT_NAME_SAFE
    write_bytes(path, save(tensors, {LORA_ADAPTER_METADATA_KEY: json.dumps({**header, "gdro": dict(about)})}))
    return path


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
