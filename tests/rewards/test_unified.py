"""UnifiedReward: replies as the published models give them, and the reward, judge and pairs over a real HTTP server."""

import itertools
import json
import math
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_endpoint import Asked, FakeEndpoint, Said
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.rewards.judges.endpoint import Endpoint, Question
from gdro.rewards.judges.unified import (
    PAIRWISE,
    POINTWISE,
    parse_axes,
    parse_final,
    parse_relative,
    parse_think,
    parse_winner,
    unified_judge,
    unified_pairs,
    unified_reward,
)
from gdro.tools.unigenbench.judging import read_scores

AXES_REPLY = """Alignment Score (1-5): 2.694700002670288
Coherence Score (1-5): 2.371500015258789
Style Score (1-5): 2.802500009536743"""  # the published example
WORDS_REPLY = f'---\n\nWord-wise Scores: [["a", 0.2], ["cat", 4.1], ["[No_mistakes]", 3.0]]\n\n{AXES_REPLY}'
FINAL_REPLY = "cat (animal): 1\nred (color): 0\nFinal Score: 3.5"
RELATIVE_REPLY = """Alignment Score:
 Image 1: 0.435699999332428
 Image 2: 0.564300000667572

Coherence Score:
 Image 1: 0.4180000126361847
 Image 2: 0.5820000171661377

Style Score:
 Image 1: 0.40790000557899475
 Image 2: 0.5921000242233276"""  # the published example
THINK_REPLY = """<think>
1. Semantic consistency:
    Image 1 (9/10) - ...;
    Image 2 (7/10) - at first sight Image 2 is better
Total score:
Image 1: 9+8+8=25
Image 2: 7+8+5=20
</think>
<answer>Image 1 is better</answer>"""
FLEX_REPLY = """```json
{
  "prompt": "a "cat"",
  "categories": [{"name": "A", "dims": [], "cat_reason": "Image 2\nis sharper", "cat_winner": "Image 2"}],
  "reason": "it says \\"winner\\": \\"Image 2\\" on the cup",
  "winner": "Image 1"
}
```"""  # not JSON: quotes and a line break within strings, as such models write them


@pytest.mark.parametrize("reply", [AXES_REPLY, WORDS_REPLY, AXES_REPLY.lower(), AXES_REPLY.replace(":", ":  ")])
def test_axes(reply: str) -> None:
    expected = {"alignment": 2.6947, "coherence": 2.3715, "style": 2.8025}
    assert parse_axes(reply) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "reply",
    [
        "**Alignment Score (1-5): 4**\n**Coherence Score (1-5):** 3\n**Style Score (1-5)**: 5.",
        "Alignment Score (1-5): 4, Coherence Score (1-5): 3; Style Score (1-5): 5",
        "Alignment Score (1-5): 4\nAlignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 5",
        "In the form Alignment Score (1-5): X, that is\nAlignment Score (1-5): 4/5\nCoherence Score (1-5): 3 out of 5\n"
        "Style Score (1-5): 1\nor rather\nStyle Score (1-5): 5",
    ],
)
def test_axes_in_other_dress(reply: str) -> None:
    assert parse_axes(reply) == {"alignment": 4, "coherence": 3, "style": 5}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2.694700002670288", "nan"),
        ("2.694700002670288", "Infinity"),
        ("2.694700002670288", "X"),
        ("2.694700002670288", ""),
        ("2.694700002670288", "5.01"),
        ("2.694700002670288", "0.99"),
        ("2.694700002670288", "-3"),
        ("2.694700002670288", "1e0"),
        ("2.694700002670288", "2/10"),
        ("2.694700002670288", "2.6.9"),
        ("2.694700002670288", "２"),
        ("Coherence Score (1-5): 2.371500015258789\n", ""),
        ("Style Score (1-5)", "Style Score (1-10)"),
        ("Style Score", "Lifestyle Score"),
        ("2.694700002670288", ".5"),
    ],
)
def test_axes_are_missing_if_one_is(old: str, new: str) -> None:
    assert old in AXES_REPLY
    assert parse_axes(AXES_REPLY.replace(old, new)) is None


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (FINAL_REPLY, 3.5),
        ("Final Score: 5", 5.0),
        ("final score: 1.0.", 1.0),
        ("Final Score: 0", None),
        ("Final Score: 5.5", None),
        ("Final Score: nan", None),
        ("Final Score: .3", None),  # 3 before
        ("Final Score: 3\nFinal Score: 4", 4.0),
        ("Score: 3", None),
        ("", None),
    ],
)
def test_final_score(reply: str, score: float | None) -> None:
    assert parse_final(reply) == (None if score is None else {"final": score})


def relative(*pairs: tuple[Any, Any]) -> str:
    names = ("Alignment", "Coherence", "Style")
    return "\n\n".join(f"{n} Score:\n Image 1: {x}\n Image 2: {y}" for n, (x, y) in zip(names, pairs, strict=False))


@pytest.mark.parametrize(
    ("reply", "preference"),
    [
        (RELATIVE_REPLY, 0.0),
        (relative((0.9, 0.1), (0.4, 0.6), (0.4, 0.6)), 1.0),  # by the mean, not by the number of axes
        (relative((0.5, 0.5), (0.7, 0.3), (0.3, 0.7)), 0.5),
        (relative((1, 0), (1, 0), (1, 0)), 1.0),
        (relative((0.5, 0.5), (0.5, 0.5)), None),
        (relative((0.5, 0.6), (0.5, 0.5), (0.6, 0.4)), None),
        (relative((1.5, -0.5), (0.5, 0.5), (0.5, 0.5)), None),
        (relative(("nan", 0.5), (0.5, 0.5), (0.5, 0.5)), None),
        (relative((3, 4), (3, 4), (3, 4)), None),
        (relative((".9", ".1"), ("0.4/1", "0.6/1"), ("**.4**", "**.6**")), 1.0),
        (relative((0.1, 0.9), (0.1, 0.9), (0.1, 0.9)) + "\nno:\n" + relative((0.9, 0.1), (0.9, 0.1), (0.9, 0.1)), 1.0),
        (relative((0.9, 0.1), (0.4, 0.6), (0.4, 0.6)).replace(" Image 2: 0.1\n", ""), None),
        ("Image 1: 0.9\nImage 2: 0.1", None),
    ],
)
def test_relative_scores(reply: str, preference: float | None) -> None:
    assert parse_relative(reply) == preference


@pytest.mark.parametrize(
    ("reply", "preference"),
    [
        (THINK_REPLY, 1.0),
        (THINK_REPLY.replace("<answer>Image 1", "<answer>Image 2"), 0.0),
        (THINK_REPLY.replace("Image 1 is better</answer>", " Both images are equally good. </answer>"), 0.5),
        ("Image 2 is better.", 0.0),
        ("image 1 is better", 1.0),
        ("Both images are equally good.", 0.5),
        (THINK_REPLY.partition("</think>")[0], None),  # the thought alone, though it names one
        (THINK_REPLY.partition("<answer>")[0], None),
        ("Image 1 is better, or rather Image 2 is better", None),
        ("Image 1 is not better", None),
        ("Image 3 is better", None),
        ("", None),
    ],
)
def test_think(reply: str, preference: float | None) -> None:
    assert parse_think(reply) == preference


@pytest.mark.parametrize(
    ("reply", "preference"),
    [
        (FLEX_REPLY, 1.0),
        (FLEX_REPLY.replace('"winner": "Image 1"', '"winner": "Image 2"'), 0.0),
        (json.dumps({"categories": [{"cat_winner": "Image 1"}], "winner": "image 2"}), 0.0),
        ('{"winner": "Tie"}', 0.5),
        ('{"winner": "Image 1/2"}', None),  # the form itself
        ('{"winner": ""}', None),
        ('{"winner": null}', None),
        ('{"cat_winner": "Image 1"}', None),
        ('{"winner": "Image 1", "categories": [{"winner": "Image 2"}]}', 1.0),
        ('{"categories": [{"winner": "Image 2"}, {"winner": "Image 2"}], "winner": "Image 1"}', 1.0),
        ('{"categories": [{"reason": "a "sign"", "winner": "Image 2"}], "reason": "", "winner": "Image 1"}', 1.0),
        ('{"categories": [{"reason": "a "sign"", "winner": "Image 2"}], "reason": "cut', None),
        ('{"categories": [{"winner": "Image 2"}]}', None),
        ('{"winner": "Image 2"} no: {"winner": "Image 1"}', 1.0),
        ('{"winner": 1}', 1.0),
        ('{"reason": "looks like :}", "winner": "Image 2"}', 0.0),
        ("[" * 100_000 + '"winner"', None),
        ("Image 1", None),
    ],
)
def test_flex(reply: str, preference: float | None) -> None:
    assert parse_winner(reply) == preference


def test_the_overall_winner_counts_whatever_the_categories_say() -> None:
    """With the keys of gdro's own question; a judge that calls them all "winner" is understood as well."""
    assert '"cat_winner"' in PAIRWISE["flex"].text
    assert PAIRWISE["flex"].text.count('"winner"') == 1
    for key in ("cat_winner", "winner"):
        for *categories, overall in itertools.product((1, 2), repeat=4):
            reply: dict[str, Any] = {"categories": [{key: f"Image {n}"} for n in categories]}
            assert parse_winner(json.dumps(reply)) is None
            assert parse_winner(json.dumps(reply | {"winner": f"Image {overall}"})) == float(overall == 1)


def test_every_question_names_the_caption_once() -> None:
    for form in (*POINTWISE.values(), *PAIRWISE.values()):
        assert form.text.count("{prompt}") == 1
        question = form.question(Prompt("p", "a {braced} caption"))
        assert "a {braced} caption" in question.text
        assert "{prompt}" not in question.text


READABLE: list[tuple[Callable[[str], Any], str, str]] = [  # parser, a reply it reads, one that says something else
    (parse_axes, AXES_REPLY, AXES_REPLY.replace(": 2", ": 1")),
    (parse_final, FINAL_REPLY, "Final Score: 1"),
    (parse_relative, RELATIVE_REPLY, RELATIVE_REPLY.replace("Image 1", "Image 3").replace("Image 2", "Image 1")),
    (parse_think, "<answer>Image 1 is better</answer>", "Image 2 is better"),
    (parse_winner, FLEX_REPLY, FLEX_REPLY.replace('"winner": "Image 1"', '"winner": "Image 2"')),
    (partial(read_scores, count=2), "<score>[1, 0]</score>", "<score>[0, 0]</score>"),
]


@pytest.mark.parametrize(("parse", "reply", "thought"), READABLE)
def test_thoughts_are_no_answer(parse: Callable[[str], Any], reply: str, thought: str) -> None:
    value = parse(reply)
    assert value is not None
    for tag in ("think", "thinking", "Thought", "reasoning", "analysis", "seed:think", 'think mode="slow"'):
        begin, end = f"<{tag}>", f"</{tag.partition(' ')[0]}>"
        assert parse(f"{begin}{thought}{end}\n{reply}") == value
        assert parse(f"{begin}{end}{reply}") == value
        assert parse(f"{thought}{end}{reply}") == value  # begun by the chat template
        assert parse(f"{begin}{thought}{begin}{thought}{end}{reply}") == value
        for silent in (f"{begin}{thought}", f"{begin}{thought}{end}", f"{begin}{thought}{end}I cannot tell.", begin):
            assert parse(silent) is None
        assert parse(f"{begin}{thought}{end}{reply}{begin}{thought}") is None  # never ended
    for begin, end in (
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ):
        assert parse(f"{begin}{thought}{end}{reply}") == value
        assert parse(f"{begin}{thought}") is None
    assert parse(f"{reply}<think>{thought}</think>") is None  # the answer comes after the thought
    assert parse(f"{reply}\n<analysis>{thought}</analysis>") == value  # which an analysis may follow
    assert parse(f"{thought}<answer>{reply}</answer> {thought}") == value
    assert parse("") is None


@pytest.mark.parametrize(
    ("said", "value"),
    [
        *[(text, 4.0) for text in ("4", "4.", "4.0.", "**4**", "`4`", "[4]", "4,", "4; good", "4 (good)", "4 - good")],
        *[
            (text, 4.0)
            for text in ("4/5", "4 / 5.0.", "4 out of 5", "4 (out of 5)", "**4**/5", "4 stars", "\n4", "\n\n**4.**")
        ],
        ("3.5/5", 3.5),
        ("1", 1.0),
        ("5.", 5.0),
        ("<|begin_of_box|>4.25<|end_of_box|>", 4.25),
        *[
            (text, None)
            for text in ("", "-4", "- 4", "+4", "0", ".5", "0.99", "5.01", "9" * 400, "nan", "inf", "four", "X")
        ],
        *[(text, None) for text in ("1e1", "1e0", "4e", "4x", "4th", "4%", "4 %", "4²", "04", "4.5.6", "4..5", "４")],
        *[(text, None) for text in ("4,5", "4, 5", "4 5", "4-5", "4 – 5", "4~5", "4 to 5", "4 or 5", "4 and 5", "4+1")],
        *[(text, None) for text in ("4/10", "4 out of 10", "4/5/10", "4:1", "4/", "2^2")],
        *[(text, None) for text in ("\n1. The image shows a cat", "\n1 cat", "\nCoherence: 4", "\n1/10")],
    ],
)
def test_a_number_is_read_or_missing(said: str, value: float | None) -> None:
    assert parse_final(f"Final Score: {said}") == (None if value is None else {"final": value})
    assert parse_final(f"Final Score: 2\n**Final Score**:{said}") == (None if value is None else {"final": value})


def test_the_words_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("As it was trained: {prompt}?")
    options: dict[str, Any] = {"url": "http://127.0.0.1:9", "model": "m"}
    own, given = unified_reward(**options), unified_reward(**options, template=str(path))
    assert own.version != given.version
    path.write_text("no caption")
    with pytest.raises(UserError, match=r"words.txt has \{prompt\} 0 times; expected once"):
        given.check([])
    with pytest.raises(UserError, match=r"template: nowhere.txt not found"):
        unified_reward(**options, template="nowhere.txt").check([])


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (shade, 0, 0))


def shade(asked: Asked, place: int = 0) -> int:
    return asked.images[place].getpixel((0, 0))[0]


def axes_of(asked: Asked) -> Said:
    """Alignment from the picture; shade 9 has a NaN."""
    alignment = "nan" if shade(asked) == 9 else str(shade(asked))
    return Said(f"Alignment Score (1-5): {alignment}\nCoherence Score (1-5): 3\nStyle Score (1-5): 1.5")


PROMPTS = [Prompt("a", 'a {prompt} of "OPEN" {0}'), Prompt("b", "a dog"), Prompt("c", "a fox")]
PICTURES = [picture(2), picture(9), picture(5)]


def test_reward_is_the_weighted_mean_of_the_axes(tmp_path: Path) -> None:
    with FakeEndpoint(axes_of) as server:
        settings = {"url": server.url, "model": "judge", "cache": str(tmp_path / "judge.sqlite")}
        reward = pickle.loads(pickle.dumps(unified_reward(**settings)))
        reward.check(PROMPTS)
        scores = reward(PICTURES, PROMPTS)
        assert scores.values.dtype == np.float64
        np.testing.assert_allclose(scores.values, [(2 + 3 + 1.5) / 3, math.nan, (5 + 3 + 1.5) / 3])
        assert scores.evidence[0]["scores"] == {"alignment": 2, "coherence": 3, "style": 1.5}
        assert scores.evidence[0]["reply"].startswith("Alignment Score (1-5): 2\n")
        assert "nan" in scores.evidence[1]["missing"]
        assert json.loads(json.dumps(scores.evidence, allow_nan=False)) == scores.evidence
        asked = {shade(a): a.text for a in server.asked}
        assert asked[2].endswith('Caption: [a {prompt} of "OPEN" {0}]')
        weighted = unified_reward(**settings, alignment=0.7, coherence=0.0, style=0.3)
        before = len(server.asked)
        assert weighted(PICTURES[:1], PROMPTS[:1]).values == pytest.approx(0.7 * 2 + 0.3 * 1.5)
        assert len(server.asked) == before  # the same question: other weights cost no request


def test_reward_by_the_final_score(tmp_path: Path) -> None:
    with FakeEndpoint(lambda asked: Said(f"cat (animal): 1\nFinal Score: {shade(asked)}")) as server:
        reward = unified_reward(url=server.url, model="judge", version="1.x", cache=str(tmp_path / "judge.sqlite"))
        scores = reward(PICTURES, PROMPTS)
        np.testing.assert_array_equal(scores.values, [2, math.nan, 5])
        assert scores.evidence[2]["scores"] == {"final": 5}
        assert "Final Score" in server.asked[0].text


def test_a_thought_is_missing_counted_and_not_kept(tmp_path: Path) -> None:
    said = [f"<think>{AXES_REPLY}", f"<think>{AXES_REPLY}</think>\nA fine picture."]
    with FakeEndpoint(lambda asked: Said(said[0] if shade(asked) == 2 else said[1])) as server:
        reward = unified_reward(url=server.url, model="judge", attempts=1, cache=str(tmp_path / "judge.sqlite"))
        for times in (1, 2):
            scores = reward(PICTURES, PROMPTS)
            assert np.isnan(scores.values).all()
            assert all("missing" in evidence for evidence in scores.evidence)
            assert len([a for a in server.asked if a.images]) == times * len(PICTURES)
        said[:] = [AXES_REPLY, AXES_REPLY]
        assert np.isfinite(reward(PICTURES, PROMPTS).values).all()


@pytest.mark.parametrize("version", ["2.0", "1.x_words"])
def test_judge_grades_the_axes(tmp_path: Path, version: Any) -> None:
    with FakeEndpoint(axes_of) as server:
        judge = unified_judge(url=server.url, model="judge", version=version, cache=str(tmp_path / "judge.sqlite"))
        judge.check(PROMPTS)
        grades = judge(PICTURES, PROMPTS)
        assert ("Word-wise" in server.asked[0].text) == (version == "1.x_words")
    np.testing.assert_array_equal(grades["alignment"], [2, math.nan, 5])
    np.testing.assert_array_equal(grades["coherence"], [3, math.nan, 3])
    np.testing.assert_array_equal(grades["style"], [1.5, math.nan, 1.5])


ANSWERS = {  # how each form says that its first or second image is better
    "think": ("<think>...</think><answer>Image 1 is better</answer>", "<answer>Image 2 is better</answer>"),
    "2.0": (relative((0.6, 0.4), (0.6, 0.4), (0.5, 0.5)), relative((0.4, 0.6), (0.5, 0.5), (0.5, 0.5))),
    "flex": ('{"winner": "Image 1"}', '{"winner": "Image 2"}'),
}


@pytest.mark.parametrize("form", ANSWERS)
def test_pairs_in_their_order(tmp_path: Path, form: Any) -> None:
    def behave(asked: Asked) -> Said:
        first, second = shade(asked, 0), shade(asked, 1)
        return Said("hm" if first == second else ANSWERS[form][first < second])

    with FakeEndpoint(behave) as server:
        pairs = unified_pairs(url=server.url, model="judge", form=form, cache=str(tmp_path / "judge.sqlite"))
        pairs.check([])
        one, two = picture(1), picture(2)
        asked = [(two, one, PROMPTS[0]), (one, two, PROMPTS[0]), (one, one, PROMPTS[1])]
        assert pairs.compare(asked) == [1.0, 0.0, None]
        # requests overlap: they come to the server in any order
        assert sum(PROMPTS[0].text in request.text for request in server.asked) == 2


def test_version_changes_with_what_may_change_a_score() -> None:
    where = {"url": "http://host:8000", "model": "judge"}
    makes: list[Any] = [unified_reward, unified_judge, unified_pairs]
    for make, form in zip(makes, [{"version": "1.x_words"}, {"version": "1.x_words"}, {"form": "flex"}], strict=True):
        others = [{"model": "other"}, {"revision": "abc"}, {"max_tokens": 99}, form]
        versions = {make(**where).version, *(make(**(where | other)).version for other in others)}
        assert len(versions) == 1 + len(others)
        for same in ({"url": "http://other:1"}, {"concurrency": 3}, {"timeout": 1.0}, {"attempts": 2}, {"cache": "x"}):
            assert make(**(where | same)).version == make(**where).version
    assert unified_reward(**where, style=2.0).version != unified_reward(**where).version


@pytest.mark.parametrize(
    "options",
    [
        {"style": -1.0},
        {"style": math.nan},
        {"alignment": 0.0, "coherence": 0.0, "style": 0.0},
        {"version": "1.x", "style": 2.0},
    ],
)
def test_weights_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="unified_reward: "):
        unified_reward(url="http://host:8000", model="judge", **options)


def tiny_llava(folder: Path) -> None:
    """A LLaVA of random weights (UnifiedReward 1.x is one): bytes for tokens, 4 patches an image."""
    import torch
    import transformers as tr
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = tr.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    tokenizer.add_tokens(["<image>", "<user>", "<assistant>"], special_tokens=True)
    part = "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    message = "<user>{% for c in m.content %}" + part + "{% endfor %}"
    processor = tr.LlavaProcessor(
        tr.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}" + message + "{% endfor %}<assistant>",
    )
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = tr.LlavaConfig(
        text_config=tr.Qwen2Config(**small, vocab_size=len(tokenizer), num_hidden_layers=1, num_key_value_heads=1),
        vision_config=tr.CLIPVisionConfig(**small, num_hidden_layers=2, image_size=32, patch_size=16),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tr.LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(0, 256, 8)]  # by chance it soon ends
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(url, model) of `transformers serve` with a tiny vision-language model."""
    for package in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(package, reason="transformers[serving] is not installed")
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import ModelManager

    monkeypatch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("serve") / "llava"
    tiny_llava(folder)
    ModelManager.get_gen_models.cache_clear()  # its list is of the Hub's cache, whatever it serves: an empty one here
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(folder.parent / "hub"))
    (folder.parent / "hub").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = Serve(force_model=str(folder), device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    while not serve.server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}", str(folder)
    serve.kill_server()
    monkeypatch.undo()


def test_transformers_serve_understands_the_requests(transformers_serve: tuple[str, str], tmp_path: Path) -> None:
    """The format is not of our own making: its replies, of random weights, depend on the images it was sent."""
    url, model = transformers_serve
    judge = Endpoint(url, model, max_tokens=100, attempts=1, cache=str(tmp_path / "judge.sqlite"))
    judge.check()
    red, green = Image.new("RGB", (40, 32), "red"), Image.new("RGB", (40, 32), "green")
    found = judge.ask([Question("Which?", images) for images in [(red,), (green,), (red, green)]], lambda text: text)
    replies = {value for value, _ in found}
    assert None not in replies, found
    assert len(replies) == 3


def test_transformers_serve_gibberish_is_missing(transformers_serve: tuple[str, str], tmp_path: Path) -> None:
    url, model = transformers_serve
    reward = unified_reward(url=url, model=model, max_tokens=1, attempts=2, cache=str(tmp_path / "judge.sqlite"))
    reward.check(PROMPTS)
    scores = reward(PICTURES, PROMPTS)
    assert np.isnan(scores.values).all()
    assert all("cut short" in e["missing"] for e in scores.evidence)


def test_transformers_serve_refuses_another_model(transformers_serve: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="HTTP 400: Server is pinned to"):
        Endpoint(transformers_serve[0], "another").check()
