"""The embedded default: a tiny FLUX pipeline, the world it was trained on, and that world's judge."""
