"""Fewer bits for a transformer's frozen weights: policy and reference share them, the LoRA stays float32."""

import importlib.util
import logging
from typing import Any, Literal

import torch

from gdro.common.errors import UserError

Quantization = Literal["int8", "fp8", "nf4"]

PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


def check_quantization(kind: Quantization, device: torch.device) -> None:
    """Raise UserError if the package or the GPU it needs is missing."""
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        raise UserError(f'quantization is "{kind}", which needs {PACKAGES[kind]}; pip install "gdro[quantization]"')
    if kind == "nf4" and device.type != "cuda":
        raise UserError(f'quantization is "nf4", which needs a GPU, but device is {device.type}; expected int8 or fp8')


def quantized(kind: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for diffusers' `from_pretrained` that quantize all linear layers; products are in `dtype`."""
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if kind == "nf4":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return {"quantization_config": BitsAndBytesConfig(**settings)}
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    return {"quantization_config": TorchAoConfig(config)}


def hush() -> None:
    """Silence what torchao and diffusers print on import about kernels and file formats not used here."""
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)
