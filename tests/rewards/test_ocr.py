"""The OCR reward: the published rule by hand, and the engine on pictures whose text is known."""

import numpy as np
import pytest
from PIL import Image
from renders import poster, sign

from gdro.errors import UserError
from gdro.prompts import Prompt
from gdro.rewards.base import ImageFailure
from gdro.rewards.ocr import OcrReward, _new_engine, ocr_score, target_text

RULE = [
    # recognised, target, published, strict; d = edit distance, n = length of the target
    ("hello", "hello", 1.0, 1.0),
    ("HeLLo", "hello", 1.0, 1.0),
    ("he l lo", "hel lo", 1.0, 1.0),
    ("hallo", "hello", 0.8, 0.8),  # d = 1, n = 5
    ("", "hello", 0.0, 0.0),
    ("hell", "hello", 0.8, 0.8),
    ("xyzzy", "open", 0.0, 0.0),  # d = 5 is cut to n = 4
    ("openxx", "open", 1.0, 0.5),  # the substring rule's hole: strict has d = 2
    ("a very long text with open in it", "open", 1.0, 0.0),
    ("opne", "open", 0.5, 0.5),  # a swap is two edits
    ("o p e n", "open", 1.0, 1.0),
    ("ab", "a", 1.0, 0.0),
    ("STRASSE", "straße", 2 / 3, 2 / 3),  # d = 2, n = 6: lower case, not case folding
]


@pytest.mark.parametrize(("recognised", "target", "published", "strict"), RULE)
def test_rule(recognised: str, target: str, published: float, strict: float) -> None:
    assert ocr_score(recognised, target) == pytest.approx(published)
    assert ocr_score(recognised, target, strict=True) == pytest.approx(strict)


def test_rule_needs_a_target() -> None:
    with pytest.raises(ValueError, match="empty"):
        ocr_score("text", "  ")


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ('"first" and "second"', "first"),
        ("a sign that says “Café au lait”.", "Café au lait"),
        ('mixed “marks"', "marks"),
        ("German „Halt“ here", "Halt"),
        ("it's \"don't\"", "don't"),
    ],
)
def test_target_is_the_first_quoted_text(prompt: str, target: str) -> None:
    assert target_text(prompt) == target


@pytest.mark.parametrize("prompt", ["no quotes", 'one " only', 'empty ""', 'only spaces "  "', "'single quotes'", ""])
def test_prompt_without_target_is_refused_before_scoring(prompt: str) -> None:
    with pytest.raises(UserError, match=r'reward "ocr": prompt "p7": prompt '):
        OcrReward().check([Prompt("ok", '"fine"'), Prompt("p7", prompt)])


WORDS = ["OPEN", "CAFE", "BOOK", "TAXI", "WEST", "HARP", "MUSK", "ZERO", "LAMB", "FROG", "DUNE", "VEST"]


@pytest.fixture(scope="module")
def signs() -> tuple[list[Image.Image], list[Prompt]]:
    images = [sign(word, i) for i, word in enumerate(WORDS)]
    return images, [Prompt(str(i), f'a sign that says "{word}"') for i, word in enumerate(WORDS)]


def test_small_signs_are_read(signs: tuple[list[Image.Image], list[Prompt]]) -> None:
    scores = OcrReward()(*signs)
    assert scores.values.mean() >= 0.98
    assert all(0.5 <= e["confidence"] <= 1 for e in scores.evidence)
    assert [e["text"].replace(" ", "").upper() for e in scores.evidence].count("OPEN") == 1


def test_a_score_depends_on_its_image_only(
    signs: tuple[list[Image.Image], list[Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of every size and any order, and several threads, give the evidence of one at a time, bit for bit."""
    images = [*signs[0], poster(["HELLO WORLD"], (320, 160)), Image.new("RGB", (64, 32), "white")]
    prompts = [*signs[1], Prompt("x", '"hello world"'), Prompt("y", '"nothing"')]
    reward = OcrReward()
    alone = [reward([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    together = reward(images[::-1], prompts[::-1])
    assert together.evidence[::-1] == [one.evidence[0] for one in alone]
    assert together.values[::-1].tolist() == [one.values[0] for one in alone]


def test_blank_image_scores_zero_with_its_evidence() -> None:
    scores = OcrReward()([Image.new("RGB", (64, 32), "red")], [Prompt("p", '"OPEN"')])
    assert scores.values.tolist() == [0.0]
    assert scores.evidence == [{"text": "", "confidence": None, "lines": []}]


def test_lines_of_a_large_image_are_read_in_order() -> None:
    image = poster(["GOOD MORNING", "little bird"], (640, 480))
    prompt = Prompt("p", 'a poster with "good morning little bird"')
    scores = OcrReward(strict=True)([image], [prompt])
    assert scores.values.tolist() == [1.0]
    lines = scores.evidence[0]["lines"]
    assert len(lines) >= 2
    boxes = np.array([box for _, _, box in lines])
    assert boxes.shape[1:] == (4, 2)
    assert (boxes.min((0, 1)) >= 0).all()
    assert (boxes.max((0, 1)) <= (640, 480)).all()


def test_strict_reward_closes_the_substring_hole() -> None:
    image = poster(["XOPENX"], (320, 160))
    prompt = [Prompt("p", '"OPEN"')]
    assert OcrReward()([image], prompt).values.tolist() == [1.0]
    assert OcrReward(strict=True)([image], prompt).values.tolist() == [0.5]


def test_names_and_versions_differ() -> None:
    assert (OcrReward().name, OcrReward(strict=True).name) == ("ocr", "ocr_strict")
    assert OcrReward().version == OcrReward().version != OcrReward(strict=True).version


def test_engine_failure_is_never_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that fails on the second image: its own session is made to refuse the picture's size."""
    engine = _new_engine()
    session = engine._load_det_model().session
    run = session.session.run

    class Refusing:
        def __getattr__(self, name: str) -> object:
            return getattr(inner, name)

        def run(self, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            if next(iter(feeds.values())).shape[-1] == 96:
                raise RuntimeError("out of memory")
            return run(outputs, feeds)

    inner, session.session = session.session, Refusing()
    monkeypatch.setattr("gdro.rewards.ocr._idle", [engine])
    images = [sign("OPEN"), Image.new("RGB", (96, 64))]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(ImageFailure, match=r"image 1 of the batch: RapidOCR failed .*out of memory") as failure:
        OcrReward()(images, [Prompt("p", '"OPEN"')] * 2)
    assert failure.value.index == 1
