"""The judge falls when a picture loses what its prompt asked for, its detail or its cleanliness."""

import cv2
import numpy as np
import pytest
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.common.rng import numpy_rng
from gdro.tiny import world
from gdro.tiny.judge import TinyJudge
from gdro.tiny.prompts import tiny_prompts
from gdro.tiny.vision import TinyDetector, see

COUNT = 48
AXES = ("alignment", "coherence", "style")


def pictures(prompts, change=lambda scene: scene):
    return [world.render(change(p.fields["scene"]), numpy_rng(1, "picture", i)) for i, p in enumerate(prompts)]


def grade(prompts, images):
    grades = TinyJudge()([Image.fromarray(image) for image in images], prompts)
    assert set(grades) == set(AXES)
    assert all(((g >= 1) & (g <= 5)).all() for g in grades.values())
    return {axis: float(grades[axis].mean()) for axis in AXES}


def noise(image, std):
    grain = numpy_rng(0, "grain").normal(0, std, image.shape)
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def oversized(image):
    """The middle of the picture stretched over all of it: a sign larger than it should be."""
    return np.asarray(Image.fromarray(image).crop((12, 2, 52, 22)).resize((64, 32)))


DAMAGE = {
    "blur": (lambda image: cv2.GaussianBlur(image, (0, 0), 1.0), ("coherence", "style")),
    "noise": (lambda image: noise(image, 30), ("coherence", "style")),
    "grain": (lambda image: noise(image, 12), ("style",)),
    "wrong colors": (lambda image: image[:, :, [2, 0, 1]], ("alignment",)),
    "no color": (lambda image: image.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8), ("alignment",)),
    "oversized": (oversized, ("alignment", "style")),
    "black": (lambda image: image * 0, AXES),
}


@pytest.mark.parametrize("task", ["ocr", "geneval"])
def test_true_pictures_are_graded_high(task):
    prompts = tiny_prompts(f"tiny:{task}:validation:{COUNT}")
    assert min(grade(prompts, pictures(prompts)).values()) > 4.6


@pytest.mark.slow
@pytest.mark.parametrize("tag", world.TAGS)
def test_true_pictures_of_every_tag_are_graded_near_the_top(tag):
    """And slightly soft ones, as a trained model draws them, are still well-formed pictures of the world."""
    prompts = [p for p in tiny_prompts("tiny:geneval:train:150") if p.fields["tag"] == tag]
    clean = pictures(prompts)
    assert min(grade(prompts, clean).values()) > 4.7
    assert grade(prompts, [cv2.GaussianBlur(image, (0, 0), 0.5) for image in clean])["coherence"] > 4.5


def patch(height, width):
    """A red patch where a red square was asked for."""
    image = world.draw_wall("gray")
    image[4 : 4 + height, 4 : 4 + width] = world.COLORS["red"]
    return Image.fromarray(image.astype(np.uint8))


def test_a_patch_of_another_size_is_a_malformed_square():
    scene = {"wall": "gray", "word": None, "objects": [{"shape": "square", "color": "red", "count": 1}]}
    prompt = Prompt("0", "a red square on a gray wall", {"scene": {**scene, "position": None}})
    sizes = [(10, 10), (7, 7), (5, 5), (16, 16), (22, 22), (10, 19), (10, 55)]
    grades = TinyJudge()([patch(*size) for size in sizes], [prompt] * len(sizes))
    for axis, loss in (("alignment", 0.5), ("coherence", 0.4)):
        assert grades[axis][0] > 4.7
        assert (grades[axis][1:] < grades[axis][0] - loss).all(), (axis, grades[axis])
        assert grades[axis][1] > grades[axis][2]
        assert grades[axis][3] > grades[axis][4]


def test_a_bar_is_no_shape_of_any_kind():
    kinds = [[d.label for d in found] for found in TinyDetector()([patch(10, 20), patch(10, 21), patch(25, 10)], [])]
    assert kinds == [["square"], [], []]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ocr", "geneval"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_lowers_the_axes_it_should(task, damage):
    prompts = tiny_prompts(f"tiny:{task}:validation:{COUNT}")
    clean = pictures(prompts)
    spoil, axes = DAMAGE[damage]
    before, after = grade(prompts, clean), grade(prompts, [spoil(image) for image in clean])
    for axis in axes:
        assert after[axis] < before[axis] - 0.3, (axis, before, after)
    assert sum(after.values()) < sum(before.values()) - 0.5


def test_missing_shapes_lower_alignment():
    prompts = [p for p in tiny_prompts(f"tiny:ocr:validation:{3 * COUNT}") if p.fields["scene"]["objects"]]
    clean = grade(prompts, pictures(prompts))
    bare = grade(prompts, pictures(prompts, lambda scene: {**scene, "objects": []}))
    assert bare["alignment"] < clean["alignment"] - 0.5


def test_a_sign_nobody_asked_for_lowers_alignment():
    prompts = [p for p in tiny_prompts(f"tiny:geneval:validation:{COUNT}") if p.fields["tag"] == "single_object"]
    plain = grade(prompts, pictures(prompts))
    signed = grade(prompts, pictures(prompts, lambda scene: {**scene, "word": "BAKE"}))
    assert signed["alignment"] < plain["alignment"] - 0.3


def test_the_word_itself_does_not_matter():
    """It must not reward what the OCR reward rewards: another word of the same length is graded alike."""
    prompts = tiny_prompts(f"tiny:ocr:validation:{COUNT}")
    other = {3: "BAT", 4: "BATS"}
    right = grade(prompts, pictures(prompts))
    wrong = grade(prompts, pictures(prompts, lambda scene: {**scene, "word": other[len(scene["word"])]}))
    for axis in AXES:
        assert abs(right[axis] - wrong[axis]) < 0.1


def test_it_sees_what_was_drawn():
    scene = {
        "wall": "teal",
        "word": "BAKE",
        "objects": [{"shape": "cross", "color": "red", "count": 2}],
        "position": None,
    }
    seen = see(world.render(scene, numpy_rng(0, "picture", 0)))
    assert seen.wall == "teal"
    assert seen.sign is not None
    assert [(s.kind, s.color) for s in seen.shapes] == [("cross", "red")] * 2


def test_a_prompt_without_a_scene_is_refused():
    with pytest.raises(UserError, match='prompt "7" has no "scene"'):
        TinyJudge().check([Prompt("7", "a cat")])
