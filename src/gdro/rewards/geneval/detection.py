"""What a GenEval prompt asks for, what a detector finds, and the protocol of detectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"  # of the official detector


class Excluded(BaseModel):
    """Fewer than `count` objects of a class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str = Field(alias="class")
    count: int = Field(ge=1, strict=True)


class Included(Excluded):
    """At least `count` objects of a class, optionally of a color and placed relative to an earlier entry."""

    color: str | None = None
    position: tuple[Literal["left of", "right of", "above", "below"], int] | None = None


class Record(BaseModel):
    """What a GenEval prompt asks for. Other fields of the prompt are ignored."""

    model_config = ConfigDict(frozen=True)

    tag: Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    include: list[Included] = Field(min_length=1)
    exclude: list[Excluded] = []

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)


@dataclass(frozen=True)
class Detection:
    """A detected object: class, box (left, top, right, bottom) in pixels, score in [0, 1], color if determined."""

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"class": self.label, "box": list(self.box), "score": self.score, "color": self.color}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Detection":
        return cls(value["class"], tuple(value["box"]), value["score"], value["color"])


class Detector(Protocol):
    """Finds objects of its `classes` with any score above THRESHOLD; nothing else looks at the pixels."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Changes whenever the same image could get different detections."""
        ...

    @property
    def parallel(self) -> bool:
        """Like `Reward.parallel`."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """The classes it knows; UserError if the detector cannot work. Called before sampling."""
        ...

    @property
    def colors(self) -> Sequence[str]: ...

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Record]) -> list[list[Detection]]:
        """Detections of each image; for a class that the record wants in a color, the best `count` have a color.

        Raises ImageFailure for an image it fails on.
        """
        ...
