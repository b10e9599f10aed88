"""GenEval's rules on hand-made detections and their edges, and on the tiny world."""

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.common.rng import numpy_rng
from gdro.rewards.geneval.detection import Detection, Record
from gdro.rewards.geneval.rules import TAGS, assess, kept, relations, summary
from gdro.rewards.registry import load_reward
from gdro.tiny import world
from gdro.tiny.prompts import tiny_prompts


def at(label: str, x: float, y: float, score: float = 0.95, color: str | None = None, size: float = 10) -> Detection:
    return Detection(label, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), score, color)


def record(tag: str, *include: dict[str, Any], exclude: tuple[dict[str, Any], ...] = ()) -> Record:
    return Record.model_validate({"tag": tag, "include": list(include), "exclude": list(exclude)})


def wanted(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **more}


def test_a_score_equal_to_the_threshold_does_not_count() -> None:
    one = record("single_object", wanted("cat"))
    assert not assess([at("cat", 0, 0, 0.3)], one).correct
    assert assess([at("cat", 0, 0, math.nextafter(0.3, 1))], one).correct
    two = record("counting", wanted("cat", 2), exclude=(wanted("cat", 3),))
    assert not assess([at("cat", 0, 0, 0.95), at("cat", 20, 0, 0.9)], two).correct
    assert assess([at("cat", 0, 0, 0.95), at("cat", 20, 0, 0.91)], two).correct


def test_of_equal_scores_the_first_detected_is_the_better() -> None:
    red = record("colors", wanted("cat", color="red"))
    tied = [at("cat", 0, 0, 0.9, "red"), at("cat", 20, 0, 0.9, "blue")]
    assert assess(tied, red).correct
    assert not assess(tied[::-1], red).correct


def test_nothing_found_is_worth_nothing_and_no_error() -> None:
    for tag in TAGS:
        asked = record(tag, wanted("dog", color="red"), wanted("cat", 2, position=["above", 0]))
        nothing = assess([], asked)
        assert (nothing.correct, nothing.soft) == (False, 0)
        assert nothing.reasons == ["expected dog>=1, found 0", "expected cat>=2, found 0"]


def test_the_counting_threshold_is_the_tag_countings_alone() -> None:
    weak = [at("cat", 0, 0, 0.5), at("cat", 20, 0, 0.5)]
    verdicts = {tag: assess(weak, record(tag, wanted("cat", 2))).correct for tag in TAGS}
    assert verdicts == {tag: tag != "counting" for tag in TAGS}


def test_a_class_counts_sixteen_times_at_most_best_first_and_overlaps_count() -> None:
    many = [at("cat", 0, 0, 0.31 + i / 100) for i in range(20)]
    found = kept(many, "single_object")["cat"]
    assert [d.score for d in found] == sorted((d.score for d in many), reverse=True)[:16]


def test_one_object_too_many_is_wrong_only_where_it_is_excluded() -> None:
    """The official *include* wants at least `count`; the soft count wants that number."""
    three = [at("cat", 20 * i, 0) for i in range(3)]
    assert assess(three, record("two_object", wanted("cat", 2))).correct
    counted = assess(three, record("counting", wanted("cat", 2), exclude=(wanted("cat", 3),)))
    assert not counted.correct
    assert counted.soft == 0.5
    assert counted.reasons == ["expected cat<3, found 3"]


def test_the_bugs_of_the_copied_training_reward_are_not_here() -> None:
    """There, five objects for one asked are worth -3, and a position on the wrong side is worth .75."""
    five = assess([at("cat", 20 * i, 0) for i in range(5)], record("single_object", wanted("cat")))
    assert five.soft == 0
    beside = record("position", wanted("dog"), wanted("cat", position=["left of", 0]))
    right = assess([at("dog", 50, 0), at("cat", 0, 0)], beside)
    wrong = assess([at("dog", 0, 0), at("cat", 50, 0)], beside)
    assert (right.correct, right.soft) == (True, 1)
    assert (wrong.correct, wrong.soft) == (False, pytest.approx(2 / 3))
    assert wrong.reasons == ["expected cat left of target, found right of target"]


def test_only_the_best_count_are_looked_at_for_color() -> None:
    red = record("colors", wanted("cat", color="red"))
    best_red = [at("cat", 0, 0, 0.9, "red"), at("cat", 20, 0, 0.8, "blue")]
    best_blue = [at("cat", 0, 0, 0.8, "red"), at("cat", 20, 0, 0.9, "blue")]
    assert assess(best_red, red).correct
    assert not assess(best_blue, red).correct
    assert assess(best_blue, red).parts == [{"class": "cat", "count": 0.0, "color": 0.0}]


def test_a_partly_satisfied_record_is_worth_its_parts() -> None:
    two = record("color_attr", wanted("cat", 2, color="red"), wanted("dog"))
    found = assess([at("cat", 0, 0, color="red")], two)
    assert found.parts == [{"class": "cat", "count": 0.5, "color": 0.5}, {"class": "dog", "count": 0.0}]
    assert found.soft == pytest.approx(1 / 3)
    assert found.reasons == ["expected cat>=2, found 1", "expected dog>=1, found 0"]


def test_an_excluded_class_of_its_own_is_a_part() -> None:
    without = record("single_object", wanted("cat"), exclude=(wanted("dog"),))
    assert assess([at("cat", 0, 0)], without).soft == 1
    both = assess([at("cat", 0, 0), at("dog", 20, 0)], without)
    assert (both.correct, both.soft) == (False, 0.5)


def test_position_needs_a_right_target_and_every_pair() -> None:
    beside = record("position", wanted("dog", color="red"), wanted("cat", 2, position=["right of", 0]))
    cats = [at("cat", 50, 0), at("cat", 80, 0)]
    assert assess([at("dog", 0, 0, color="red"), *cats], beside).correct
    pale = assess([at("dog", 0, 0, color="blue"), *cats], beside)
    assert pale.reasons[-1] == "no target for cat to be right of"
    apart = assess([at("dog", 0, 0, color="red"), at("cat", 50, 0), at("cat", -50, 0)], beside)
    assert not apart.correct
    assert apart.parts[1]["position"] == 0


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((30, 0), {"right of"}),
        ((-30, 0), {"left of"}),
        ((0, 30), {"below"}),
        ((0, -30), {"above"}),
        ((30, 30), {"right of", "below"}),  # (30 - 2) / (30 sqrt 2) = .66
        ((0, 0), set()),
        ((2, 0), set()),  # just the shrinkage of two boxes of 10
        ((2.1, 0), set()),  # .1 / 2.1
        ((4.1, 0), {"right of"}),  # 2.1 / 4.1
        ((4, 0), set()),  # 2 / 4 is not beyond a half
        ((10, 0), {"right of"}),  # touching
        ((30, 20), {"right of"}),  # 18 / 36.06 = .4992
    ],
)
def test_relations(offset: tuple[float, float], expected: set[str]) -> None:
    assert relations(at("a", *offset).box, at("b", 0, 0).box) == expected


def test_the_summary_is_the_unweighted_mean_of_six_tags() -> None:
    tags = [*TAGS, "position", "position"]
    values = np.array([[1, 0], [1, 1], [0, 0], [0, 0], [1, 1], [0, 0], [0, 0], [0, 1]], float)
    found = summary(values, tags)
    assert found["position"] == pytest.approx(0.5)
    assert found["overall"] == pytest.approx((0.5 + 1 + 0 + 0 + 0.5 + 0) / 6)
    assert summary(values[:2], tags[:2])["overall"] is None


def drawn(prompts: list[Prompt]) -> list[Image.Image]:
    return [
        Image.fromarray(world.render(prompt.fields["scene"], numpy_rng(0, "picture", i)))
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_pictures_of_the_world_satisfy_their_records(split: str) -> None:
    """Every tag, classes, colors and relations of the records mean what the world draws."""
    prompts = tiny_prompts(f"tiny:geneval:{split}:60")
    assert {prompt.fields["tag"] for prompt in prompts} == set(TAGS)
    pictures = drawn(prompts)
    for name in ("geneval", "geneval_strict"):
        reward = pickle.loads(pickle.dumps(load_reward(name)))
        reward.check(prompts)
        scores = reward(pictures, prompts)
        wrong = [
            (p.text, e["reasons"], e["parts"]) for p, e in zip(prompts, scores.evidence, strict=True) if e["soft"] < 1
        ]
        assert scores.values.tolist() == [1.0] * len(prompts), wrong


def test_pictures_of_other_scenes_do_not() -> None:
    prompts = tiny_prompts("tiny:geneval:test:60")
    shuffled = prompts[1:] + prompts[:1]
    strict, soft = (load_reward(name)(drawn(shuffled), prompts).values for name in ("geneval_strict", "geneval"))
    assert strict.mean() < 0.2  # a single shape is in many a scene
    assert 0.05 < soft.mean() < 0.5


def test_verdicts_are_recomputed_from_the_evidence() -> None:
    prompts = tiny_prompts("tiny:geneval:test:40")
    scores = load_reward("geneval")(drawn(prompts[1:] + prompts[:1]), prompts)
    for prompt, value, evidence in zip(prompts, scores.values, json.loads(json.dumps(scores.evidence)), strict=True):
        again = assess([Detection.from_json(d) for d in evidence["detections"]], Record.model_validate(prompt.fields))
        assert (again.correct, again.reasons) == (evidence["correct"], evidence["reasons"])
        assert (again.soft, again.parts) == (evidence["soft"], evidence["parts"])
        assert again.soft == value


def test_larger_pictures_are_seen_alike_with_boxes_in_their_own_pixels() -> None:
    prompts = tiny_prompts("tiny:geneval:test:20")
    reward = load_reward("geneval")
    small = drawn(prompts)
    large = [image.resize((256, 128), Image.Resampling.NEAREST) for image in small]
    one, other = reward(small, prompts), reward(large, prompts)
    np.testing.assert_array_equal(one.values, other.values)
    for a, b in zip(one.evidence, other.evidence, strict=True):
        for x, y in zip(a["detections"], b["detections"], strict=True):
            np.testing.assert_allclose(4 * np.array(x["box"]), y["box"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, 'has nothing in "tag"'),
        ({"tag": "single_object"}, 'has nothing in "include"'),
        ({"tag": "coloring", "include": [wanted("circle")]}, "has 'coloring' in \"tag\""),
        ({"tag": "single_object", "include": []}, 'has [] in "include"'),
        ({"tag": "single_object", "include": [{"class": "circle"}]}, 'has nothing in "include.0.count"'),
        ({"tag": "counting", "include": [wanted("circle", 0)]}, 'has 0 in "include.0.count"'),
        ({"tag": "counting", "include": [wanted("circle", "2")]}, "has '2' in \"include.0.count\""),
        ({"tag": "colors", "include": [wanted("circle", tint="red")]}, "has 'red' in \"include.0.tint\""),
        ({"tag": "colors", "include": [wanted("circle", color="rad")]}, 'the color "rad"; did you mean "red"?'),
        ({"tag": "single_object", "include": [wanted("sqare")]}, 'the class "sqare"; did you mean "square"?'),
        (
            {"tag": "position", "include": [wanted("circle", position=["left of", 0])]},
            "include.0.position relative to entry 0; expected an earlier one",
        ),
        (
            {"tag": "position", "include": [wanted("circle"), wanted("square", position=["under", 0])]},
            "has 'under' in \"include.1.position.0\"",
        ),
    ],
)
def test_a_prompt_without_a_sound_record_is_refused(fields: dict[str, Any], message: str) -> None:
    prompts = [*tiny_prompts("tiny:geneval:train:3"), Prompt("odd", "a circle", fields)]
    with pytest.raises(UserError) as error:
        load_reward("geneval").check(prompts)
    assert str(error.value).startswith('reward "geneval": prompt "odd" ')
    assert message in str(error.value)
    assert "\n" not in str(error.value)
