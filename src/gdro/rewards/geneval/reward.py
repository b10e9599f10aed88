"""GenEval (Ghosh et al. 2023, 2310.11513): are the objects a prompt asks for there, with number, color and position?

A detector finds objects; pure functions of its detections give the official evaluator's verdict (`geneval_strict`)
and the soft score that trainers use (`geneval`). Detections are the evidence, so both can be recomputed from it.

The soft score is the mean over the parts a record asks for, each in [0, 1], regardless of their order. It differs from
the one that public trainers copy from each other: there, five objects instead of one are worth -3, and a position on
the wrong side counts as two parts, one of them satisfied, which gives .75.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import PositiveInt, ValidationError

from gdro.common.errors import UserError, did_you_mean
from gdro.common.files import fingerprint
from gdro.common.prompts import Prompt
from gdro.rewards.base import Scores
from gdro.rewards.geneval.colors import CLIP, ColorClassifier
from gdro.rewards.geneval.detection import MASK2FORMER, Detector, Record
from gdro.rewards.geneval.rules import assess

TINY_DETECTOR = "gdro.tiny.vision:TinyDetector"  # by name, because it imports this package


@dataclass(frozen=True)
class GenevalReward:
    """The soft score of an image or, with `strict`, the official verdict, 0 or 1.

    Evidence: `detections`, the prompt's `record`, and the results: `correct`, `reasons`, `soft`, `parts`.
    """

    detector: Detector
    strict: bool = False
    rule: ClassVar[str] = "1"

    @property
    def name(self) -> str:
        return "geneval_strict" if self.strict else "geneval"

    @property
    def version(self) -> str:
        return fingerprint(self.name, self.rule, self.detector.name, self.detector.version)

    @property
    def parallel(self) -> bool:
        return self.detector.parallel

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._record(prompt)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        records = [self._record(prompt) for prompt in prompts]
        if len(images) != len(records):
            raise ValueError(f"{len(images)} images came with {len(records)} prompts")
        found = self.detector(images, records)
        verdicts = [assess(detections, record) for detections, record in zip(found, records, strict=True)]
        values = [float(v.correct) if self.strict else v.soft for v in verdicts]
        evidence = [
            {"detections": [d.to_json() for d in detections], "record": record.to_json(), **asdict(verdict)}
            for detections, record, verdict in zip(found, records, verdicts, strict=True)
        ]
        return Scores(np.asarray(values, np.float64), evidence)

    def _record(self, prompt: Prompt) -> Record:
        """The prompt's record; UserError if it has none or asks for something the detector does not know."""
        where = f'reward "{self.name}": prompt "{prompt.id}"'
        try:
            record = Record.model_validate(prompt.fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            found = "nothing" if first["type"] == "missing" else repr(first["input"])
            raise UserError(
                f'{where} has {found} in "{field}" ({first["msg"]}); expected a GenEval record (tag, include, exclude)'
            ) from None
        known = self.detector.classes
        for label in [entry.label for entry in (*record.include, *record.exclude)]:
            if label not in known:
                hint = did_you_mean(label, known)
                if self.detector.name == "tiny" and "expected one of" in hint:  # not a misspelled shape
                    hint = f', which detector "tiny" does not know; set detector, e.g. to {MASK2FORMER}'
                raise UserError(f'{where} asks for the class "{label}"{hint}')
        for i, entry in enumerate(record.include):
            if entry.color is not None and entry.color not in self.detector.colors:
                raise UserError(
                    f'{where} asks for the color "{entry.color}"{did_you_mean(entry.color, self.detector.colors)}'
                )
            if entry.position is not None and not 0 <= entry.position[1] < i:
                raise UserError(
                    f"{where} has include.{i}.position relative to entry {entry.position[1]}; expected an earlier one"
                )
        return record


def geneval(
    *,
    detector: str = "tiny",
    revision: str | None = None,
    clip: str = CLIP,
    clip_revision: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_size: PositiveInt = 8,
) -> GenevalReward:
    """The soft score. `detector` is "tiny", for the tiny world, or the folder or Hub id of a Mask2Former (official:
    MASK2FORMER) or another object detector of transformers; the other options are such a detector's."""
    if detector != "tiny":
        from gdro.rewards.geneval.detectors import TransformersDetector

        namer = ColorClassifier(clip, clip_revision, device, batch_size)
        return GenevalReward(TransformersDetector(detector, namer, revision, device, batch_size))
    for option, value in (("revision", revision), ("clip_revision", clip_revision)):
        if value is not None:
            raise UserError(f'reward "geneval": {option} is {value!r}; expected none with detector "tiny"')
    module, _, name = TINY_DETECTOR.partition(":")
    return GenevalReward(getattr(import_module(module), name)())


def geneval_strict(
    *,
    detector: str = "tiny",
    revision: str | None = None,
    clip: str = CLIP,
    clip_revision: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_size: PositiveInt = 8,
) -> GenevalReward:
    """The official verdict, 0 or 1; same options as `geneval`."""
    soft = geneval(
        detector=detector,
        revision=revision,
        clip=clip,
        clip_revision=clip_revision,
        device=device,
        batch_size=batch_size,
    )
    return GenevalReward(soft.detector, strict=True)
