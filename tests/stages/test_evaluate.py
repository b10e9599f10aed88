"""Evaluation end to end on a very small real FLUX: base against tuned on the same seeds, files, resumption, verdict."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.common.sealed import read_record
from gdro.evaluation.image_stats import THRESHOLDS
from gdro.evaluation.measure import EvaluateConfig, Measured, make_scored, measure
from gdro.groups.sampling import Generation
from gdro.groups.store import GroupStore
from gdro.rewards.base import ImageFailure, Scores
from gdro.rewards.geneval.rules import TAGS
from gdro.rewards.registry import load_judge, load_reward
from gdro.stages.evaluate import compare_measured, evaluate, summary_section
from gdro.tiny.prompts import tiny_prompts

GENERATION = Generation(num_inference_steps=2, max_sequence_length=16, height=32, width=64)
CONFIG = EvaluateConfig(
    prompts="unused", judge=None, images_per_prompt=2, num_inference_steps=2, bootstrap_samples=200, batch_size=3
)
PROMPTS = [Prompt("a", 'a sign "A"'), Prompt("b", 'a sign "B"'), Prompt("c", 'a sign "B"')]


class Redness:
    """A trivial reward: the mean of the red channel."""

    name, version, parallel = "redness", "1", False

    def check(self, prompts: Sequence[Prompt]) -> None:
        if any("bad" in prompt.id for prompt in prompts):
            raise UserError("reward redness: bad prompt")

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        values = np.array([np.asarray(image.convert("RGB"))[..., 0].mean() / 255 for image in images])
        return Scores(values, [{} for _ in images])


class Greenness:
    """A trivial judge: all axes grow with the green channel."""

    name, version = "greenness", "1"

    def check(self, prompts: Sequence[Prompt]) -> None:
        pass

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        green = np.array([np.asarray(image.convert("RGB"))[..., 1].mean() / 255 for image in images])
        return dict.fromkeys(("alignment", "coherence", "style"), 1 + 4 * green)


def adapted(model: Any, seed: int = 0) -> Any:
    """The model with an adapter that changes its velocity."""
    model.add_adapter(rank=2, alpha=4, targets="attention", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(p.shape, generator=generator) for name, p in model.adapter().items()}
    model.load_adapter_state(state)
    return model


def run(model: Any, out: Path, **changes: Any) -> dict[str, Any]:
    arguments = {"prompts": PROMPTS, "reward": Redness(), "judge": Greenness(), **changes}
    return evaluate(CONFIG, model, arguments.pop("prompts"), arguments.pop("reward"), out,
                    seed=3, generation=GENERATION, **arguments)  # fmt: skip


def test_base_and_tuned_share_seeds_and_everything_is_written(flux: Any, tmp_path: Path) -> None:
    model = adapted(flux)
    evaluation = run(model, tmp_path)
    assert read_record(tmp_path / "evaluation.json") == evaluation
    assert evaluation["prompt_ids"] == ["a", "b", "c"]
    stores = {side: GroupStore(tmp_path / "evaluation" / side) for side in ("base", "tuned")}
    for side, store in stores.items():
        for p, prompt in enumerate(PROMPTS):
            pixels = [np.asarray(image, dtype=np.float64) / 255 for image in store.images(prompt.id)]
            reward = np.array([image[..., 0].mean() for image in pixels])
            quality = np.array([1 + 4 * image[..., 1].mean() for image in pixels])
            np.testing.assert_allclose(evaluation[side]["reward"][p], reward)
            np.testing.assert_allclose(evaluation[side]["corrected"][p], reward * (quality - 3) + 0.2)
    base, tuned = (np.array(evaluation[side]["reward"]) for side in ("base", "tuned"))
    assert not np.array_equal(base, tuned)
    result = evaluation["results"]["reward"]
    assert result["gain"] == pytest.approx((tuned - base).mean())
    assert result["ci95"][0] <= result["gain"] <= result["ci95"][1]

    # the adapter switched off and on again is the same model: base images are the untuned model's own
    flux_base = tmp_path / "again"
    with model.adapter_disabled():
        rewards = make_scored(CONFIG, model, PROMPTS, Redness(), flux_base, seed=3, generation=GENERATION)
    again = measure(CONFIG, PROMPTS, Redness(), None, rewards)
    np.testing.assert_array_equal(again.reward, base)
    means = again.means()
    assert means["reward"] == pytest.approx(base.mean())
    assert {"corrected", "style"}.isdisjoint(means)
    assert {"edge_density", "layout_diversity"} <= set(means)


def test_summary_section_has_the_promised_keys(flux: Any, tmp_path: Path) -> None:
    summary = summary_section(run(adapted(flux), tmp_path))
    for name in ("reward", "corrected"):
        assert set(summary[name]) == {"base", "tuned", "gain", "ci95"}
        assert len(summary[name]["ci95"]) == 2
    assert {side: set(axes) for side, axes in summary["judge"].items()} == {
        "base": {"alignment", "coherence", "style"},
        "tuned": {"alignment", "coherence", "style"},
    }


def test_a_rerun_goes_on_and_other_weights_start_over(flux: Any, tmp_path: Path) -> None:
    first = run(adapted(flux), tmp_path)
    files = [next((tmp_path / "evaluation" / side).glob("groups-*.parquet")) for side in ("base", "tuned")]
    written = [path.stat().st_mtime_ns for path in files]
    assert run(flux, tmp_path) == first
    assert [path.stat().st_mtime_ns for path in files] == written
    flux.load_adapter_state({name: -2 * p.detach() for name, p in flux.adapter().items()})
    second = run(flux, tmp_path)
    assert second["base"] == first["base"]
    assert second["tuned"]["reward"] != first["tuned"]["reward"]
    assert files[0].stat().st_mtime_ns == written[0]


def test_images_are_scored_as_many_at_once_as_asked_for(flux: Any, tmp_path: Path) -> None:
    class Counting(Redness):
        sizes: list[int] = []  # noqa: RUF012

        def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
            self.sizes.append(len(images))
            return super().__call__(images, prompts)

    run(adapted(flux), tmp_path, reward=Counting(), score_batch_size=1)
    assert set(Counting.sizes) == {1}


def test_an_adapter_that_changes_nothing_is_said_to(flux: Any, tmp_path: Path) -> None:
    """A fresh LoRA has B = 0."""
    flux.add_adapter(rank=2, alpha=4, targets="attention", seed=0)
    evaluation = run(flux, tmp_path)
    assert evaluation["results"]["reward"]["gain"] == 0
    assert evaluation["verdict"]["outcome"] == "unchanged"
    assert "changes no image" in evaluation["verdict"]["headline"]


def test_without_a_judge_there_is_no_corrected_score(flux: Any, tmp_path: Path) -> None:
    evaluation = run(adapted(flux), tmp_path, judge=None)
    assert evaluation["results"]["corrected"] == {"base": None, "tuned": None, "gain": None, "ci95": [None, None]}
    assert evaluation["corrected_of_means"] == {"base": None, "tuned": None}
    assert evaluation["missing"] == {"base": 6, "tuned": 6}


def test_without_a_judge_the_headline_claims_no_quality() -> None:
    nothing = dict.fromkeys(("alignment", "coherence", "style"), np.full((20, 4), np.nan))
    sides = [replace(measured(reward, 4.0, edges=edges), axes=nothing) for reward, edges in ((0.5, 0.5), (0.8, 0.501))]
    found = compare_measured(sides[0], sides[1], samples=200, seed=0)["verdict"]
    assert found["outcome"] == "improved"
    assert "no judge was asked" in found["headline"]
    assert "hacking" not in found["headline"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["geneval", "geneval_strict"])
def test_geneval_has_its_summary_and_is_corrected_without_alignment(flux: Any, tmp_path: Path, name: str) -> None:
    """Alignment rises with hacking there, so u averages coherence and style."""
    prompts = tiny_prompts("tiny:geneval:test:24")
    evaluation = run(adapted(flux), tmp_path, prompts=prompts, reward=load_reward(name), judge=load_judge("tiny"))
    assert evaluation["corrected_axes"] == ["coherence", "style"]
    assert set(summary_section(evaluation)) == {"verdict", "alarm", "reward", "corrected", "judge"}
    tags = np.array([prompt.fields["tag"] for prompt in prompts])
    for side in ("base", "tuned"):
        reward, coherence, style, corrected = (
            np.array(evaluation[side][field]) for field in ("reward", "coherence", "style", "corrected")
        )
        np.testing.assert_allclose(corrected, reward * ((coherence + style) / 2 - 3) + 0.2)
        found = evaluation["geneval"]["soft" if name == "geneval" else side]
        found = found[side] if name == "geneval" else found
        assert set(found) == {*TAGS, "overall"}
        for tag in TAGS:
            assert found[tag] == pytest.approx(reward[tags == tag].mean())
        assert found["overall"] == pytest.approx(np.mean([found[tag] for tag in TAGS]))
    assert evaluation["text_share_from"] == "strokes"
    assert all(sign["base"] is not None for sign in evaluation["image_stats"].values())


def test_other_rewards_have_no_geneval_summary(flux: Any, tmp_path: Path) -> None:
    assert "geneval" not in run(adapted(flux), tmp_path)


def test_bad_prompts_are_refused_before_sampling(flux: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bad prompt"):
        run(adapted(flux), tmp_path, prompts=[Prompt("bad", "x")])
    assert not (tmp_path / "evaluation").exists()


def test_a_failing_judge_names_the_image(flux: Any, tmp_path: Path) -> None:
    class Failing(Greenness):
        def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
            raise ImageFailure(1, "returned nan")

    with pytest.raises(UserError, match='judge "greenness": image "a/1": returned nan'):
        run(adapted(flux), tmp_path, judge=Failing())


def test_a_judge_that_leaves_too_many_images_without_a_score_stops(flux: Any, tmp_path: Path) -> None:
    class Silent(Greenness):
        def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
            grades = super().__call__(images, prompts)
            return grades | {"style": np.where([prompt.id == "a" for prompt in prompts], np.nan, grades["style"])}

    with pytest.raises(UserError, match=r'judge "greenness" gave 2 of \d+ images no score; expected at most 10 %'):
        run(adapted(flux), tmp_path, judge=Silent())
    assert not (tmp_path / "evaluation.json").exists()
    found = run(adapted(flux), tmp_path, judge=Silent(), max_missing=0.5)
    assert found["missing"] == {"base": 2, "tuned": 2}


def measured(reward: float, quality: float, edges: float = 0.5) -> Measured:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, (20, 4))
    image_stats = dict.fromkeys(THRESHOLDS, 0.5 + noise) | {"edge_density": edges + noise}
    axes = dict.fromkeys(("alignment", "coherence", "style"), quality + noise)
    return Measured(
        prompt_ids=[str(i) for i in range(20)],
        texts=[str(i) for i in range(20)],
        reward=reward + noise,
        axes=axes,
        corrected_axes=["alignment", "coherence", "style"],
        image_stats=image_stats,
        text_share_from="strokes",
    )


@pytest.mark.parametrize(
    ("tuned", "outcome", "line"),
    [
        (measured(0.8, 4.0), "improved", None),
        (measured(0.8, 3.2), "hacked", "corrected score fell"),
        (measured(0.8, 3.6, edges=0.2), "hacked", "edge density fell 60 %"),
        (measured(0.8, 4.0, edges=0.2), "suspect", "edge density fell 60 %"),
        (measured(0.4, 3.2), "damaged", "judged coherence fell by 0.800"),
        (measured(0.5, 4.0 + 1e-9), "unchanged", None),
    ],
)
def test_verdict(tuned: Measured, outcome: str, line: str | None) -> None:
    found = compare_measured(measured(0.5, 4.0 + 1e-9, edges=0.5 + 1e-9), tuned, samples=200, seed=0)["verdict"]
    assert found["outcome"] == outcome
    assert (line is None and found["lines"] == []) or any(line in each for each in found["lines"])


def test_the_training_alarm_is_evidence_of_the_verdict() -> None:
    """It is told whatever the outcome; where a judge looked its finding stands, where none did it is suspect."""
    base, tuned = measured(0.5, 4.0 + 1e-9, edges=0.5 + 1e-9), measured(0.8, 4.0)
    rung = {"step": 150, "on": True, "excess": 0.053}
    line = (
        "training alarm on at step 150: velocity error of the best images 5.3 % above the base's, "
        "so they became less likely"
    )
    found = compare_measured(base, tuned, samples=200, seed=0, alarm=rung)
    assert found["alarm"] == rung
    assert found["verdict"]["outcome"] == "improved"
    assert "without hacking" not in found["verdict"]["headline"]
    assert "although the training alarm was on" in found["verdict"]["headline"]
    assert found["verdict"]["lines"] == [line]
    assert summary_section(found)["verdict"] == found["verdict"]
    assert summary_section(found)["alarm"] == rung

    for side in (base, tuned):
        side.axes.update({name: np.full((20, 4), np.nan) for name in side.axes})
    alone = compare_measured(base, tuned, samples=200, seed=0, alarm=rung)["verdict"]
    assert (alone["outcome"], alone["lines"]) == ("suspect", [line])
    assert alone["headline"] == "The reward rose and no judge was asked, but the training alarm was on."
    off = compare_measured(base, tuned, samples=200, seed=0, alarm=rung | {"on": False})["verdict"]
    assert (off["outcome"], off["lines"]) == ("improved", [])
    worse = compare_measured(measured(0.5, 4.0, edges=0.5 + 1e-9), measured(0.8, 3.2), samples=200, seed=0, alarm=rung)[
        "verdict"
    ]
    assert worse["outcome"] == "hacked"
    assert worse["lines"][-1] == line


def test_one_text_has_no_interval_however_often() -> None:
    base, tuned = measured(0.5, 4.0), measured(0.8, 4.0)
    base.texts[:] = tuned.texts[:] = ["a sign", "A  Sign"] * 10
    found = compare_measured(base, tuned, samples=100, seed=0)
    assert found["distinct_texts"] == 1
    assert all(result["ci95"] == [None, None] for result in found["results"].values())
    assert found["verdict"]["outcome"] == "unchanged"
    assert found["verdict"]["lines"] == ["only one distinct text: no interval, so no change is certain"]


def test_corrected_of_means_is_the_formula_on_means() -> None:
    """r_mean (u_mean - 3) + 0.2 differs from the mean of r (u - 3) + 0.2 by the covariance of r and u."""
    one = measured(0.5, 4.0)
    found = compare_measured(one, one, samples=100, seed=0)
    covariance = np.mean((one.reward - one.reward.mean()) * (one.axes["style"] - one.axes["style"].mean()))
    assert found["results"]["corrected"]["base"] == pytest.approx(found["corrected_of_means"]["base"] + covariance)


def test_missing_judge_scores_leave_their_pairs_out() -> None:
    base, tuned = measured(0.5, 4.0), measured(0.6, 4.0)
    tuned.axes["style"] = np.where(np.arange(80).reshape(20, 4) < 2, np.nan, tuned.axes["style"])
    found = compare_measured(base, tuned, samples=100, seed=0)
    assert found["missing"] == {"base": 0, "tuned": 2}
    assert found["results"]["style"]["gain"] == pytest.approx(0, abs=1e-12)
    assert found["results"]["reward"]["gain"] == pytest.approx(0.1)
