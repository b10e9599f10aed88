"""GenEval's detector on tiny models of the real classes, stored as the Hub stores them; random weights."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import clip_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.rewards.geneval import detectors
from gdro.rewards.geneval.colors import COLORS, ColorClassifier, crop
from gdro.rewards.geneval.detection import Detection, Record
from gdro.rewards.geneval.detectors import TransformersDetector
from gdro.rewards.geneval.reward import geneval, geneval_strict
from gdro.rewards.geneval.rules import assess
from gdro.tiny.prompts import tiny_prompts

NAMES = ["person", "cat", "mouse", "traffic light"]
LABELS: dict[str, Any] = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
IMAGENET = {"do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SMALL = {"shortest_edge": 64, "longest_edge": 128}


def save(model: transformers.PreTrainedModel, folder: Path, processor: dict[str, Any]) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every query sees a cat (p = .93), by its bias; the masks are as random as the weights."""
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        **LABELS,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias.copy_(torch.tensor([0.0, 4.0, 0.0, 0.0, 0.0]))
    size = {"height": 384, "width": 384}
    processor = {"image_processor_type": "Mask2FormerImageProcessor", "size": size, "size_divisor": 32, **IMAGENET}
    return save(model, tmp_path_factory.mktemp("models") / "mask2former", processor)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    tokenizer = clip_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 48, "initializer_factor": 8.0}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8, "initializer_factor": 8.0}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "resample": 3}
    processor |= {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_normalize": True}
    folder = save(transformers.CLIPModel(config), tmp_path_factory.mktemp("models") / "clip", processor)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A softmax over the classes, one of them N/A as in COCO's 91; every query sees a mouse."""
    torch.manual_seed(2)
    names = [*NAMES[:2], "N/A", *NAMES[2:]]
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    model = transformers.DetrForObjectDetection(config)
    with torch.no_grad():
        model.class_labels_classifier.bias.copy_(torch.tensor([0.0, 0.0, 3.0, 3.5, 0.0, 0.0]))
    processor = {"image_processor_type": "DetrImageProcessor", "size": SMALL, **IMAGENET}
    return save(model, tmp_path_factory.mktemp("models") / "detr", processor)


@pytest.fixture(scope="module")
def rt_detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sigmoid a class, names of VOC; every query sees a sofa."""
    torch.manual_seed(3)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[8, 8, 8],
        decoder_in_channels=[16, 16, 16],
        encoder_hidden_dim=16,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=5,
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_denoising=0,
        id2label={0: "traffic light", 1: "sofa"},
        label2id={"traffic light": 0, "sofa": 1},
    )
    model = transformers.RTDetrForObjectDetection(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_embed" in name and name.endswith("bias"):
                parameter.copy_(torch.tensor([-3.0, 1.0]))
    size = {"height": 64, "width": 64}
    processor = {"image_processor_type": "RTDetrImageProcessor", "size": size, "do_normalize": False}
    return save(model, tmp_path_factory.mktemp("models") / "rt_detr", processor)


@pytest.fixture
def small_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask2Former at 64 pixels instead of 800: a hundredth of the time."""
    monkeypatch.setattr(detectors, "INPUT_SIZE", SMALL)


def pictures(count: int, size: tuple[int, int] = (96, 64)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)) for _ in range(count)]
    return [image.resize(size, Image.Resampling.BICUBIC) for image in coarse]


def asks(name: str, color: str | None = None, count: int = 1, tag: str = "colors") -> Prompt:
    entry: dict[str, Any] = {"class": name, "count": count} | ({"color": color} if color else {})
    return Prompt("p", f"a photo of {name}", {"tag": tag, "include": [entry]})


# ---- from a picture to the reward


@pytest.mark.slow
@pytest.mark.usefixtures("small_input")
@pytest.mark.parametrize(("kind", "name"), [("mask2former", "cat"), ("detr", "computer mouse"), ("rt_detr", "couch")])
def test_pictures_become_detections_and_verdicts(
    kind: str, name: str, clip: Path, request: pytest.FixtureRequest
) -> None:
    """The true path, from a folder to the score; evidence is small and gives the score again."""
    folder = str(request.getfixturevalue(kind))
    prompts = [asks(name, "red"), asks(name), asks("traffic light")]
    reward = geneval(detector=folder, clip=str(clip), batch_size=2)
    reward.check(prompts)
    images = pictures(3)
    scores = reward(images, prompts)
    for image, prompt, score, evidence in zip(images, prompts, scores.values, scores.evidence, strict=True):
        found = [Detection.from_json(d) for d in json.loads(json.dumps(evidence))["detections"]]
        assert found
        assert {d.label for d in found} == {name}
        for d in found:
            assert 0.3 < d.score <= 1
            assert 0 <= d.box[0] <= d.box[2] <= image.width
            assert 0 <= d.box[1] <= d.box[3] <= image.height
        assert assess(found, Record.model_validate(prompt.fields)).soft == score
        assert len(json.dumps(evidence)) < 2000
    colored = [[d["color"] is not None for d in e["detections"]] for e in scores.evidence]
    best = int(np.argmax([d["score"] for d in scores.evidence[0]["detections"]]))
    assert [i for i, there in enumerate(colored[0]) if there] == [best]
    assert not any(colored[1] + colored[2])
    strict = geneval_strict(detector=folder, clip=str(clip))
    assert set(strict(images, prompts).values) <= {0.0, 1.0}
    assert strict.name == "geneval_strict"


def test_the_networks_input_is_the_published_one(mask2former: Path, clip: Path) -> None:
    """800 pixels, not the 384 stored with the weights: the masks that come back are a quarter of it."""
    detector = TransformersDetector(str(mask2former), ColorClassifier(str(clip)))
    shapes = []
    detector._network.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.masks_queries_logits.shape)))
    (found,) = detector(pictures(1, (200, 200)), [Record.model_validate(asks("cat").fields)])
    assert shapes == [(1, 6, 200, 200)]
    assert found


@pytest.mark.usefixtures("small_input")
@pytest.mark.parametrize("kind", ["mask2former", "detr"])
def test_neighbors_and_batches_change_nothing(kind: str, clip: Path, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(kind))
    images = [*pictures(3), *pictures(2, (64, 64)), *pictures(2, (96, 64))]
    records = [Record.model_validate(asks("cat", "red", count=2).fields) for _ in images]
    together = TransformersDetector(folder, ColorClassifier(str(clip), batch_size=3), batch_size=4)(images, records)
    one = TransformersDetector(folder, ColorClassifier(str(clip), batch_size=1), batch_size=1)
    assert [len(found) for found in together].count(0) == 0
    for image, record, found in zip(images, records, together, strict=True):
        (alone,) = one([image], [record])
        assert [(d.label, d.color) for d in alone] == [(d.label, d.color) for d in found]
        np.testing.assert_allclose([d.box for d in alone], [d.box for d in found], atol=0.02)
        np.testing.assert_allclose([d.score for d in alone], [d.score for d in found], atol=1e-5)


def test_mask2formers_scores_are_those_of_transformers_at_its_own_resolution(
    mask2former: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of 384 x 384 seen at 384 x 384, where transformers' post-processing resizes as mmdet's does."""
    monkeypatch.setattr(detectors, "INPUT_SIZE", {"shortest_edge": 384, "longest_edge": 384})
    detector = TransformersDetector(str(mask2former), ColorClassifier(str(clip)))
    (image,) = pictures(1, (384, 384))
    (found,) = detector([image], [Record.model_validate(asks("cat").fields)])
    with torch.inference_mode():
        outputs = detector._network(**detector._processor(images=[image], return_tensors="pt"))
    (theirs,) = detector._processor.post_process_instance_segmentation(
        outputs, threshold=0.3, target_sizes=[(384, 384)], return_binary_maps=True
    )
    assert len(found) == len(theirs["segments_info"]) > 2
    np.testing.assert_allclose(
        sorted(d.score for d in found), sorted(s["score"] for s in theirs["segments_info"]), atol=1e-5
    )
    extents = [mask.nonzero() for mask in theirs["segmentation"]]
    boxes = [(*xy.min(0).values.flip(0).tolist(), *(xy.max(0).values.flip(0) + 1).tolist()) for xy in extents]
    assert sorted(d.box for d in found) == sorted(boxes)


# ---- Mask2Former's outputs, by hand


def by_hand(mask2former: Path, clip: Path, classes: torch.Tensor, masks: torch.Tensor) -> list[tuple[Detection, Any]]:
    """Instances of (queries, 5) class probabilities and (queries, 40, 60) mask logits, on a picture of 60 x 40."""
    detector = TransformersDetector(str(mask2former), ColorClassifier(str(clip)))
    return detector._instances(classes.log(), masks, (40, 60), (60, 40))


def rectangle(left: int, top: int, right: int, bottom: int, logit: float = 4.0) -> torch.Tensor:
    mask = torch.full((40, 60), -4.0)
    mask[top:bottom, left:right] = logit
    return mask


def test_a_score_is_the_classs_probability_times_the_masks_certainty(mask2former: Path, clip: Path) -> None:
    classes = torch.tensor([[0.05, 0.8, 0.05, 0.05, 0.05], [0.05, 0.05, 0.6, 0.05, 0.25]])
    masks = torch.stack([rectangle(10, 5, 30, 25), rectangle(0, 0, 60, 40, logit=1.0)])
    found = by_hand(mask2former, clip, classes, masks)
    (cat, cat_mask), (mouse, _) = found
    assert (cat.label, cat.box) == ("cat", (10, 5, 30, 25))
    assert cat.score == pytest.approx(0.8 / (1 + np.exp(-4)))
    assert (mouse.label, mouse.box) == ("computer mouse", (0, 0, 60, 40))
    assert mouse.score == pytest.approx(0.6 / (1 + np.exp(-1)))
    inside = np.asarray(cat_mask)
    assert inside.shape == (40, 60)
    assert inside.sum() == 20 * 20
    assert inside[5:25, 10:30].all()


def test_no_object_weak_and_empty_masks_are_no_detections(mask2former: Path, clip: Path) -> None:
    """The first is "no object"; the second falls below .3 by its mask alone; the third has no pixel."""
    likely = [0.05, 0.8, 0.05, 0.05, 0.05]
    classes = torch.tensor([[0.02, 0.02, 0.02, 0.02, 0.92], [0.1, 0.4, 0.2, 0.1, 0.2], likely])
    masks = torch.stack([rectangle(0, 0, 9, 9), rectangle(0, 0, 9, 9, logit=0.5), torch.full((40, 60), -1.0)])
    assert by_hand(mask2former, clip, classes, masks) == []


def test_a_query_may_be_two_objects_and_overlaps_are_kept(mask2former: Path, clip: Path) -> None:
    classes = torch.tensor([[0.05, 0.45, 0.45, 0.03, 0.02], [0.02, 0.9, 0.02, 0.04, 0.02]])
    masks = torch.stack([rectangle(10, 5, 30, 25), rectangle(10, 5, 30, 25)])
    found = [d for d, _ in by_hand(mask2former, clip, classes, masks)]
    assert sorted(d.label for d in found) == ["cat", "cat", "computer mouse"]
    assert {d.box for d in found} == {(10, 5, 30, 25)}


# ---- colors


def test_the_crop_is_the_box_with_gray_outside_the_mask() -> None:
    image = Image.new("RGB", (20, 10), "red")
    mask = Image.new("1", (20, 10))
    mask.paste(1, (6, 2, 8, 9))
    seen = np.asarray(crop(image, (5, 2, 10, 8), mask))
    assert seen.shape == (6, 5, 3)
    assert (seen[:, 1:3] == (255, 0, 0)).all()
    assert (seen[:, [0, 3, 4]] == 0x99).all()
    assert (np.asarray(crop(image, (5, 2, 10, 8), None)) == (255, 0, 0)).all()


@pytest.mark.parametrize("box", [(3.2, 3.1, 3.3, 3.4), (19.8, 9.9, 20, 10), (20, 10, 20, 10), (0, 0, 0.2, 0.2)])
def test_a_box_smaller_than_a_pixel_is_one_of_the_pictures(box: tuple[float, ...]) -> None:
    assert crop(Image.new("RGB", (20, 10), "red"), box, None).getcolors() == [(1, (255, 0, 0))]


def test_the_color_is_clips_zero_shot_choice_over_three_templates(clip: Path) -> None:
    """Against CLIP's own forward pass, which embeds and normalizes texts and images together."""
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    pixels = transformers.AutoImageProcessor.from_pretrained(clip, backend="pil")
    crops = pictures(12, (40, 32))
    labels = ["cat", "traffic light"] * 6
    expected = []
    for image, label in zip(crops, labels, strict=True):
        classes = []
        for color in COLORS:
            texts = [
                f"a photo of a {color} {label}",
                f"a photo of a {color}-colored {label}",
                f"a photo of a {color} object",
            ]
            tokens = tokenizer(texts, padding=True, return_tensors="pt")
            with torch.inference_mode():
                out = model(**tokens, pixel_values=pixels(images=[image], return_tensors="pt")["pixel_values"])
            mean = out.text_embeds.mean(0)
            classes.append(float(out.image_embeds[0] @ mean / mean.norm()))
        expected.append(COLORS[int(np.argmax(classes))])
    assert ColorClassifier(str(clip), batch_size=5)(crops, labels) == expected
    assert len(set(expected)) > 1


def test_the_best_objects_of_a_class_are_looked_at(mask2former: Path) -> None:
    """The best `count` that pass the tag's threshold, of the class that is asked for in a color."""
    scores = [0.5, 0.95, 0.92, 0.91]
    cats = [Detection("cat", (0, 0, 9, 9), score) for score in scores]
    dog = Detection("dog", (0, 0, 9, 9), 0.99)
    asked = {"include": [{"class": "cat", "count": 2, "color": "red"}, {"class": "dog", "count": 1}]}
    looked_at = detectors.asked_for_color([*cats, dog], Record.model_validate({"tag": "color_attr", **asked}))
    assert looked_at == [1, 2]
    four = {"tag": "counting", "include": [{"class": "cat", "count": 4, "color": "red"}]}
    assert detectors.asked_for_color(cats, Record.model_validate(four)) == [1, 2, 3]


# ---- what is refused before sampling, and versions


def test_classes_have_genevals_names(mask2former: Path, detr: Path, clip: Path) -> None:
    expected = ("person", "cat", "computer mouse", "traffic light")
    for folder in (mask2former, detr):
        assert TransformersDetector(str(folder), ColorClassifier(str(clip))).classes == expected


@pytest.mark.parametrize("option", ["detector", "clip"])
def test_a_missing_folder_is_refused(mask2former: Path, clip: Path, option: str, tmp_path: Path) -> None:
    options = {"detector": str(mask2former), "clip": str(clip)} | {option: str(tmp_path / "nowhere")}
    with pytest.raises(UserError, match=f'reward "geneval": {option}: {tmp_path}/nowhere not found; expected a folder'):
        geneval(**options).check([asks("cat")])


@pytest.mark.parametrize("option", ["detector", "clip"])
def test_a_model_of_the_wrong_class_is_refused(mask2former: Path, clip: Path, option: str) -> None:
    options = (
        {"detector": str(clip), "clip": str(clip)}
        if option == "detector"
        else {
            "detector": str(mask2former),
            "clip": str(mask2former),
        }
    )
    kind = {"detector": "is a CLIPModel", "clip": "is a model of type mask2former"}[option]
    with pytest.raises(UserError, match=f'reward "geneval": {option}: .* {kind}; expected'):
        geneval(**options).check([asks("cat")])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "has no model.safetensors; expected .*, in safetensors"),
        ("config.json", "has no config.json"),
        ("preprocessor_config.json", "does not load as AutoImageProcessor"),
    ],
)
def test_a_model_without_a_file_is_refused(
    mask2former: Path, clip: Path, tmp_path: Path, file: str, message: str
) -> None:
    for option, source in {"detector": mask2former, "clip": clip}.items():
        broken = tmp_path / option
        shutil.copytree(source, broken)
        (broken / file).unlink()
        options = {"detector": str(mask2former), "clip": str(clip)} | {option: str(broken)}
        with pytest.raises(UserError, match=message) as error:
            geneval(**options).check([asks("cat")])
        assert str(error.value).startswith(f'reward "geneval": {option}: ')
        assert "\n" not in str(error.value)


def test_damaged_files_are_told_of(mask2former: Path, clip: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(mask2former, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r'reward "geneval": detector: .*broken does not load as Mask2Former'):
        geneval(detector=str(broken), clip=str(clip))(pictures(1), [asks("cat")])
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"broken/config.json is not JSON"):
        geneval(detector=str(broken), clip=str(clip)).check([asks("cat")])
    config = json.loads((mask2former / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"id2label": {}}))
    with pytest.raises(UserError, match="does not name its classes"):
        geneval(detector=str(broken), clip=str(clip)).check([asks("cat")])


@pytest.mark.slow
def test_weights_that_are_not_in_the_file_are_no_random_ones(mask2former: Path, clip: Path, tmp_path: Path) -> None:
    for option, source in {"detector": mask2former, "clip": clip}.items():
        partial = tmp_path / option
        shutil.copytree(source, partial)
        weights = load_file(partial / "model.safetensors")
        del weights[{"detector": "class_predictor.bias", "clip": "visual_projection.weight"}[option]]
        save_file(weights, partial / "model.safetensors", {"format": "pt"})
        options = {"detector": str(mask2former), "clip": str(clip)} | {option: str(partial)}
        with pytest.raises(UserError, match=f'reward "geneval": {option}: .* lacks 1 weights of a '):
            geneval(**options)(pictures(1), [asks("cat", "red")])


def test_what_the_model_does_not_know_is_refused(mask2former: Path, clip: Path) -> None:
    reward = geneval(detector=str(mask2former), clip=str(clip))
    with pytest.raises(UserError, match='asks for the class "dog"; expected one of cat, computer mouse, person, traf'):
        reward.check([asks("cat"), asks("dog")])
    with pytest.raises(UserError, match='asks for the color "beige"'):
        reward.check([asks("cat", "beige")])
    with pytest.raises(UserError, match=r'prompt ".*" asks for the class'):
        reward.check(tiny_prompts("tiny:geneval:train:3"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has cuda")
def test_a_missing_device_is_refused(mask2former: Path, clip: Path) -> None:
    with pytest.raises(UserError, match='device: "cuda" is not available here'):
        geneval(detector=str(mask2former), clip=str(clip), device="cuda").check([asks("cat")])


def test_a_package_that_is_not_there_is_named(mask2former: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectors, "find_spec", lambda package: None if package == "scipy" else SimpleNamespace())
    with pytest.raises(UserError, match='needs scipy; expected "pip install scipy"'):
        geneval(detector=str(mask2former), clip=str(clip)).check([asks("cat")])


@pytest.mark.parametrize("prompt", [asks("bus", "brown"), asks("cell phone", count=3, tag="counting")])
def test_a_coco_prompt_on_the_tiny_detector_says_what_to_set(prompt: Prompt) -> None:
    name = prompt.fields["include"][0]["class"]
    expected = f'"{name}", which detector "tiny" does not know; set detector, e.g. to facebook/mask2former-swin-small'
    with pytest.raises(UserError, match=expected):
        geneval().check([prompt])


def test_options_of_another_detector_are_refused() -> None:
    with pytest.raises(UserError, match="revision is 'main'; expected none with detector \"tiny\""):
        geneval(revision="main")


def test_the_version_follows_the_weights_and_not_the_batch(mask2former: Path, clip: Path, tmp_path: Path) -> None:
    def version(detector: Path, colors: Path = clip, **options: Any) -> str:
        return geneval(detector=str(detector), clip=str(colors), **options).version

    moved = tmp_path / "moved"
    shutil.copytree(mask2former, moved)
    assert version(moved) == version(mask2former) == version(mask2former, batch_size=3, device="cpu")
    other = tmp_path / "other"
    shutil.copytree(clip, other)
    model = transformers.CLIPModel.from_pretrained(other)
    with torch.no_grad():
        model.visual_projection.weight.add_(1)
    model.save_pretrained(other)
    strict = geneval_strict(detector=str(mask2former), clip=str(clip)).version
    assert len({version(moved), version(moved, other), strict}) == 3


@pytest.mark.slow
def test_making_the_reward_is_cheap(mask2former: Path, clip: Path) -> None:
    """No torch, no transformers, nothing read: not even that the folder is missing."""
    code = (
        "import sys; from gdro.rewards.geneval.reward import geneval; import gdro.rewards.geneval.detectors;"
        'reward = geneval(detector="no/folder/of/that/name"); assert not reward.parallel;'
        'print({"torch", "transformers"} & set(sys.modules))'
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    assert pickle.loads(pickle.dumps(geneval(detector=str(mask2former), clip=str(clip)))).detector.classes
