"""LoRA on a diffusers transformer, through peft: adding, naming, reading and writing it.

Names are those of the exported file without its `transformer.` prefix, e.g.
`transformer_blocks.0.attn.to_q.lora_A.weight`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor, nn

from gdro.common.errors import UserError, did_you_mean
from gdro.common.files import write_bytes
from gdro.common.rng import torch_rng
from gdro.models.adapter_file import HEADER, WEIGHTS, digest_of, read_adapter

ADAPTER = "default"


def resolve_targets(
    transformer: nn.Module, targets: str | Sequence[str], presets: Mapping[str, str]
) -> str | list[str]:
    """peft's `target_modules` for a preset name, "all-linear" or a list of name endings.

    Raises UserError for an unknown preset, for one that matches no layer, and for an ending that no linear layer has.
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

    A is drawn per layer from (seed, "lora", name), so it does not depend on global state or order.
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
    """The adapter's parameters by name, made float32 and trainable regardless of the base's dtype."""
    found = {}
    for name, parameter in transformer.named_parameters():
        if f".{ADAPTER}." in name and ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            found[name.replace(f".{ADAPTER}.", ".")] = parameter
    return found


def read_lora(pipeline_class: Any, transformer: Any, folder: Path) -> None:
    """Add the adapter in `folder`, in any format that diffusers reads or peft writes; UserError if it is invalid."""
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = pipeline_class.lora_state_dict(tensors)
        return state

    state = read_adapter(folder, layers, convert)
    ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in state.items() if ".lora_A." in key}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
    names = "|".join(map(re.escape, ranks))
    config = LoraConfig(r=usual, lora_alpha=usual, rank_pattern=others, alpha_pattern=others, target_modules=names)
    transformer.add_adapter(config, ADAPTER)
    for name, parameter in own_in_float32(transformer).items():
        parameter.data.copy_(state[name])


def write_lora(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Write diffusers' `pytorch_lora_weights.safetensors` for the named tensors; atomic.

    `config` holds the `r` and `lora_alpha` they were trained with. Their ratio goes into B, so readers that look for
    alpha in the header (diffusers), in `.alpha` tensors (ComfyUI) or nowhere all apply the same strength. `about` is
    stored under "gdro" in the header's only entry: safetensors writes several in random order, and the same adapter
    should give the same file. A digest of everything, which `read_lora` checks, is stored there too.
    """
    modules = sorted({re.sub(r"\.lora_[AB]\.weight$", "", name) for name in state})
    header = {"r": config["r"], "lora_alpha": config["r"], "target_modules": modules}
    scales = {"A": 1.0, "B": config["lora_alpha"] / config["r"]}
    tensors = {
        f"transformer.{name}": (value.detach().float().cpu() * scales[name[-len("A.weight")]]).contiguous()
        for name, value in state.items()
    }
    path = folder / WEIGHTS[0]
    entry: dict[str, Any] = {f"transformer.{key}": value for key, value in header.items()} | {"gdro": dict(about)}
    entry["gdro"]["digest"] = digest_of(tensors, entry)
    write_bytes(path, save(tensors, {HEADER: json.dumps(entry)}))
    return path
