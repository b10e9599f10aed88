"""CLIP for the rewards: unit embeddings of images and texts, from a checkpoint that is checked beforehand.

A checkpoint is a CLIPModel of transformers (config.json, model.safetensors and its processor), or model.safetensors
alone with open_clip's names, which takes its architecture and processor from another CLIPModel.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.common.hub import Source, digest, locate
from gdro.common.images import to_rgb
from gdro.common.reading import reading
from gdro.rewards.neural import pretrained
from gdro.rewards.neural.published import WEIGHTS, from_open_clip, tensor_names

if TYPE_CHECKING:
    from torch import Tensor

DType = Literal["float32", "bfloat16"]
MODEL, PROCESSOR = "score.reward.model", "score.reward.processor"
EXPECTED = f"a CLIPModel, a folder or Hub id with config.json and {WEIGHTS}"


@dataclass(frozen=True)
class ClipEncoder:
    """The encoders of `model`; `processor` names the model whose image processor and tokenizer to use (None: its own).

    `pad` fits an image by its longer side, on black; CLIP's processor fits the shorter side and crops the rest.
    Nothing is read before `check` or `version`, and no weights before the first embedding.
    """

    model: str
    revision: str | None = None
    processor: str | None = None
    device: pretrained.Device = "auto"
    dtype: DType = "float32"
    batch_size: int = 16
    pad: bool = False

    @cached_property
    def version(self) -> str:
        """Changes with the weights, the files of the processor, and the precision."""
        weights, processor, _ = self._sources
        return fingerprint(weights.version, *map(settings_version, (weights, processor)), self.dtype, self.pad)

    def check(self) -> None:
        """Raise UserError if the checkpoint is missing, not a CLIPModel, not in safetensors, or damaged."""
        pretrained.torch_device(self.device)
        weights, _, is_open_clip = self._sources
        names = tensor_names(weights.index, MODEL)
        if is_open_clip and not any(name.endswith("visual.conv1.weight") for name in names):
            raise UserError(f"{MODEL}: {self.model} lacks config.json and open_clip's tensors; expected {EXPECTED}")
        _ = self._config, self._processors

    def images(self, images: Sequence[Image.Image]) -> "Tensor":
        """Unit embeddings (n, d), float32 on the CPU."""
        import torch

        fitted = [to_rgb(image) for image in images]
        if self.pad:
            fitted = [pad_to_square(image, self._config.vision_config.image_size) for image in fitted]
        rows = []
        for start in range(0, len(fitted), self.batch_size):
            batch = fitted[start : start + self.batch_size]
            pixels = self._processors[0](images=batch, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                seen = self._model.vision_model(pixel_values=pixels.to(self._model.device, self._model.dtype))
                rows.append(unit(self._model.visual_projection(seen.pooler_output).float()).cpu())
        return torch.cat(rows)

    def texts(self, texts: Sequence[str]) -> "tuple[Tensor, list[dict[str, Any]]]":
        """Unit embeddings (n, d), float32 on the CPU, and {"tokens", "truncated"} of each text.

        A text with more tokens than the encoder takes (77, including start and end) is cut, as in published scores.
        """
        import torch

        tokenizer, limit = self._processors[1], self._config.text_config.max_position_embeddings
        different = list(dict.fromkeys(texts))  # the images of a group share their prompt
        rows = []
        for start in range(0, len(different), self.batch_size):
            tokens = tokenize(tokenizer, different[start : start + self.batch_size], limit).to(self._model.device)
            with torch.inference_mode():
                read = self._model.text_model(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                ).pooler_output
                rows.append(unit(self._model.text_projection(read).float()).cpu())
        place = {text: i for i, text in enumerate(different)}
        lengths = token_counts(tokenizer, different, limit)
        return torch.cat(rows)[[place[text] for text in texts]], [dict(lengths[place[text]]) for text in texts]

    @property
    def width(self) -> int:
        """The dimension d of embeddings."""
        return int(self._config.projection_dim)

    @property
    def logit_scale(self) -> float:
        """The factor on the model's cosines: e to a learned power, about 100 in published checkpoints."""
        return float(self._model.logit_scale.float().exp())

    @cached_property
    def _sources(self) -> tuple[Source, Source, bool]:
        """(place of the weights, place of architecture and processor, whether the names are open_clip's)."""
        try:
            source, _ = pretrained.find(self.model, self.revision, field=MODEL, expected=EXPECTED)
        except UserError:
            if self.processor is None or os.path.exists(os.path.expanduser(os.path.join(self.model, "config.json"))):
                raise
            weights = locate(self.model, WEIGHTS, field=MODEL, expected=EXPECTED, revision=self.revision)
            expected = "a CLIPModel's folder or Hub id"
            return weights, locate(self.processor, "config.json", field=PROCESSOR, expected=expected), True
        weights = locate(self.model, WEIGHTS, field=MODEL, expected=EXPECTED, revision=source.commit)
        if self.processor is None:
            return weights, source, False
        expected = "the folder or Hub id of a CLIP tokenizer and image processor"
        return weights, locate(self.processor, "tokenizer_config.json", field=PROCESSOR, expected=expected), False

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        weights, processor, is_open_clip = self._sources
        source, field = (processor, PROCESSOR) if is_open_clip else (weights, MODEL)
        config = pretrained.load(AutoConfig, source, field=field)
        if config.model_type != "clip":
            raise UserError(f'{field}: {source.name} is a model of the type "{config.model_type}"; expected {EXPECTED}')
        return config

    @cached_property
    def _processors(self) -> tuple[Any, Any]:
        """(image processor, tokenizer)."""
        from transformers import AutoTokenizer

        source, field = self._sources[1], MODEL if self.processor is None else PROCESSOR
        return pretrained.image_processor(source, field=field), pretrained.load(AutoTokenizer, source, field=field)

    @cached_property
    def _model(self) -> Any:
        """CLIPModel on its device, for inference."""
        import torch
        from transformers import CLIPModel

        weights, _, is_open_clip = self._sources
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "output_loading_info": True}
        if is_open_clip:
            from safetensors.torch import load_file

            with reading(weights.index, "a safetensors file", f"{MODEL}: {weights.index}"):
                state = from_open_clip(load_file(weights.index))
            try:
                model, info = CLIPModel.from_pretrained(None, config=self._config, state_dict=state, **options)
            except RuntimeError as error:
                raise UserError(
                    f"{MODEL}: {self.model} does not have the shapes of {self.processor} ({str(error).splitlines()[0]})"
                ) from error
        else:
            model, info = pretrained.load(CLIPModel, weights, field=MODEL, use_safetensors=True, **options)
        if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
            raise UserError(f"{MODEL}: {self.model} lacks {len(missing)} tensors of a CLIPModel, e.g. {missing[0]}")
        return model.to(pretrained.torch_device(self.device)).eval().requires_grad_(False)


def unit(x: "Tensor") -> "Tensor":
    """Rows (k, d) divided by their norms."""
    return x / x.norm(dim=-1, keepdim=True)


def pad_to_square(image: Image.Image, size: int) -> Image.Image:
    """The image resized (bicubic) to a longer side of `size` pixels and centered on a black square."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size))
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return square


def tokenize(tokenizer: Any, texts: Sequence[str], limit: int) -> Any:
    """Ids and mask (k, limit), padded to the limit so a text's embedding never depends on its neighbors."""
    return tokenizer(list(texts), truncation=True, max_length=limit, padding="max_length", return_tensors="pt")


def token_counts(tokenizer: Any, texts: Sequence[str], limit: int) -> list[dict[str, Any]]:
    """For each text, its number of tokens and whether that exceeds `limit`."""
    counts = [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    return [{"tokens": count, "truncated": count > limit} for count in counts]


def settings_version(source: Source) -> str:
    """Changes with the configuration, tokenizer and image processor; a Hub commit stands for all of them."""
    return source.commit or digest(sorted(p for p in Path(source.name).iterdir() if p.suffix in (".json", ".txt")))
