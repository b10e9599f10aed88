"""The embedded default: a tiny FLUX pipeline, the world it was trained on, and that world's judge."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
