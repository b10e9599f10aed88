"""Models that predict a velocity: one protocol (`base`), one file per family."""

from gdro.models.base import FlowModel, Text
from gdro.models.loading import check_compiler, check_model, load_model, model_revision, passes, text_seen
from gdro.models.quantization import Quantization, check_quantization

__all__ = [
    "FlowModel",
    "Quantization",
    "Text",
    "check_compiler",
    "check_model",
    "check_quantization",
    "load_model",
    "model_revision",
    "passes",
    "text_seen",
]
