"""What predicts a velocity: one protocol (`base`), one file a family."""

from gdro.models.base import FlowModel, Text
from gdro.models.loading import load_model

__all__ = ["FlowModel", "Text", "load_model"]
