"""Object colors as in GenEval's official evaluator: CLIP ViT-L/14, zero-shot, on crops."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.common.hub import Source
from gdro.rewards.neural import pretrained

CLIP = "openai/clip-vit-large-patch14"
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
BACKGROUND = "#999"
FIELD = 'reward "geneval": clip'
_EXPECTED = f"a folder or a Hub id of a CLIPModel, such as {CLIP}"


def crop(image: Image.Image, box: Sequence[float], mask: Image.Image | None) -> Image.Image:
    """The box (left, top, right, bottom) of the image, at least one pixel, filled with BACKGROUND outside the mask."""
    if mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), mask)
    left, top = (min(round(box[axis]), image.size[axis] - 1) for axis in (0, 1))
    return image.crop((left, top, max(round(box[2]), left + 1), max(round(box[3]), top + 1)))


@dataclass(frozen=True)
class ColorClassifier:
    """Names the color of an object of a known class. Float32; weights are loaded on the first call."""

    model: str = CLIP
    revision: str | None = None
    device: pretrained.Device = "auto"
    batch_size: int = 8

    @property
    def version(self) -> str:
        return fingerprint(self._source.version, TEMPLATES, COLORS, BACKGROUND)

    def check(self) -> None:
        """Raise UserError if the model is missing or not a CLIP."""
        _ = self._processors

    def __call__(self, crops: Sequence[Image.Image], labels: Sequence[str]) -> list[str]:
        """The color whose class embedding has the largest cosine with each crop's; `labels` are the objects' classes.

        A class embedding is the normalized mean of the templates' normalized embeddings.
        """
        import torch

        colors: list[str] = []
        for start in range(0, len(crops), self.batch_size):
            batch = list(crops[start : start + self.batch_size])
            pixels = self._processors[0](images=batch, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                vision = self._network.vision_model(pixel_values=pixels.to(self._network.device))
                seen = self._network.visual_projection(vision.pooler_output)
            for features, label in zip(seen, labels[start : start + self.batch_size], strict=True):
                colors.append(COLORS[int((self._embeddings(label) @ features).argmax())])
        return colors

    def _embeddings(self, label: str) -> Any:
        """(colors, D) of norm 1."""
        import torch
        from torch.nn.functional import normalize

        if label not in self._cache:
            texts = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
            tokens = self._processors[1](texts, padding=True, return_tensors="pt").to(self._network.device)
            with torch.inference_mode():
                embedded = self._network.text_projection(self._network.text_model(**tokens).pooler_output)
            means = normalize(embedded, dim=-1).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
            self._cache[label] = normalize(means, dim=-1)
        return self._cache[label]

    @cached_property
    def _cache(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _source(self) -> Source:
        source, config = pretrained.find(self.model, self.revision, field=FIELD, expected=_EXPECTED)
        if config.get("model_type") != "clip":
            kind = config.get("model_type", "unnamed")
            raise UserError(f"{FIELD}: {self.model} is a model of type {kind}; expected {_EXPECTED}")
        return source

    @cached_property
    def _processors(self) -> tuple[Any, Any]:
        """(image processor, tokenizer)"""
        import transformers

        return (
            pretrained.image_processor(self._source, field=FIELD),
            pretrained.load(transformers.AutoTokenizer, self._source, field=FIELD),
        )

    @cached_property
    def _network(self) -> Any:
        import transformers

        return pretrained.network(transformers.CLIPModel, self._source, field=FIELD, device=self.device)
