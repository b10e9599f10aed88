"""UniGenBench: files in the published form, the judge's question and replies, accuracies, a whole run resumed."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from unigenbench_judge import JudgeServer, judge_server

from gdro.common.errors import UserError
from gdro.tools.unigenbench.criteria import ENGLISH, MEANINGS, PRIMARIES
from gdro.tools.unigenbench.judging import own_prompt, read_scores
from gdro.tools.unigenbench.published import published_prompt
from gdro.tools.unigenbench.reading import read_prompt_file
from gdro.tools.unigenbench.run import unigenbench
from gdro.tools.unigenbench.scores import aggregate, markdown

KEYS = {"en": ("Testpoints", "Testpoint Description"), "zh": ("考点", "考点对应描述")}
ROWS = {
    "en": [
        (
            0,
            'A sign, "NO\nENTRY", on a {red} wall.',
            ["Text Generation", "Attribute - Color"],
            ['"NO\nENTRY"', "red, wall"],
        ),
        (1, "Two pandas in ink wash style.", ["Style"], ["ink wash"]),
        (
            7,
            "Two pandas in ink wash style.",
            ["Attribute - Quantity", "Action - State", "Style"],
            ["2", "sit", "ink"],
        ),
    ],
    "zh": [
        (0, "古典水墨画，两只熊猫，写着“你好”。", ["风格", "属性-数量"], ["水墨画", "两只熊猫"]),
        (1, "他挥手。", ["动作-人物/拟人手部动作"], ["挥手"]),
    ],
}


def write_benchmark(path: Path, language: str = "en", rows: Sequence[Any] | None = None) -> Path:
    """A CSV file as published: the header, quoted cells, JSON with the categories and the test points."""
    points, descriptions = KEYS[language]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", f"prompt_{language}", f"sub_dims_{language}"])
        for index, prompt, names, texts in ROWS[language] if rows is None else rows:
            about = {"Subjects": "Animal", points: names, descriptions: texts}
            writer.writerow([index, prompt, json.dumps(about, ensure_ascii=False)])
    return path


# ---- criteria and files


def test_ten_primary_criteria_have_27_sub_criteria_in_both_languages() -> None:
    names = [name for parts in PRIMARIES.values() for name in parts]
    assert len(PRIMARIES) == 10
    assert len(set(names)) == len(names) == 27
    for language in ("en", "zh"):
        assert sorted(ENGLISH[language].values()) == sorted(names)
        assert set(MEANINGS[language]) == set(ENGLISH[language])
    for primary, parts in PRIMARIES.items():  # the published rule: what stands before the first hyphen
        assert {part.split("-")[0].strip() for part in parts} == {primary}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_reads_the_published_form_with_quotes_and_newlines_in_cells(tmp_path: Path, language: str) -> None:
    found = read_prompt_file(write_benchmark(tmp_path / "a.csv", language))
    assert (found.language, found.repairs) == (language, [])
    read = [(int(p.id), p.text, p.fields["points"], p.fields["descriptions"]) for p in found.prompts]
    assert read == ROWS[language]  # two rows may share a text


def test_a_description_too_many_is_passed_over_as_the_published_code_does(tmp_path: Path) -> None:
    path = write_benchmark(tmp_path / "a.csv", rows=[(0, "x", ["Style"], ["ink", "more"])])
    assert read_prompt_file(path).prompts[0].fields["descriptions"] == ["ink"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("index,prompt_en\n0,x\n", "has the columns index, prompt_en; expected index, prompt_en, sub_dims_en"),
        ("index,prompt_en,sub_dims_en\n", "holds no rows"),
        ("", "has the columns (none)"),
        ("index,prompt_en,sub_dims_en\n0,x\n", "row 1 (ending at line 2) has fewer cells"),
        ("index,prompt_en,sub_dims_en\n0,x,y,z\n", "row 1 (ending at line 2) has more cells"),
        ('index,prompt_en,sub_dims_en\n0,"x,y\n', "is not CSV"),
        ("index,prompt_en,sub_dims_en\n0.0,x,{}\n", "column index: '0.0'; expected a whole number"),
        ("index,prompt_en,sub_dims_en\n0, ,{}\n", "column prompt_en: empty"),
        ("index,prompt_en,sub_dims_en\n0,x,{'a'}\n", "column sub_dims_en is not JSON"),
        ("index,prompt_en,sub_dims_en\n0,x,[]\n", "column sub_dims_en: not a JSON object"),
        ("index,prompt_en,sub_dims_en\n0,x,{}\n", "column sub_dims_en: Testpoints is null; expected a list of strings"),
    ],
)
def test_a_bad_file_is_refused_naming_row_and_column(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_prompt_file(path)
    assert str(path) in str(error.value)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([(0, "x", ["Stile"], ["ink"])], 'unknown test point "Stile"; did you mean "Style"?'),
        ([(0, "x", ["Style", "Style"], ["ink"])], "1 of Testpoint Description for 2 of Testpoints"),
        ([(0, "x", [], [])], "Testpoints is empty"),
        ([(0, "x", ["Style"], [3])], "Testpoint Description is [3]; expected a list of strings"),
        (
            [(0, "x", ["Style"], ["i"]), (0, "y", ["Style"], ["i"])],
            "row 2 (ending at line 3), column index: 0 is",
        ),
    ],
)
def test_bad_test_points_are_refused(tmp_path: Path, rows: Sequence[Any], told: str) -> None:
    with pytest.raises(UserError, match=r".*") as error:
        read_prompt_file(write_benchmark(tmp_path / "bad.csv", rows=rows))
    assert told in str(error.value)


# ---- question and reply


def test_the_question_holds_the_prompt_and_each_point_with_meaning_and_description(tmp_path: Path) -> None:
    for language in ("en", "zh"):
        for prompt in read_prompt_file(write_benchmark(tmp_path / f"{language}.csv", language)).prompts:
            text = own_prompt(language).question(prompt)
            assert text.count(prompt.text) == 2
            assert f"<checkpoint>{prompt.fields['points']}</checkpoint>" in text
            for point, asked in zip(prompt.fields["points"], prompt.fields["descriptions"], strict=True):
                assert f"\n{point}: {MEANINGS[language][point]}" in text
                assert f"\n{point}: {asked}" in text


SCRIPT = """
raise SystemExit("never executed")
def call_evaluation(args):
    explanation_dict = {"Style": "how {it} looks", 'Text Generation': "words"}
    explanation = "Meanings:「"
    for point in testpoint:
        explanation += f"\\n{point}: {explanation_dict[point]}"
    explanation += "\\n」"
    test_explanation = "Asked:「"
    for idx, point in enumerate(testpoint):
        test_explanation += f"\\n{point}: {test_desc[idx]}"
    test_explanation += "\\n」"
    while True:
        system_prompt = f\'\'\'Of 「{prompt}」
            look at {testpoint}; {explanation}; {test_explanation}; {{answer}}\'\'\'
"""


def test_the_published_prompt_is_taken_word_for_word_from_the_script(tmp_path: Path) -> None:
    script = tmp_path / "eval.py"
    script.write_text(SCRIPT, encoding="utf-8")
    rows = [(0, "a {wall}", ["Style", "Text Generation"], ["ink", "{NO}"])]
    (prompt,) = read_prompt_file(write_benchmark(tmp_path / "a.csv", rows=rows)).prompts
    published = published_prompt(script, "en")
    assert published.question(prompt) == (
        "Of 「a {wall}」\n            look at ['Style', 'Text Generation']; "
        "Meanings:「\nStyle: how {it} looks\nText Generation: words\n」; "
        "Asked:「\nStyle: ink\nText Generation: {NO}\n」; {answer}"
    )
    published.check([prompt])
    others = read_prompt_file(write_benchmark(tmp_path / "b.csv")).prompts
    with pytest.raises(UserError, match=r'does not define "Attribute - Color"'):
        published.check(others)


COMMON = """
raise SystemExit("never executed")
MEANINGS_EN = {"Style": "how {it} looks", 'Text Generation': "words"}
MEANINGS_ZH = {"风格": "样式"}
TEMPLATE_EN = '''Of 「{prompt}」
            look at {testpoint}; {explanation}; {test_explanation}; {{answer}}'''
TEMPLATE_ZH = "看{prompt}{testpoint}{explanation}{test_explanation}"
LANG_CONFIGS = {
    "en": {"explanation_dict": MEANINGS_EN, "system_prompt_template": TEMPLATE_EN, "long": 4096,
           "checkpoint_header": "Meanings", "checkpoint_desc_header": "Asked"},
    "zh": {"explanation_dict": MEANINGS_ZH, "system_prompt_template": TEMPLATE_ZH,
           "checkpoint_header": "说明", "checkpoint_desc_header": "描述"},
}
def build_system_prompt(prompt, testpoint, test_desc, lang):
    config = LANG_CONFIGS[lang]
    explanation_dict = config["explanation_dict"]
    explanation = f"{config['checkpoint_header']}:\\u300c"
    for point in testpoint:
        explanation += f"\\n{point}: {explanation_dict[point]}"
    explanation += "\\n\\u300d"
    test_explanation = f"{config['checkpoint_desc_header']}:\\u300c"
    for idx, point in enumerate(testpoint):
        test_explanation += f"\\n{point}: {test_desc[idx]}"
    test_explanation += "\\n\\u300d"
    return config["system_prompt_template"].format(prompt=prompt, testpoint=testpoint)
"""


def test_the_prompts_of_both_languages_are_taken_from_the_common_script(tmp_path: Path) -> None:
    script = tmp_path / "eval_common.py"
    script.write_text(COMMON, encoding="utf-8")
    rows = [(0, "a {wall}", ["Style", "Text Generation"], ["ink", "{NO}"])]
    (prompt,) = read_prompt_file(write_benchmark(tmp_path / "a.csv", rows=rows)).prompts
    assert published_prompt(script, "en").question(prompt) == (
        "Of 「a {wall}」\n            look at ['Style', 'Text Generation']; "
        "Meanings:「\nStyle: how {it} looks\nText Generation: words\n」; "
        "Asked:「\nStyle: ink\nText Generation: {NO}\n」; {answer}"
    )
    rows = [(0, "红", ["风格", "属性-颜色"], ["水墨", "红色"])]
    (prompt,) = read_prompt_file(write_benchmark(tmp_path / "b.csv", "zh", rows)).prompts
    chinese = published_prompt(script, "zh")
    chinese.check([prompt])
    assert chinese.question(prompt) == (
        f"看红['风格', '属性-颜色']说明:「\n风格: 样式\n属性-颜色: {MEANINGS['zh']['属性-颜色']}\n」"
        "描述:「\n风格: 水墨\n属性-颜色: 红色\n」"
    )
    assert chinese.lent == ("属性-颜色", "属性-形状")  # in published files, not in every published script


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        "def f(:",
        SCRIPT.replace("{prompt}", "{secret}"),
        SCRIPT.replace(' explanation = "', ' elsewhere = "'),
        COMMON.replace("「{prompt}」", "「{prompt.__class__}」"),
        COMMON.replace("{testpoint}; ", "{testpoint!r}; "),
        COMMON.replace("{testpoint}; ", "{testpoint}; {lang}"),
        COMMON.replace("{testpoint}; ", "{"),
        COMMON.replace('"en":', '"fr":'),
        COMMON.replace("MEANINGS_EN = ", "MEANINGS_EN: dict = "),
        COMMON.replace("'checkpoint_header'", "lang"),
    ],
)
def test_a_script_without_the_prompt_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "eval.py").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"--judge-prompt: .*eval\.py"):
        published_prompt(tmp_path / "eval.py", "en")


@pytest.mark.parametrize(
    ("old", "new", "before"),
    [
        ('[""i"", ""j""]', '[""i"" ""j""]', '"j"]}'),
        ('[""i"", ""j""]', '[""i""""j""]', '"j"]}'),
        ('], ""Testpoint Desc', '] ""Testpoint Desc', '"Testpoint Description": ["i",'),
        ('work.","{', 'work.""{', '{"Subjects": "Animal", "Testpo'),
    ],
)
def test_a_missing_comma_is_put_in_if_wanted_and_told_of(tmp_path: Path, old: str, new: str, before: str) -> None:
    rows = [(0, "x", ["Style"], ["ink"]), (509, 'A, "work.', ["Style", "World Knowledge"], ["i", "j"])]
    path = write_benchmark(tmp_path / "en_long.csv", rows=rows)
    whole, text = read_prompt_file(path).prompts, path.read_text()
    head, row = text[: text.index("509")], text[text.index("509") :]
    assert old in row
    path.write_text(head + row.replace(old, new))
    told = f"index 509, column sub_dims_en: a comma is missing before {before}..."
    with pytest.raises(UserError) as error:
        read_prompt_file(path)
    assert f"row 2 (ending at line 3), {told}; insert it in the file, or pass --repair" in str(error.value)
    found = read_prompt_file(path, repair=True)
    assert found.prompts == whole
    assert found.repairs == [told]


@pytest.mark.parametrize(
    "dims", ['{""Testpoints"": [""Style""], ""Testpoint Description"": [""a "", "" c"" ""b""]}', "{", "[1 2]"]
)
def test_what_no_comma_mends_is_not_repaired(tmp_path: Path, dims: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f'index,prompt_en,sub_dims_en\n0,x,"{dims}"\n')
    with pytest.raises(UserError, match="column sub_dims_en"):
        read_prompt_file(path, repair=True)


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ('<analysis>["a", "it\'s "b""]</analysis><score>[0, 1]</score>', [0, 1]),
        ("<description>\n<score>\n[ 1 ,0 ]\n</score>\n</description>", [1, 0]),
        ("<think><score>[1,1]</score>?</think> <score>[0,0]</score>", [0, 0]),
        ("<score>[1.0, 0.0]</score>", [1, 0]),
        ("<score>[1,0,]</score>", [1, 0]),
        ("<score>(1, 0)</score>", [1, 0]),
        ("<score>[True, False]</score>", [1, 0]),
        ("<score>0, 1</score>", [0, 1]),
        ("<score>[1, 1]</score> no: <score>[0, 1]</score>", [0, 1]),
        ("<score>[1, 1]</score> no: <score>[0, X]</score>", None),
        ("<score>[1, 1]</score> no: <score>[0, 1", None),
        ("<score>[1, 1] <score>[0, 1]</score>", [0, 1]),
        ("<analysis>['a', 'b']\n<score>[1, 1]</score>", None),  # the analysis never ends
        ("<score>[0, 1, 1]</score>", None),
        ("<score>[1]</score>", None),
        ("<score>[0, 2]</score>", None),
        ("<score>[0, -1]</score>", None),
        ("<score>[0, 0.5]</score>", None),
        ("<score>[01, 1]</score>", None),
        ("<score>[0, yes]</score>", None),
        ("<score>['0', '1']</score>", None),
        ("<score>[0, 1e0]</score>", None),
        ("<score>[0 1]</score>", None),
        ("<score>[[0, 1]]</score>", None),
        ("<score>[0, , 1]</score>", None),
        ("<score>[]</score>", None),
        ("<score>[0, 1]", None),
        ("[0, 1]", None),
        ("", None),
    ],
)
def test_a_reply_is_read_or_missing(reply: str, scores: list[int] | None) -> None:
    assert read_scores(reply, 2) == scores


# ---- accuracies


def test_accuracies_are_pooled_within_a_criterion_and_overall_is_the_mean_of_the_ten() -> None:
    others = [parts[0] for name, parts in PRIMARIES.items() if name != "Attribute"]  # nine, each right once
    results = aggregate(
        [
            (others, [1] * 9),
            (["Attribute - Color", "Attribute - Size"], [1, 0]),
            (["Attribute - Color"], [1]),
            (["Attribute - Color"], [0]),
            (["Style", "Attribute - Color"], None),
        ]
    )
    color = {"accuracy": 2 / 3, "lower_bound": 2 / 4, "correct": 2, "answered": 3, "missing": 1}
    assert results["sub"]["Attribute - Color"] == color
    assert results["sub"]["Attribute - Size"]["accuracy"] == 0
    assert results["sub"]["Attribute - Shape"]["accuracy"] is None
    attribute = {"accuracy": 2 / 4, "lower_bound": 2 / 5, "correct": 2, "answered": 4, "missing": 1}
    assert results["primary"]["Attribute"] == attribute  # of the points, not the mean of the sub-criteria
    assert results["overall"]["accuracy"] == pytest.approx((9 * 1 + 1 / 2) / 10)
    assert results["overall"]["lower_bound"] == pytest.approx((8 * 1 + 1 / 2 + 2 / 5) / 10)
    assert results["all_points"] == {
        "accuracy": 11 / 13, "lower_bound": 11 / 15, "correct": 11, "answered": 13, "missing": 2,
    }  # fmt: skip


def test_without_every_primary_criterion_there_is_no_overall_figure() -> None:
    results = aggregate([(["Style"], [1])]) | {
        "images": {"missing": 0, "asked": 1},
        "judge": {"model": "m", "own_meanings": ["属性-颜色"]},
        "repairs": ["index 509: a comma"],
    }
    assert results["overall"] == {"accuracy": None, "lower_bound": None}
    table = markdown(results)
    assert "| **Overall** | **–** | – | 1 | 1 | 0 |" in table
    assert "| **Style** | 100.00 | 100.00 | 1 | 1 | 0 |" in table
    assert "No overall score" in table
    assert "Repaired in the file: index 509: a comma" in table
    assert "does not define 属性-颜色: gdro's words are used instead" in table


# ---- whole runs


def run(file: Path, out: Path, server: JudgeServer, **options: Any) -> dict[str, Any]:
    small = {"model": "tiny", "images": 2, "steps": 2, "height": 32, "width": 64, "max_sequence_length": 24}
    if "images_from" in options:
        small = {"images": 2}
    judge = {"judge_url": server.url, "judge_model": "judge", "judge_concurrency": 2}
    unigenbench(file, out, **(small | judge | options))
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(File, folder) of an uninterrupted run on the tiny model."""
    folder = tmp_path_factory.mktemp("unigenbench")
    file = write_benchmark(folder / "test_prompts_en.csv")
    with judge_server() as server:
        run(file, folder / "whole", server)
        assert len(server.asked) == 3 * 2
    return file, folder / "whole"


def test_a_run_asks_about_every_image_and_reports_its_points(whole: tuple[Path, Path]) -> None:
    _, out = whole
    results = json.loads((out / "results.json").read_text())
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [(a["index"], a["image"]) for a in answers] == [(i, j) for i in (0, 1, 7) for j in (0, 1)]
    right = sum(sum(answer["scores"]) for answer in answers)
    assert results["all_points"]["answered"] == (2 + 1 + 3) * 2
    assert results["all_points"]["correct"] == right
    style = [a["scores"][a["points"].index("Style")] for a in answers if "Style" in a["points"]]
    assert results["primary"]["Style"]["accuracy"] == sum(style) / 4
    assert results["images"]["asked"] == 6
    assert results["images"]["from"]["model"] == "tiny"
    assert "| **Style** |" in (out / "results.md").read_text()


def test_the_page_is_self_contained_and_escaped(whole: tuple[Path, Path]) -> None:
    page = (whole[1] / "results.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "&#34;NO\nENTRY&#34;" in page
    assert "http" not in page


def test_interrupted_and_resumed_gives_the_same_and_asks_nothing_twice(
    tmp_path: Path, whole: tuple[Path, Path]
) -> None:
    file, uninterrupted = whole
    with judge_server() as server:
        server.fails_from = 3
        with pytest.raises(UserError, match="out of order"):
            run(file, tmp_path, server, judge_concurrency=1)
        assert len(server.asked) == 3 + 2  # what it refused, and a greeting
        assert not (tmp_path / "results.json").exists()
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "groups").iterdir()}
        server.fails_from = None
        run(file, tmp_path, server)
        assert len(server.asked) == 5 + 3
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "groups").iterdir()}
    for name in ("results.json", "answers.jsonl", "results.md", "results.html"):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_other_settings_do_not_mix_with_the_images_there(tmp_path: Path, whole: tuple[Path, Path]) -> None:
    file, out = whole
    with judge_server() as server, pytest.raises(UserError, match=r"guidance_scale: .* was sampled with 3\.5, now 1"):
        run(file, out, server, guidance=1.0)


def test_images_made_elsewhere_are_judged_and_missing_verdicts_counted(tmp_path: Path) -> None:
    file = write_benchmark(tmp_path / "test_prompts_zh.csv", "zh")
    (tmp_path / "images").mkdir()
    for name, blue in (("0_0", 128), ("0_1", 64), ("1_0", 192), ("1_1", 1)):  # 64 pixels: the sum // 64 is the value
        Image.new("RGB", (8, 8), (0, 0, blue)).save(tmp_path / "images" / f"{name}.png")
    with judge_server() as server:
        server.garbles = True  # odd brightness: 1_1
        results = run(file, tmp_path / "out", server, images_from=tmp_path / "images")
        assert all("两只熊猫" in text for text in server.asked if "水墨画" in text)
    assert results["language"] == "zh"
    assert results["images"]["missing"] == 1
    assert list(results["images"]["reasons"].values()) == [1]
    hand = results["sub"]["Action - Hand (Character/Anthropomorphic)"]
    assert hand == {"accuracy": 0, "lower_bound": 0, "correct": 0, "answered": 1, "missing": 1}
    assert "no verdict: reply without" in (tmp_path / "out" / "results.html").read_text()


def test_an_adapter_is_loaded_from_a_run_and_named(tmp_path: Path, whole: tuple[Path, Path]) -> None:
    import torch

    from gdro.models import load_model
    from gdro.models.lora import write_lora

    model = load_model("tiny", device=torch.device("cpu"), dtype=torch.float32)
    model.add_adapter(rank=2, alpha=2, targets="all-linear", seed=0)
    state = {name: torch.full_like(value, 0.02) for name, value in model.adapter().items()}
    write_lora(tmp_path / "run" / "adapter", state, {"r": 2, "lora_alpha": 2}, {})
    with judge_server() as server:
        results = run(whole[0], tmp_path / "out", server, adapter=tmp_path / "run")
    assert results["images"]["from"]["adapter"]["folder"] == str(tmp_path / "run" / "adapter")
    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert answers != (whole[1] / "answers.jsonl").read_bytes()


def test_images_can_be_made_before_there_is_a_judge(tmp_path: Path, whole: tuple[Path, Path]) -> None:
    file, uninterrupted = whole
    small: dict[str, Any] = {"images": 2, "steps": 2, "height": 32, "width": 64, "max_sequence_length": 24}
    assert "--judge-url" in unigenbench(file, tmp_path, model="tiny", **small)
    with judge_server() as server:
        run(file, tmp_path, server)
    assert (tmp_path / "results.json").read_bytes() == (uninterrupted / "results.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "neither of --model and --images-from"),
        ({"model": "tiny", "images_from": Path("x")}, "both of --model and --images-from"),
        ({"model": "tini"}, "model: tini not found"),
        ({"images_from": Path("nowhere")}, "--images-from: nowhere/0_0.png and 11 more of 12 not found"),
        ({"images_from": Path("x"), "adapter": Path("x")}, "--adapter requires --model"),
        ({"model": "tiny", "adapter": Path("nowhere")}, "--adapter: nowhere holds no pytorch_lora_weights"),
        ({"model": "tiny", "judge_url": "http://127.0.0.1:9/v1"}, "one of --judge-url and --judge-model"),
        ({"model": "tiny", "steps": 0}, "--steps is 0"),
        ({"model": "tiny", "images": 0}, "--images is 0"),
        ({"model": "tiny", "judge_prompt": Path("nowhere.py")}, "--judge-prompt: nowhere.py not found"),
        ({"model": "tiny", "judge_url": "http://127.0.0.1:9/v1", "judge_model": "judge"}, "does not answer"),
    ],
)
def test_bad_input_is_one_line_before_any_image(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    file = write_benchmark(tmp_path / "a.csv")
    with pytest.raises(UserError) as error:
        unigenbench(file, tmp_path / "out", **options)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "groups").exists()
