"""What predicts a velocity: one protocol (`base`), one file a family."""

from gdro.models.base import FlowModel, Text
from gdro.models.loading import check_model, load_model, model_revision

__all__ = ["FlowModel", "Text", "check_model", "load_model", "model_revision"]
