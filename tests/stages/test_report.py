"""The report of a fabricated run with real stores: parts present, parts missing, markup escaped, nothing external."""

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.common.sealed import read_record, write_record
from gdro.evaluation.image_stats import THRESHOLDS
from gdro.evaluation.measure import Measured
from gdro.groups.scoring import score_groups
from gdro.groups.store import GroupStore, GroupWriter, ImageRow
from gdro.rewards.base import Scores
from gdro.stages.evaluate import compare_measured
from gdro.stages.report import report
from tests.run_files import write_metrics

MARKUP = '<script>alert("x")</script> a sign "A&B" <img src=http://example.com/x.png>'
PROMPTS = [Prompt("evil", MARKUP), *(Prompt(f"p{i}", f'a wall with a sign that says "WORD{i}"') for i in range(7))]


class FakeOcr:
    """Named as the OCR reward, with its kind of evidence, random scores."""

    name, version, parallel = "ocr", "1", False

    def check(self, prompts: Sequence[Prompt]) -> None:
        pass

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        values = np.array([np.asarray(image).mean() / 255 for image in images])
        return Scores(values, [{"text": "<b>READ</b>", "confidence": 0.9, "lines": []} for _ in images])


def write_store(folder: Path, images_per_prompt: int, size: tuple[int, int], seed: int) -> np.ndarray:
    """A store of noise images with scores beside it at the folder's place in a run; the scores (P, n)."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in PROMPTS:
        for index in range(images_per_prompt):
            pixels = rng.integers(0, rng.integers(60, 255), (size[1], size[0], 3), dtype=np.uint8)
            rows.append(
                ImageRow(
                    group_id=prompt.id,
                    index=index,
                    prompt=prompt,
                    image=Image.fromarray(pixels),
                    latent=torch.zeros(32, 64),
                    seed=0,
                    scheduler="FlowMatchEulerDiscreteScheduler",
                    num_inference_steps=2,
                    guidance_scale=3.5,
                    max_sequence_length=16,
                    height=size[1],
                    width=size[0],
                    generator="tiny",
                    revision="r",
                    round=0,
                )
            )
    text = {prompt.id: {"prompt_embeds": torch.zeros(1, 4, 8)} for prompt in PROMPTS}
    GroupWriter(folder).write_shard(0, rows, text)
    return np.array([[np.asarray(row.image).mean() / 255 for row in rows]]).reshape(len(PROMPTS), -1)


def measured(rewards: np.ndarray, shift: float) -> Measured:
    rng = np.random.default_rng(0)
    image_stats = {
        name: rng.uniform(0.4, 0.6, (len(rewards), 1 if "diversity" in name else rewards.shape[1])) * (1 + shift)
        for name in THRESHOLDS
    }
    axes = {axis: np.clip(rng.normal(4, 0.3, rewards.shape), 1, 5) for axis in ("alignment", "coherence", "style")}
    ids = [p.id for p in PROMPTS]
    return Measured(ids, ids, rewards, axes, list(axes), image_stats, "boxes")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return fabricate(tmp_path / "run", (64, 32))


def fabricate(run: Path, size: tuple[int, int]) -> Path:
    write_store(run / "groups", 6, size, 0)
    score_groups(FakeOcr(), run / "groups", run / "rewards")
    rewards = {}
    for seed, side in enumerate(("base", "tuned")):
        folder = run / "evaluation" / side
        rewards[side] = write_store(folder, 2, size, seed)
        score_groups(FakeOcr(), folder, folder / "rewards")
    evaluation = {
        "model": "tiny", "revision": "r", "fingerprint": "r+a", "reward": "ocr", "reward_version": "1", "judge": "tiny",
        "judge_version": "1", "seed": 0, "images_per_prompt": 2, "num_inference_steps": 28, "guidance_scale": 3.5,
        "scheduler": "FlowMatchEulerDiscreteScheduler", "bootstrap_samples": 100,
        **compare_measured(measured(rewards["base"], 0), measured(rewards["tuned"], -0.7), samples=100, seed=0,
                           alarm={"step": 30, "on": True, "excess": 0.05}),
    }  # fmt: skip
    write_record(run / "evaluation.json", evaluation)
    rows: list[dict[str, Any]] = [{"step": 0, "validation": {"reward": 0.5, "corrected": 0.4}}]
    rows += [
        {"step": i, "loss": 7 - i / 30, "loss_rank": 6.5 - i / 30, "loss_top1": 0.3, "drift_best": -i, "drift_worst": i,
         "entropy_p": 1.0, "entropy_q": 0.5, "spread_s": 0.1, "grad_norm": 1.0, "images_per_second": 40.0,
         "alarm": i > 19}
        for i in range(1, 31)
    ]  # fmt: skip
    write_metrics(run / "metrics.jsonl", rows, '{"step": 31, "lo')
    write_record(run / "seconds.json", {"sample": 60.0, "score": 20.0, "train": 125.0})
    (run / "config.yaml").write_text("model: tiny # <b>\n")
    return run


class Page(HTMLParser):
    """What a browser would load, run, and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.shown: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "data", "srcset", "poster"):
                self.resources.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def page_of(run: Path) -> tuple[Page, str]:
    path = report(run, run / "rewards" / "ocr.parquet")
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    page.shown = ["".join(page.shown)]
    return page, text


@pytest.mark.slow
def test_everything_is_inside_the_file(run_dir: Path) -> None:
    page, text = page_of(run_dir)
    assert page.resources
    assert all(resource.startswith(("data:image/png;base64,", "#")) for resource in page.resources)
    assert not re.search(r"url\((?!#)|@import|<link|<script|<iframe", text)
    assert "xmlns" not in text
    targets = {resource[1:] for resource in page.resources if resource.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert targets <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_markup_in_prompts_evidence_and_configuration_is_text(run_dir: Path) -> None:
    page, text = page_of(run_dir)
    assert "script" not in page.tags
    assert MARKUP in page.shown[0]
    assert "<b>READ</b>" in page.shown[0]
    assert "model: tiny # <b>" in page.shown[0]
    assert "target “x”" in page.shown[0]
    assert MARKUP not in text


def test_the_headline_says_what_evaluation_json_says(run_dir: Path) -> None:
    page, _ = page_of(run_dir)
    evaluation = read_record(run_dir / "evaluation.json")
    shown = " ".join(page.shown[0].split())
    for name in ("reward", "corrected"):
        result = evaluation["results"][name]
        assert f"{result['base']:.3f} → {result['tuned']:.3f}" in shown
        assert f"{result['gain']:+.3f} 95 % [{result['ci95'][0]:+.3f}, {result['ci95'][1]:+.3f}]" in shown
    assert evaluation["verdict"]["headline"] in shown
    assert "edge density fell 70 %" in shown
    assert "training alarm on at step 30: velocity error of the best images 5.0 % above" in shown
    assert "the alarm was on in 11 of them" in shown
    assert "Cost: 3 min 25 s" in shown
    assert "30 steps, 40 images/s" in shown
    assert page.tags.count("svg") == 7 + 3


@pytest.mark.slow
def test_base_and_tuned_stand_side_by_side_with_their_own_rewards(run_dir: Path) -> None:
    page, _ = page_of(run_dir)
    evaluation = read_record(run_dir / "evaluation.json")
    gains = np.mean(evaluation["tuned"]["reward"], axis=1) - np.mean(evaluation["base"]["reward"], axis=1)
    most = GroupStore(run_dir / "evaluation" / "base").prompt(PROMPTS[int(np.argmax(gains))].id).text
    after = page.shown[0].split("The most improved")[1]
    assert after.index(most) < 40
    assert "Drawn at random" in page.shown[0]
    assert "The most worsened" in page.shown[0]


@pytest.mark.slow
def test_the_same_run_gives_the_same_page(run_dir: Path) -> None:
    assert page_of(run_dir)[1] == page_of(run_dir)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "note"),
    [
        ("evaluation.json", "Not evaluated yet"),
        ("metrics.jsonl", "it has not been trained"),
        ("evaluation", "The images of this evaluation are not in the run's folder."),
        ("rewards", None),
        ("groups", None),
        ("seconds.json", None),
        ("config.yaml", None),
    ],
)
def test_a_missing_part_becomes_a_note(run_dir: Path, missing: str, note: str | None) -> None:
    (run_dir / missing).rename(run_dir.parent / "away")
    page, _ = page_of(run_dir)
    assert note is None or note in page.shown[0]


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path)
    assert "Not evaluated yet" in page.shown[0]
    assert "nan" not in page.shown[0].lower()


def test_no_judge_and_one_prompt_read_as_dashes(run_dir: Path) -> None:
    evaluation = read_record(run_dir / "evaluation.json")
    nothing = {"base": None, "tuned": None, "gain": None, "ci95": [None, None]}
    for name in ("corrected", "alignment", "coherence", "style"):
        evaluation["results"][name] = nothing
        for side in ("base", "tuned"):
            evaluation[side][name] = [[None] * 2 for _ in PROMPTS]
    evaluation["judge"] = None
    write_record(run_dir / "evaluation.json", evaluation)
    page, _ = page_of(run_dir)
    assert "– → –" in " ".join(page.shown[0].split())
    assert "No judge" in page.shown[0]
    assert page.tags.count("svg") == 7 + 2


def test_missing_scores_are_paired_out_and_told(run_dir: Path) -> None:
    """The first prompt has no pair of images with a score in both, the second has one."""
    evaluation = read_record(run_dir / "evaluation.json")
    rewards = {side: np.array(evaluation[side]["reward"]) for side in ("base", "tuned")}
    rewards["base"][0, 0] = rewards["tuned"][0, 1] = rewards["tuned"][1, 0] = np.nan
    sides = measured(rewards["base"], 0), measured(rewards["tuned"], 0.01)
    evaluation |= compare_measured(*sides, samples=100, seed=0)
    write_record(run_dir / "evaluation.json", evaluation)
    shown = " ".join(page_of(run_dir)[0].shown[0].split())
    gains = [t - b for b, t in zip(rewards["base"][2:].mean(1), rewards["tuned"][2:].mean(1), strict=True)]
    gains.append(rewards["tuned"][1, 1] - rewards["base"][1, 1])
    rose = sum(gain > 0 for gain in gains)
    assert f"Prompts where the reward rose {rose} of 7 {7 - rose} fell, 0 unchanged" in shown
    assert "The reward gave no score for 1 base and 2 tuned images" in shown
    assert "nan" not in shown.lower()


class Mixed(FakeOcr):
    """What the run was trained on; the first image of every group has no score."""

    name = "ocr+mine"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        values = np.where(np.arange(len(images)) % 6, np.arange(len(images)) / 10 + 7, np.nan)
        return Scores(values, [{"text": "MIXED"} for _ in images])


def test_training_groups_show_the_reward_trained_on_and_the_round(run_dir: Path) -> None:
    path = score_groups(Mixed(), run_dir / "groups", run_dir / "rewards", batch_size=6, max_missing=0.2)
    (run_dir / "rounds" / "0001").mkdir(parents=True)
    shown = Page(report(run_dir, path).read_text()).shown
    before, after = "".join(shown).split("What it learned from")
    assert "MIXED" not in before
    assert "30 steps in 2 rounds, 40 images/s" in before
    assert "Three groups of the first round drawn" in after
    assert after.count("MIXED") == 3 * 6
    assert after.count("6 images, reward 7.10 to 7.50") == 3
    assert (
        re.findall(r"(?:7\.\d0|–)(?=MIXED)", after.replace("\n", ""))
        == ["7.50", "7.40", "7.30", "7.20", "7.10", "–"] * 3
    )


@pytest.mark.slow
def test_geneval_has_a_table_by_tag(run_dir: Path) -> None:
    evaluation = read_record(run_dir / "evaluation.json")
    assert "color_attr" not in page_of(run_dir)[0].shown[0]
    strict = {"color_attr": 0.123, "overall": None}
    evaluation["geneval"] = {
        "base": strict,
        "tuned": strict | {"color_attr": 0.456},
        "soft": {"base": strict, "tuned": {"color_attr": 0.789, "overall": 0.5}},
    }
    write_record(run_dir / "evaluation.json", evaluation)
    shown = " ".join(page_of(run_dir)[0].shown[0].split())
    assert "color_attr0.1230.456+0.3330.1230.789+0.666" in shown
    assert "overall––––0.500–" in shown


@pytest.mark.slow
def test_large_images_are_embedded_small(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", (400, 300))
    page, text = page_of(run)
    assert any(resource.startswith("data:image/jpeg") for resource in page.resources)
    assert 'width="320" height="240"' in text
    assert len(text) < 6_000_000


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("evaluation.json", "{", "evaluation.json is damaged"),
        ("evaluation.json", "[]", "evaluation.json is damaged"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl:1"),
    ],
)
def test_damaged_files_are_named(run_dir: Path, name: str, content: str, match: str) -> None:
    (run_dir / name).write_text(content)
    with pytest.raises(UserError, match=match):
        report(run_dir, run_dir / "rewards" / "ocr.parquet")


def test_a_missing_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        report(tmp_path / "nowhere", tmp_path / "ocr.parquet")
