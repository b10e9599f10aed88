"""GenEval's detector for real images, using only transformers.

The official evaluator's networks are Mask2Former Swin-S (mmdet's weights) and CLIP ViT-L/14. Here CLIP's weights are
the same and Mask2Former's are its authors' own, so scores are close to the official ones but not equal. Everything
after the networks follows mmdet and the official script: scores, masks, boxes, crops, colors. transformers' own
post-processing (every mask at 384 x 384) is not used, nor is the input size stored with the Hub's weights (384 x 384;
they were trained and published at 800).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any, ClassVar

from PIL import Image

from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.common.hub import Source
from gdro.common.images import to_rgb
from gdro.rewards.geneval.colors import COLORS, ColorClassifier, crop
from gdro.rewards.geneval.detection import MASK2FORMER, Detection, Record
from gdro.rewards.geneval.rules import THRESHOLD, kept
from gdro.rewards.neural import pretrained

INPUT_SIZE = {"shortest_edge": 800, "longest_edge": 1333}  # pixels, for Mask2Former; other detectors have their own
MOST_PER_IMAGE = 100  # (query, class) pairs that Mask2Former may report
# GenEval's names for COCO classes that the Hub's detectors name differently: by COCO's names, RT-DETR also by VOC's.
GENEVAL_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
FIELD = 'reward "geneval": detector'
_SEGMENTER = "Mask2FormerForUniversalSegmentation"
_EXPECTED = f"a folder or a Hub id of a {_SEGMENTER} or an object detector, such as {MASK2FORMER}"

_Seen = tuple[Detection, Image.Image | None]  # with its mask, at the image's size, if the model makes masks


@dataclass(frozen=True)
class TransformersDetector:
    """A `Detector`: Mask2Former, or any AutoModelForObjectDetection, whose crops have no mask.

    `batch_size` images of one size go through the network at once: nothing is padded, so no image's detections depend
    on its neighbors. Float32; weights are loaded on the first call.
    """

    model: str
    colorist: ColorClassifier
    revision: str | None = None
    device: pretrained.Device = "auto"
    batch_size: int = 8
    parallel: ClassVar[bool] = False
    colors: ClassVar[Sequence[str]] = COLORS

    @property
    def name(self) -> str:
        return self._architecture

    @property
    def version(self) -> str:
        weights = (self._found[0].version, self.colorist.version)
        return fingerprint("rule 1", weights, INPUT_SIZE, sorted(self._labels.items()))

    @cached_property
    def classes(self) -> Sequence[str]:
        """The model's classes, by GenEval's names. Raises UserError if a model, a package or the device is missing or
        of the wrong kind; does not read the weights."""
        pretrained.torch_device(self.device)
        _ = self._processor
        self.colorist.check()
        return tuple(self._labels.values())

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Record]) -> list[list[Detection]]:
        """Detections above THRESHOLD, boxes in pixels; the best `count` of a class wanted in a color have a color."""
        pictures = [to_rgb(image) for image in images]
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, picture in enumerate(pictures):
            by_size.setdefault(picture.size, []).append(i)
        found: list[list[Detection]] = [[] for _ in pictures]
        asked: list[tuple[int, int]] = []  # (image, detection) whose color is needed
        crops: list[Image.Image] = []
        for same in by_size.values():
            for start in range(0, len(same), self.batch_size):
                batch = same[start : start + self.batch_size]
                for i, seen in zip(batch, self._detect([pictures[i] for i in batch]), strict=True):
                    found[i] = [detection for detection, _ in seen]
                    for place in asked_for_color(found[i], records[i]):
                        asked.append((i, place))
                        crops.append(crop(pictures[i], found[i][place].box, seen[place][1]))
        colors = self.colorist(crops, [found[i][place].label for i, place in asked])
        for (i, place), color in zip(asked, colors, strict=True):
            found[i][place] = replace(found[i][place], color=color)
        return found

    def _detect(self, images: Sequence[Image.Image]) -> list[list[_Seen]]:
        """The detections in each of these images of one size."""
        import torch

        size = {"size": INPUT_SIZE} if self._makes_masks else {}
        inputs = self._processor(images=list(images), return_tensors="pt", **size).to(self._network.device)
        with torch.inference_mode():
            outputs = self._network(**inputs)
            if self._makes_masks:
                each = zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
                return [self._instances(*one, inputs["pixel_values"].shape[-2:], images[0].size) for one in each]
        width, height = images[0].size
        found = self._processor.post_process_object_detection(
            outputs, threshold=THRESHOLD, target_sizes=[(height, width)] * len(images)
        )
        return [self._boxes(one, images[0].size) for one in found]

    def _instances(self, classes: Any, masks: Any, input_size: Sequence[int], size: tuple[int, int]) -> list[_Seen]:
        """mmdet's instance post-processing of one image: class logits (queries, 1 + classes), masks' (queries, h, w).

        The best MOST_PER_IMAGE (query, class) pairs. A mask is where the logits, resized to the network's input and
        then to the image, are positive; the score is the class's probability times the mean sigmoid inside the mask;
        the box is the mask's extent.
        """
        from torch.nn.functional import interpolate

        probabilities = classes.softmax(-1)[:, :-1]  # the last class is "no object"
        values, pairs = probabilities.flatten().topk(min(MOST_PER_IMAGE, probabilities.numel()))
        pairs = pairs[values > THRESHOLD]  # the mask only lowers a score, so no other can pass
        if not len(pairs):
            return []
        logits = masks[pairs // probabilities.shape[1]][None]
        for shape in (tuple(input_size), size[::-1]):
            logits = interpolate(logits, shape, mode="bilinear", align_corners=False)
        inside = logits[0] > 0
        certainty = (logits[0].sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        scores = values[: len(pairs)] * certainty
        seen: list[_Seen] = []
        for i in (scores > THRESHOLD).nonzero().flatten().tolist():
            label = self._labels.get(int(pairs[i]) % probabilities.shape[1])
            if label is not None:
                columns, rows = (inside[i].any(axis).nonzero().flatten() for axis in (0, 1))
                box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
                seen.append((Detection(label, box, float(scores[i])), Image.fromarray(inside[i].cpu().numpy())))
        return seen

    def _boxes(self, found: dict[str, Any], size: tuple[int, int]) -> list[_Seen]:
        """The detections in {"labels" (n,), "scores" (n,), "boxes" (n, 4)}, clipped to the image."""
        seen: list[_Seen] = []
        for index, score, box in zip(*(found[key].tolist() for key in ("labels", "scores", "boxes")), strict=True):
            label = self._labels.get(index)
            if label is not None:
                left, top, right, bottom = (round(min(max(v, 0), size[i % 2]), 2) for i, v in enumerate(box))
                seen.append((Detection(label, (left, top, right, bottom), score), None))
        return seen

    @cached_property
    def _found(self) -> tuple[Source, dict[str, Any]]:
        return pretrained.find(self.model, self.revision, field=FIELD, expected=_EXPECTED)

    @cached_property
    def _architecture(self) -> str:
        from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as DETECTORS

        config = self._found[1]
        name = (config.get("architectures") or ["model without an architecture"])[0]
        if name != _SEGMENTER and name not in DETECTORS.values():
            raise UserError(f"{FIELD}: {self.model} is a {name}; expected {_EXPECTED}")
        for package, needed in (("scipy", name == _SEGMENTER), ("timm", config.get("use_timm_backbone", False))):
            if needed and find_spec(package) is None:
                raise UserError(f'{FIELD}: {self.model}, a {name}, needs {package}; expected "pip install {package}"')
        return name

    @property
    def _makes_masks(self) -> bool:
        return self._architecture == _SEGMENTER

    @cached_property
    def _labels(self) -> dict[int, str]:
        """Class index -> GenEval's name of the class."""
        labels = self._found[1].get("id2label")
        if not labels:
            raise UserError(f'{FIELD}: {self.model} does not name its classes; expected "id2label" in config.json')
        return {int(i): GENEVAL_NAMES.get(name, name) for i, name in labels.items() if name != "N/A"}

    @cached_property
    def _processor(self) -> Any:
        _ = self._architecture, self._labels
        return pretrained.image_processor(self._found[0], field=FIELD)

    @cached_property
    def _network(self) -> Any:
        import transformers

        kind = getattr(transformers, _SEGMENTER if self._makes_masks else "AutoModelForObjectDetection")
        return pretrained.network(kind, self._found[0], field=FIELD, device=self.device)


def asked_for_color(detections: Sequence[Detection], record: Record) -> list[int]:
    """Indices of the detections whose color the rules use: per class, the best `count` of those that count."""
    found = kept(detections, record.tag)
    looked_at = [id(d) for entry in record.include if entry.color for d in found.get(entry.label, [])[: entry.count]]
    return [place for place, detection in enumerate(detections) if id(detection) in looked_at]
