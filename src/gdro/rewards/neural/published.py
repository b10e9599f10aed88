"""Published reward weights under the names of transformers' classes, and the linear heads they come with.

The originals are pickles of open_clip (HPSv2) and of the authors' BLIP (ImageReward). Nothing here reads pickles: their
tensors are read from safetensors, under the published names, and checked before use.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from gdro.common.errors import UserError
from gdro.common.reading import reading

if TYPE_CHECKING:
    from torch import Tensor

    State = Mapping[str, Tensor]
    Chain = list[tuple[Tensor, Tensor]]

WEIGHTS = "model.safetensors"

_OPEN_CLIP_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}
_OPEN_CLIP_OUTSIDE = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.": "embeddings.token_embedding.",
    "conv1.": "embeddings.patch_embedding.",
    "ln_pre.": "pre_layrnorm.",  # the misspelling is transformers'
    "ln_post.": "post_layernorm.",
    "ln_final.": "final_layer_norm.",
}
_BLIP_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


def tensor_names(path: Path, field: str) -> list[str]:
    """The tensor names in a safetensors file, from its header only; UserError if it is damaged."""
    from safetensors import safe_open

    with reading(path, "a safetensors file", f"{field}: {path}"), safe_open(path, "np") as file:
        return list(file.keys())


def from_open_clip(state: "State") -> "dict[str, Tensor]":
    """A ViT's tensors, renamed from open_clip's to transformers' CLIPModel; a common prefix is dropped."""
    prefix = next(name.removesuffix("visual.conv1.weight") for name in state if name.endswith("visual.conv1.weight"))
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix(prefix)
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        name = name.removeprefix("visual.")
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if name in ("proj", "text_projection"):  # x @ W there, W x here
            renamed["visual_projection.weight" if name == "proj" else "text_projection.weight"] = tensor.T.contiguous()
        elif name == "logit_scale":
            renamed[name] = tensor
        elif block and (stacked := re.fullmatch(r"attn\.in_proj_(weight|bias)", block[2])):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                layer = f"{tower}.encoder.layers.{block[1]}.self_attn.{part}_proj.{stacked[1]}"
                renamed[layer] = third.contiguous()
        elif block:
            renamed |= _moved(block[2], _OPEN_CLIP_BLOCK, f"{tower}.encoder.layers.{block[1]}.", tensor)
        else:
            renamed |= _moved(name, _OPEN_CLIP_OUTSIDE, f"{tower}.", tensor)
    return renamed


def _moved(name: str, names: Mapping[str, str], prefix: str, tensor: "Tensor") -> "dict[str, Tensor]":
    """The tensor under its new name; empty for names CLIPModel does not use (some checkpoints' causal mask)."""
    return {prefix + new + name.removeprefix(old): tensor for old, new in names.items() if name.startswith(old)}


def from_blip(state: "State") -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
    """(vision, text) tensors of ImageReward's `blip.`, renamed for BlipVisionModel and BlipTextModel."""
    vision, text = {}, {}
    for name, tensor in state.items():
        if (inner := name.removeprefix("blip.visual_encoder.")) != name:
            for old, new in _BLIP_VISION:
                inner = re.sub(old, new, inner)
            vision[inner] = tensor
        elif (inner := name.removeprefix("blip.text_encoder.")) != name and not inner.endswith("position_ids"):
            text[inner] = tensor
    return vision, text


def read_chain(state: "State", prefix: str, where: str) -> "Chain":
    """The (weight, bias) of each `<prefix>N.`, in order of N (dropouts leave gaps), in float32.

    Raises UserError unless they fit together and end in one number.
    """
    found = sorted(int(m[1]) for name in state if (m := re.fullmatch(re.escape(prefix) + r"(\d+)\.weight", name)))
    try:
        chain = [(state[f"{prefix}{n}.weight"].float(), state[f"{prefix}{n}.bias"].float()) for n in found]
    except KeyError as error:
        raise UserError(f"{where} lacks the tensor {error.args[0]}") from None
    widths = [(weight.shape[1], weight.shape[0]) for weight, _ in chain]
    fits = all(before[1] == after[0] for before, after in pairwise(widths))
    if not widths or not fits or widths[-1][1] != 1:
        raise UserError(f"{where} has the linear layers {widths} ({prefix}N); expected a chain that ends in one number")
    return chain


def linear_chain(x: "Tensor", chain: "Sequence[tuple[Tensor, Tensor]]") -> "Tensor":
    """W_n (... (W_1 x + b_1) ...) + b_n of rows (k, d) -> (k,): the published heads have no activations."""
    from torch.nn.functional import linear

    for weight, bias in chain:
        x = linear(x, weight, bias)
    return x.squeeze(-1)
