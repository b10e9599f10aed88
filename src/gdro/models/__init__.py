"""What predicts a velocity: one protocol (`base`), one file a family."""

from gdro.models.base import FlowModel, Text
from gdro.models.loading import check_compiler, check_model, load_model, model_revision, passes, text_seen
from gdro.models.quantisation import Quantisation, check_quantisation

__all__ = [
    "FlowModel",
    "Quantisation",
    "Text",
    "check_compiler",
    "check_model",
    "check_quantisation",
    "load_model",
    "model_revision",
    "passes",
    "text_seen",
]
