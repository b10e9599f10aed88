"""How another process gets the same model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gdro.models.base import FlowModel
from gdro.models.loading import load_model
from gdro.models.quantization import Quantization


@dataclass(frozen=True, kw_only=True)
class Replica:
    """Arguments for `load_model` and `FlowModel.compile`, and the adapter in later rounds; picklable.

    `lora` holds `FlowModel.add_adapter`'s arguments, `state` the adapter's tensors, on the CPU.
    """

    name: str
    dtype: torch.dtype
    quantization: Quantization | None = None
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    lora: Mapping[str, Any] | None = None
    state: Mapping[str, Tensor] | None = None

    def load(self) -> FlowModel:
        """Load the model; raises UserError, like `load_model`, if this machine does not have it."""
        device = torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")
        model = load_model(self.name, device=device, dtype=self.dtype, quantization=self.quantization)
        if self.compile:
            model.compile()
        if self.lora is not None and self.state is not None:
            model.add_adapter(**self.lora)
            model.load_adapter_state(self.state)
        return model
