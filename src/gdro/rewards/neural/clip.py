"""Rewards on CLIP embeddings: agreement with the prompt, human preference, aesthetics, safety.

| reward    | score of an image z and its prompt p, unit embeddings  | checkpoint                                     |
| pickscore | e^s cos(z, p) / 26                                     | PickScore v1 (CLIP-H/14)                       |
| clipscore | e^s cos(z, p) / 30                                     | OpenAI's CLIP ViT-L/14                         |
| hpsv2     | cos(z, p)                                              | HPS v2.1 (CLIP-H/14)                           |
| aesthetic | MLP(z) / 10                                            | CLIP ViT-L/14 and LAION's predictor v2         |
| safety    | cos(z, p + a v), v the direction from unsafe to safe   | any of the above; as published that of `hpsv2` |

26 and 30 are Flow-GRPO's; they bring good images close to 1.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image
from pydantic import PositiveInt

from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.common.hub import Source, locate
from gdro.common.prompts import Prompt
from gdro.common.reading import read_text, reading
from gdro.rewards.base import Scores
from gdro.rewards.neural.clip_encoder import ClipEncoder, DType, unit
from gdro.rewards.neural.pretrained import Device
from gdro.rewards.neural.published import WEIGHTS, linear_chain, read_chain

if TYPE_CHECKING:
    from torch import Tensor

CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE, HPSV2 = "yuvalkirstain/PickScore_v1", "RE-N-Y/hpsv21"
AESTHETIC = "ttj/sac-logos-ava1-l14-linearMSE"
PICKSCORE_SCALE, CLIPSCORE_SCALE, AESTHETIC_SCALE = 26.0, 30.0, 10.0
SAFE = (
    "a safe image",
    "a wholesome picture for all ages",
    "a photo without nudity, violence, blood or weapons",
    "people who are fully dressed",
    "a picture one may show at work",
)
UNSAFE = (
    "nudity and explicit sexual content",
    "a pornographic picture",
    "graphic violence, blood and gore",
    "a shocking and disturbing image",
)


def cosine(a: "Tensor", b: "Tensor") -> "Tensor":
    """Cosines (n,) in [-1, 1] of unit rows (n, d) with matching unit rows (n, d) or a single one (d,)."""
    if b.ndim > 1 and len(a) != len(b):  # one row would be broadcast
        raise ValueError(f"{len(a)} embeddings came with {len(b)}")
    return (a * b).sum(-1)


def safe_direction(safe: "Tensor", unsafe: "Tensor") -> "Tensor":
    """Unit vector (d,): the mean of the safe phrases' embeddings (m, d) minus that of the unsafe ones."""
    return unit(safe.mean(0) - unsafe.mean(0))


def steered(text: "Tensor", direction: "Tensor", strength: float) -> "Tensor":
    """Texts (n, d), moved along the direction (d,) and renormalized (SafeDiffusion-R1)."""
    return unit(text + strength * direction)


@dataclass(frozen=True)
class ClipReward:
    """How well image and prompt agree: their cosine or, with `divisor`, the model's logit divided by it.

    Evidence: `cosine`, the prompt's number of `tokens`, and whether it was `truncated` to the encoder's limit.
    """

    name: str
    encoder: ClipEncoder
    divisor: float | None
    parallel: ClassVar[bool] = False

    @property
    def version(self) -> str:
        return fingerprint("rule 1", self.name, self.divisor, self.encoder.version)

    def check(self, prompts: Sequence[Prompt]) -> None:
        self.encoder.check()

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        text, lengths = self.encoder.texts([prompt.text for prompt in prompts])
        cosines = as_array(cosine(self.encoder.images(images), text))
        factor = 1.0 if self.divisor is None else self.encoder.logit_scale / self.divisor
        return Scores(cosines * factor, [{"cosine": c} | n for c, n in zip(cosines.tolist(), lengths, strict=True)])


@dataclass(frozen=True)
class AestheticReward:
    """LAION's aesthetic predictor v2 on the image only, divided by 10. Evidence: `rating`, about 1 to 10."""

    encoder: ClipEncoder
    head: str
    head_revision: str | None = None
    name: ClassVar[str] = "aesthetic"
    parallel: ClassVar[bool] = False
    field: ClassVar[str] = "score.reward.head"

    @property
    def version(self) -> str:
        return fingerprint("rule 1", AESTHETIC_SCALE, self.encoder.version, self._source.version)

    def check(self, prompts: Sequence[Prompt]) -> None:
        self.encoder.check()
        if (takes := self._chain[0][0].shape[1]) != self.encoder.width:
            raise UserError(
                f"{self.field}: {self.head} takes {takes} numbers; expected {self.encoder.width}, an embedding's of "
                f"{self.encoder.model}"
            )

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        ratings = as_array(linear_chain(self.encoder.images(images), self._chain))
        return Scores(ratings / AESTHETIC_SCALE, [{"rating": rating} for rating in ratings.tolist()])

    @cached_property
    def _source(self) -> Source:
        expected = f"a folder or Hub id with the predictor's {WEIGHTS}, such as {AESTHETIC}"
        return locate(self.head, WEIGHTS, field=self.field, expected=expected, revision=self.head_revision)

    @cached_property
    def _chain(self) -> "list[tuple[Tensor, Tensor]]":
        from safetensors.torch import load_file

        path, name = self._source.index, f"{self.field}: {self._source.index}"
        with reading(path, "a safetensors file", name):
            tensors = load_file(path)
        return read_chain(tensors, "layers.", name)


@dataclass(frozen=True)
class SafetyReward:
    """The image's cosine with the prompt, steered toward safety (SafeDiffusion-R1).

    Evidence: `cosine` with the prompt as it is, `image_safety` and `text_safety` (cosines with the safe direction),
    `tokens` and `truncated` of the prompt.
    """

    encoder: ClipEncoder
    strength: float
    safe: tuple[str, ...] | Path
    unsafe: tuple[str, ...] | Path
    name: ClassVar[str] = "safety"
    parallel: ClassVar[bool] = False

    @property
    def version(self) -> str:
        return fingerprint("rule 1", self.strength, self._phrases, self.encoder.version)

    def check(self, prompts: Sequence[Prompt]) -> None:
        _ = self._phrases
        self.encoder.check()

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        text, lengths = self.encoder.texts([prompt.text for prompt in prompts])
        image = self.encoder.images(images)
        parts = {
            "cosine": cosine(image, text),
            "image_safety": cosine(image, self._direction),
            "text_safety": cosine(text, self._direction),
        }
        evidence = [
            {name: float(values[i]) for name, values in parts.items()} | length for i, length in enumerate(lengths)
        ]
        return Scores(as_array(cosine(image, steered(text, self._direction, self.strength))), evidence)

    @cached_property
    def _phrases(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return read_phrases(self.safe, "score.reward.safe"), read_phrases(self.unsafe, "score.reward.unsafe")

    @cached_property
    def _direction(self) -> "Tensor":
        safe, unsafe = (self.encoder.texts(phrases)[0] for phrases in self._phrases)
        return safe_direction(safe, unsafe)


def read_phrases(given: tuple[str, ...] | Path, field: str) -> tuple[str, ...]:
    """The lines of a text file that are not empty."""
    if isinstance(given, tuple):
        return given
    path = Path(os.path.expanduser(given))
    lines = read_text(path, "a text file, one phrase per line", f"{field}: {given}").splitlines()
    if not (phrases := tuple(line.strip() for line in lines if line.strip())):
        raise UserError(f"{field}: {given} contains no phrases; expected one per line")
    return phrases


def as_array(values: "Tensor") -> np.ndarray:
    """The values as a float64 array."""
    return values.double().numpy()


def pickscore(
    *,
    model: str = PICKSCORE,
    revision: str | None = None,
    processor: str = CLIP_H,
    device: Device = "auto",
    dtype: DType = "float32",
    batch_size: PositiveInt = 16,
) -> ClipReward:
    """PickScore (2305.01569): its logit over 26; the processor is that of the CLIP it was tuned from."""
    encoder = ClipEncoder(model, revision, processor, device, dtype, batch_size)
    return ClipReward("pickscore", encoder, PICKSCORE_SCALE)


def clipscore(
    *,
    model: str = CLIP_L,
    revision: str | None = None,
    processor: str | None = None,
    device: Device = "auto",
    dtype: DType = "float32",
    batch_size: PositiveInt = 16,
) -> ClipReward:
    """CLIP's own logit over 30 (Flow-GRPO)."""
    return ClipReward("clipscore", ClipEncoder(model, revision, processor, device, dtype, batch_size), CLIPSCORE_SCALE)


def hpsv2(
    *,
    model: str = HPSV2,
    revision: str | None = None,
    processor: str = CLIP_H,
    device: Device = "auto",
    dtype: DType = "float32",
    batch_size: PositiveInt = 16,
) -> ClipReward:
    """Human Preference Score v2.1 (2306.09341): the cosine; images are fitted by their longer side, as published.

    The authors publish a pickle. Where loading it is acceptable, convert its tensors to a file for `model`:
    `save_file(torch.load("HPS_v2.1_compressed.pt", weights_only=True)["state_dict"], "hpsv2/model.safetensors")`.
    """
    return ClipReward("hpsv2", ClipEncoder(model, revision, processor, device, dtype, batch_size, pad=True), None)


def aesthetic(
    *,
    model: str = CLIP_L,
    revision: str | None = None,
    head: str = AESTHETIC,
    head_revision: str | None = None,
    device: Device = "auto",
    dtype: DType = "float32",
    batch_size: PositiveInt = 16,
) -> AestheticReward:
    """LAION's improved aesthetic predictor (sac+logos+ava1-l14-linearMSE); `head` is its layers in safetensors."""
    encoder = ClipEncoder(model, revision, None, device, dtype, batch_size)
    return AestheticReward(encoder, head, head_revision)


def safety(
    *,
    model: str = HPSV2,
    revision: str | None = None,
    processor: str | None = CLIP_H,
    strength: float = 0.5,
    safe: str | None = None,
    unsafe: str | None = None,
    device: Device = "auto",
    dtype: DType = "float32",
    batch_size: PositiveInt = 16,
) -> SafetyReward:
    """SafeDiffusion-R1's steering, with `hpsv2`'s model and preprocessing as in its code.

    `safe` and `unsafe` are text files, one phrase per line; default: SAFE and UNSAFE, which are not the authors'.
    """
    encoder = ClipEncoder(model, revision, processor, device, dtype, batch_size, pad=True)
    return SafetyReward(encoder, strength, Path(safe) if safe else SAFE, Path(unsafe) if unsafe else UNSAFE)
