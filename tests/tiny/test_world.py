"""The world: pictures are functions of (scene, generator), captions say what the scene says, splits share nothing."""

from collections import Counter

import numpy as np
import pytest

from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.common.rng import numpy_rng
from gdro.tiny import world
from gdro.tiny.prompts import tiny_prompts


def test_a_picture_is_a_function_of_scene_and_generator():
    scene = world.random_scene(numpy_rng(3, "scene", 0))
    first, again = (world.render(scene, numpy_rng(3, "picture", 0)) for _ in range(2))
    assert first.shape == (32, 64, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)


def test_words_belong_to_one_split_only():
    words = {s: {world.random_word(numpy_rng(0, s, i), s) for i in range(300)} for s in world.SPLITS}
    assert not words["train"] & words["test"]
    assert not words["train"] & words["validation"]
    assert not words["validation"] & words["test"]


def test_pretraining_scenes_hold_training_words_only():
    seen = [world.random_scene(numpy_rng(0, "pretrain", i))["word"] for i in range(500)]
    assert {world.word_split(word) for word in seen if word} == {"train"}


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (
            {"wall": "olive", "word": "BAKE", "objects": [], "position": None},
            'an olive wall with a sign that says "BAKE"',
        ),
        (
            {
                "wall": "gray",
                "word": "BAKE",
                "objects": [{"shape": "cross", "color": "red", "count": 3}],
                "position": None,
            },
            'a gray wall with a sign that says "BAKE" and three red crosses',
        ),
        (
            {
                "wall": "teal",
                "word": None,
                "objects": [
                    {"shape": "circle", "color": None, "count": 1},
                    {"shape": "square", "color": "orange", "count": 1},
                ],
                "position": "left of",
            },
            "a circle left of an orange square on a teal wall",
        ),
    ],
)
def test_captions(scene, text):
    assert world.caption(scene) == text


@pytest.mark.slow
def test_prompts_are_stable_unique_and_split():
    ocr = tiny_prompts("tiny:ocr:test:64")
    assert ocr == tiny_prompts("tiny:ocr:test:64")
    assert len({p.text for p in ocr}) == len({p.id for p in ocr}) == 64
    assert {p.text for p in ocr} != {p.text for p in tiny_prompts("tiny:ocr:test:64:1")}
    assert all(f'"{p.fields["target"]}"' in p.text and world.word_split(p.fields["target"]) == "test" for p in ocr)
    # the very prompts of the published results
    assert fingerprint([p.to_json() for p in ocr]) == "1a74aa3b4bbd"
    assert fingerprint([p.to_json() for p in tiny_prompts("tiny:geneval:test:24")]) == "6aa7230561ac"
    geneval = {split: {p.text for p in tiny_prompts(f"tiny:geneval:{split}:150")} for split in world.SPLITS}
    assert not geneval["train"] & geneval["test"]
    prompts = tiny_prompts("tiny:geneval:test:150")
    assert Counter(p.fields["tag"] for p in prompts) == dict.fromkeys(world.TAGS, 25)
    assert len({p.id for p in prompts}) == 150
    assert (
        len({p.text for p in prompts if p.fields["tag"] == "color_attr"}) == 25
    )  # no caption twice while others are left


def test_geneval_records_place_the_first_noun_relative_to_the_second():
    for prompt in tiny_prompts("tiny:geneval:train:100"):
        if prompt.fields["tag"] == "position":
            reference, placed = prompt.fields["include"]
            relation, index = placed["position"]
            assert index == 0
            assert f"{placed['class']} {relation} a {reference['class']}" in prompt.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tiny:orc:train:4", 'did you mean "ocr"'),
        ("tiny:ocr:tset:4", 'did you mean "test"'),
        ("tiny:ocr:test:0", '"0"'),
        ("tiny:ocr:test:many", '"many"'),
        ("tiny:ocr:test", "tiny:TASK:SPLIT:COUNT"),
        ("tiny:ocr:test:4:x", '"x"'),
        ("tiny:ocr:test:" + "9" * 5000, "1 to 2000"),
        (f"tiny:ocr:test:4:{2**63}", f"from 0 to {2**63 - 1}"),
        ("tiny:ocr:test:4:" + "9" * 5000, "from 0 to"),
    ],
)
def test_bad_specs_name_the_part(spec, message):
    with pytest.raises(UserError, match=None) as error:
        tiny_prompts(spec)
    assert message in str(error.value)


def test_more_prompts_than_captions_are_refused_at_once():
    seen = {world.caption(world.random_shape_scene(numpy_rng(0, tag, i), tag)) for tag in world.TAGS for i in range(99)}
    captions = {world.caption(scene) for scene in world.shape_scenes()}
    assert seen < captions
    here = sum(world.word_split(f"caption:{text}") == "test" for text in captions)
    with pytest.raises(UserError, match=f"asks for 2000 prompts, but the test split has {here} captions"):
        tiny_prompts("tiny:geneval:test:2000")


def test_slips_happen_at_their_rate_and_leave_the_caption_alone():
    """A careless painter: of what a scene leaves to slip, about the asked share differs from the caption."""
    scene = {
        "wall": "gray",
        "word": None,
        "objects": [{"shape": "circle", "color": "red", "count": 3}, {"shape": "cross", "color": None, "count": 1}],
        "position": "left of",
    }
    before = repr(scene)
    slips = [world.with_slips(scene, numpy_rng(0, "slips", i), 0.0, 0.5) for i in range(2000)]
    assert repr(scene) == before
    first, second = ([one["objects"][i] for one in slips] for i in (0, 1))
    shares = {
        "count": np.mean([item["count"] != 3 for item in first]),
        "position": np.mean([one["position"] == "right of" for one in slips]),
        "shape": np.mean([item["shape"] != "circle" for item in first]) / (3 / 4),
        "color": np.mean([item["color"] != "red" for item in first]) / (6 / 7),
    }
    assert all(share == pytest.approx(0.5, abs=0.05) for share in shares.values()), shares
    assert {item["count"] for item in first} == {2, 3, 4}
    assert {(item["color"], item["count"]) for item in second} == {(None, 1)}
    assert world.with_slips(scene, numpy_rng(0, "slips", 0), 0.0) == scene
