"""The OCR reward: the published rule by hand, and the engines on pictures whose text is known.

`cjk_sign.png` says 今日特价 and こんにちは on two lines (Droid Sans Fallback). PaddleOCR's tests run where it is
installed; its models are RapidOCR's, so they need no network.
"""

import importlib.util
import pickle
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from renders import poster, sign

from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.common.prompts import Prompt
from gdro.rewards.base import ImageFailure
from gdro.rewards.ocr import engines as ocr_engines
from gdro.rewards.ocr.engines import RAPIDOCR, paddleocr, rapidocr
from gdro.rewards.ocr.reward import OcrReward, ocr, ocr_score, ocr_strict, quoted_text, target_of

PADDLE = all(importlib.util.find_spec(package) for package in ("paddleocr", "paddle"))

RULE = [
    # recognized, target, published, strict; d = edit distance, n = length of the target
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
    ("今日特价", "今日特价", 1.0, 1.0),
    ("今天特价", "今日特价", 0.75, 0.75),
    ("good\nmorning", "Good　Morning", 1.0, 1.0),  # white space of any kind, lines too
    ("OPEN", "ＯＰＥＮ", 0.0, 0.0),  # as published: characters as they are
    ("don't", "don’t", 0.8, 0.8),
]


@pytest.mark.parametrize(("recognized", "target", "published", "strict"), RULE)
def test_rule(recognized: str, target: str, published: float, strict: float) -> None:
    assert ocr_score(recognized, target) == pytest.approx(published)
    assert ocr_score(recognized, target, strict=True) == pytest.approx(strict)


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
        ("it’s “don’t walk”", "don’t walk"),
        ("two lines “GOOD\nMORNING”", "GOOD\nMORNING"),
        ("reversed ”Hej“", "Hej"),
        ('straight marks pair as published "a “b” c" d', "a “b” c"),
        ('“He said "hi" there”', 'He said "hi" there'),
        ("“one “inner” rest” and “two”", "one “inner” rest"),
        ('“one" and “two”', "one"),
        ("„A“ und „B“", "A"),
        ("海报上写着「今日特价」，旁边是「营业中」", "今日特价"),
        ("看板に「外『内』外」とある", "外『内』外"),
        ("本は『坊っちゃん』", "坊っちゃん"),
        ("写着＂你好＂", "你好"),
        ("写着“你好，世界”", "你好，世界"),
        ("半角｢カフェ｣", "カフェ"),
        ('a 5" sign 「営業中」', "営業中"),
        ('「broken』 and "ok"', "ok"),
        ('first 「OPEN "24h"」 then "no"', 'OPEN "24h"'),
    ],
)
def test_target_is_the_first_quoted_text(prompt: str, target: str) -> None:
    assert quoted_text(prompt) == target


@pytest.mark.parametrize(
    "prompt",
    ["no quotes", 'one " only', 'empty ""', 'only spaces "  "', "'single quotes'", "", "「」", "「 open", "《书名》"],
)
def test_prompt_without_target_is_refused_before_scoring(prompt: str) -> None:
    with pytest.raises(UserError, match=r'reward "ocr": prompt "p7": prompt '):
        OcrReward().check([Prompt("ok", '"fine"'), Prompt("p7", prompt)])


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ('a 12" record that says "HELLO"', "3 double quotes, an odd number"),
        ('"HELLO" on a 12" record', "3 double quotes, an odd number"),
        ('a 12" record that says “HELLO”', "3 double quotes, an odd number"),
        ("a 12” record that says “HELLO”", "3 double quotes, an odd number"),
        ('say "HELLO and “BYE”', "3 double quotes, an odd number"),
        ('a 12" by 8" sign that says "HELLO"', "a double quote after the digit 2, as if for inches"),
        ('a 3½" badge 2" high that says “HI”', "a double quote after the digit ½, as if for inches"),
        (r"a sign that says \"SALE\"", "a backslash before its first double quote"),
    ],
)
def test_marks_that_can_be_read_in_two_ways_are_refused(prompt: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        OcrReward().check([Prompt("p7", prompt)])
    assert str(error.value).startswith(f'reward "ocr": prompt "p7": prompt {prompt!r} has ')
    assert told in str(error.value)
    assert str(error.value).endswith('or the text in its "target"')
    assert target_of(Prompt("p7", prompt, {"target": "HELLO"})) == "HELLO"


@pytest.mark.parametrize("target", ["", "  ", 5, None, ["OPEN"]])
def test_a_target_must_be_a_text(target: object) -> None:
    with pytest.raises(UserError, match=r'prompt "p7": prompt .* has "target" .*; expected the text to read'):
        OcrReward().check([Prompt("p7", 'a sign that says "OPEN"', {"target": target})])


def test_a_records_target_is_what_is_read() -> None:
    """Before what stands in quotes; digits inside quotes are part of the text."""
    images = [sign("OPEN"), sign("OPEN")]
    prompts = [Prompt("a", 'a "big" sign', {"target": "OPEN"}), Prompt("b", "a sign", {"target": "CLAM"})]
    assert OcrReward()(images, prompts).values[0] == 1.0
    assert OcrReward()(images, prompts).values[1] < 0.5
    assert quoted_text('the words "Route 66" and "24h"') == "Route 66"


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
    assert OcrReward().version == fingerprint("rule 2", "ocr", RAPIDOCR, installed("rapidocr"))
    assert len({one.version for one in (ocr(), ocr_strict(), ocr(normalize=True), ocr_strict(normalize=True))}) == 4


def test_factories_make_rewards_that_travel() -> None:
    assert ocr() == OcrReward()
    assert ocr_strict() == OcrReward(strict=True)
    reward = ocr_strict(engine="paddleocr", lang="ch", normalize=True)
    assert reward == OcrReward(strict=True, engine="paddleocr", lang="ch", normalize=True)
    assert pickle.loads(pickle.dumps(reward)) == reward


@pytest.mark.parametrize(
    ("recognized", "target"),
    [("OPEN24小时", "ＯＰＥＮ２４小时"), ("don't stop", "don’t stop"), ('say "hi"!', "say “hi”！"), ("カフェ", "ｶﾌｪ")],
)
def test_normalized_texts_are_equal_where_only_their_encoding_differs(recognized: str, target: str) -> None:
    assert ocr_score(recognized, target, strict=True) < 1
    assert ocr_score(recognized, target, strict=True, normalize=True) == 1
    assert ocr_score("other", target, strict=True, normalize=True) < 0.5


def test_chinese_and_japanese_are_read() -> None:
    with Image.open(Path(__file__).with_name("cjk_sign.png")) as image:
        picture = image.convert("RGB")
    prompts = [Prompt("zh", "海报上写着「今日特价」"), Prompt("ja", "看板に『こんにちは』"), Prompt("no", "「营业中」")]
    scores = OcrReward()([picture] * 3, prompts)
    assert scores.values.tolist() == [1.0, 1.0, 0.0]
    assert [text for text, _, _ in scores.evidence[0]["lines"]] == ["今日特价", "こんにちは"]


def test_language_is_paddleocrs() -> None:
    with pytest.raises(UserError, match=r'reward "ocr": lang is "ch" with the engine rapidocr, .*expected none'):
        ocr(lang="ch").check([Prompt("p", '"OPEN"')])


@pytest.mark.skipif(PADDLE, reason="PaddleOCR is installed")
def test_paddleocr_without_its_package_is_refused_before_sampling() -> None:
    reward = ocr(engine="paddleocr")
    with pytest.raises(
        UserError, match=r'"paddleocr" needs paddle\w*, not installed; expected `pip install "gdro\[padd'
    ):
        reward.check([Prompt("p", '"OPEN"')])
    with pytest.raises(UserError, match="not installed"):
        _ = reward.version
    with pytest.raises(UserError, match='prompt "q"'):  # the prompts first: they are quicker told
        reward.check([Prompt("q", "no text")])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """RapidOCR's models in PaddleOCR's format of folder, with the options that make PaddleOCR use them."""
    if not PADDLE:
        pytest.skip("PaddleOCR is not installed")
    import onnxruntime
    import rapidocr as package

    folder, options = tmp_path_factory.mktemp("models"), {"engine": "onnxruntime"}
    resize: dict = {"RecResizeImg": {"image_shape": [3, 48, 320]}}
    for part, stage in (("det", "detection"), ("rec", "recognition")):
        name = f"PP-OCRv6_small_{part}"
        path = Path(package.__file__).parent / "models" / f"PP-OCRv6_{part}_small.onnx"
        read: dict = {"DecodeImage": {"img_mode": "BGR", "channel_first": False}}
        if part == "det":
            scale = {"mean": [0.5] * 3, "std": [0.5] * 3, "scale": "1./255.", "order": "hwc"}
            ops = [read, {"DetResizeForTest": {"resize_long": 960}}, {"NormalizeImage": scale}, {"ToCHWImage": None}]
            after: dict = {"name": "DBPostProcess", "thresh": 0.3, "box_thresh": 0.6, "unclip_ratio": 1.5}
        else:
            meta = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
            ops, after = [read, resize], {"name": "CTCLabelDecode", "character_dict": meta["character"].splitlines()}
        (folder / name).mkdir()
        (folder / name / "inference.onnx").write_bytes(path.read_bytes())
        config = {"Global": {"model_name": name}, "PreProcess": {"transform_ops": ops}, "PostProcess": after}
        (folder / name / "inference.yml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        options |= {f"text_{stage}_model_name": name, f"text_{stage}_model_dir": str(folder / name)}
    return options


def test_paddleocr_reads_as_rapidocr_with_the_same_models(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocr_engines, "_idle", {("paddleocr", "ch"): [paddleocr(**models)]})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Image.open(Path(__file__).with_name("cjk_sign.png")) as image:
        cjk = image.convert("RGB")
    images = [poster(["GOOD MORNING", "little bird"], (640, 480)), cjk, sign("OPEN"), Image.new("RGB", (64, 32), "red")]
    prompts = [
        Prompt(str(i), f'"{text}"') for i, text in enumerate(["good morning little bird", "今日特价", "open", "x"])
    ]
    reward = ocr(engine="paddleocr", lang="ch")
    reward.check(prompts)
    found, expected = reward(images, prompts), ocr()(images, prompts)
    assert found.values.tolist() == expected.values.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert found.evidence[3] == {"text": "", "confidence": None, "lines": []}
    for ours, theirs in zip(found.evidence[:3], expected.evidence[:3], strict=True):
        assert [line[0].lower() for line in ours["lines"]] == [line[0].lower() for line in theirs["lines"]]
        boxes = [np.array([line[2] for line in evidence["lines"]]) for evidence in (ours, theirs)]
        assert boxes[0].shape == boxes[1].shape
        np.testing.assert_allclose(*boxes, atol=25)  # of a 640-pixel image: the engines grow boxes differently


@pytest.mark.skipif(not PADDLE, reason="PaddleOCR is not installed")
def test_paddleocr_without_models_is_refused_before_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r'"paddleocr", lang klingon, cannot load \(ValueError: No models .*expected a netw'
    ):
        ocr(engine="paddleocr", lang="klingon").check([Prompt("p", '"OPEN"')])


def test_engine_failure_is_never_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that fails on the second image: its own session is made to refuse the picture's size."""
    engine = rapidocr()
    (package,) = [cell.cell_contents for cell in engine.__closure__]
    session = package._load_det_model().session
    run = session.session.run

    class Refusing:
        def __getattr__(self, name: str) -> object:
            return getattr(inner, name)

        def run(self, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            if next(iter(feeds.values())).shape[-1] == 96:
                raise RuntimeError("out of memory")
            return run(outputs, feeds)

    inner, session.session = session.session, Refusing()
    monkeypatch.setattr(ocr_engines, "_idle", {("rapidocr", None): [engine]})
    images = [sign("OPEN"), Image.new("RGB", (96, 64))]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(ImageFailure, match=r"image 1 of the batch: rapidocr failed .*out of memory") as failure:
        OcrReward()(images, [Prompt("p", '"OPEN"')] * 2)
    assert failure.value.index == 1
