"""Rewards and judges by name, and those of the user's own with every mistake they can make."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.rewards.base import ImageFailure
from gdro.rewards.ocr.reward import OcrReward
from gdro.rewards.registry import load_judge, load_reward
from gdro.tiny.judge import TinyJudge

IMAGES = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)]
PROMPTS = [Prompt(str(i), "text") for i in range(3)]

Write = Callable[[str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Write:
    """Writes a module into the current directory; returns its name, another one for each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    name = "my_" + "".join(c if c.isalnum() else "_" for c in request.node.name)

    def write(source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def test_names() -> None:
    assert load_reward("ocr") == OcrReward()
    assert load_reward("ocr_strict") == OcrReward(strict=True)
    assert isinstance(load_judge("tiny"), TinyJudge)


def test_nearest_name_is_offered() -> None:
    with pytest.raises(UserError, match=r'score.reward: "ocr_strikt" is neither a reward.*did you mean "ocr_strict"\?'):
        load_reward("ocr_strikt")
    with pytest.raises(UserError, match=r'evaluate.judge: "tinny" is neither a judge.*did you mean "tiny"\?'):
        load_judge("tinny")


def test_own_function_is_found_in_the_current_directory(module: Write) -> None:
    name = module("def red(images, prompts):\n    return [i.getpixel((0, 0))[0] / 255 for i in images]\n")
    reward = load_reward(f"{name}:red")
    scores = reward(IMAGES, PROMPTS)
    assert scores.values.tolist() == [0.0, 1 / 255, 2 / 255]
    assert scores.evidence == [{}, {}, {}]
    assert reward.name == f"{name}.red"
    assert pickle.loads(pickle.dumps(reward))(IMAGES, PROMPTS).values.tolist() == scores.values.tolist()


def test_version_is_the_source_file(module: Write) -> None:
    name = module("def f(images, prompts):\n    return [0] * len(images)\n")
    first = load_reward(f"{name}:f").version
    assert load_reward(f"{name}:f").version == first
    module("def f(images, prompts):\n    return [1] * len(images)\n")
    assert load_reward(f"{name}:f").version != first


@pytest.mark.parametrize(
    "values", ["[1, 0.5, True]", "np.ones(3, np.float32)", "torch.ones(3)", "(np.float64(1), torch.tensor(1.), 1)"]
)
def test_numbers_of_every_kind(module: Write, values: str) -> None:
    name = module(f"import numpy as np, torch\ndef f(images, prompts):\n    return {values}\n")
    values = load_reward(f"{name}:f")(IMAGES, PROMPTS).values
    assert values.dtype == np.float64
    assert values.shape == (3,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("[1, float('nan'), 1]", r"image 1 of the batch: .*returned nan; expected a finite number"),
        ("[1, 1, float('-inf')]", r"image 2 of the batch: .*returned -inf"),
        ("[1, None, 1]", r"image 1 .*returned None \(NoneType\); expected a number"),
        ("[1, '0.5', 1]", r"image 1 .*returned '0.5' \(str\); expected a number"),
        ("[1, 1j, 1]", r"image 1 .*expected a number"),
        ("[[1], [1], [1]]", r"image 0 .*\(list\); expected a number"),
        ("np.ones((3, 1))", r"image 0 .*\(ndarray\); expected a number"),
        ("[1, 1]", r"returned 2 values for 3 images"),
        ("[1] * 4", r"returned 4 values for 3 images"),
        ("0.5", r"returned a float; expected a sequence of 3 numbers"),
        ("None", r"returned a NoneType"),
        ("'abc'", r"returned a str"),
        ("{0: 1, 1: 1, 2: 1}", r"returned a dict"),
        ("np.array(1.)", r"returned a ndarray; expected a sequence"),
    ],
)
def test_bad_results_are_refused(module: Write, values: str, message: str) -> None:
    name = module(f"import numpy as np\ndef f(images, prompts):\n    return {values}\n")
    with pytest.raises(UserError, match=message) as error:
        load_reward(f"{name}:f")(IMAGES, PROMPTS)
    assert f"{name}:f" in str(error.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("brightnes", r'nothing named "brightnes"; did you mean "brightness"\?'),
        ("constant", r'something of type int named "constant"'),
        ("", "is not module:function"),
        ("a:b", "is not module:function"),
    ],
)
def test_missing_functions_are_named(module: Write, function: str, message: str) -> None:
    name = module("constant = 3\ndef brightness(images, prompts):\n    return [0] * len(images)\n")
    with pytest.raises(UserError, match=message):
        load_reward(f"{name}:{function}")


def test_modules_that_do_not_import_are_named(module: Write) -> None:
    with pytest.raises(UserError, match=r'cannot import "no_such_module" .*ModuleNotFoundError'):
        load_reward("no_such_module:f")
    name = module("def f(:\n")
    with pytest.raises(UserError, match=rf'cannot import "{name}" .*SyntaxError'):
        load_reward(f"{name}:f")


def test_builtin_has_no_source_to_version() -> None:
    with pytest.raises(UserError, match="has no Python source"):
        load_reward("math:hypot")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "def f(images, prompts):\n    return [1 / 0 for _ in images]\n",
            r"ZeroDivisionError: division by zero.*line 2",
        ),
        ("def f(images, prompts):\n    yield 1\n    yield int('x')\n", r"ValueError: invalid literal.*line 3"),
        ("def f(images, prompts):\n    return [round('1') for _ in images]\n", r"TypeError: type str .*line 2"),
        ("def f(images):\n    return 1\n", r"TypeError: f\(\) takes 1 positional argument but 2 were given$"),
    ],
)
def test_what_the_function_raises_is_told_with_its_line(module: Write, text: str, told: str) -> None:
    name = module(text)
    with pytest.raises(UserError, match=rf'reward "{name}:f" raised {told}') as error:
        load_reward(f"{name}:f")(IMAGES, PROMPTS)
    assert isinstance(error.value.__cause__, ZeroDivisionError | ValueError | TypeError)
    with pytest.raises(UserError, match=rf'judge "{name}:f" raised'):
        load_judge(f"{name}:f")(IMAGES, PROMPTS)


def test_own_judge(module: Write) -> None:
    name = module(
        "def good(images, prompts):\n    return {a: [1, 3, 5] for a in ('alignment', 'coherence', 'style')}\n"
        "def short(images, prompts):\n    return {'alignment': [1, 3, 5]}\n"
        "def gaps(images, prompts):\n    return good(images, prompts) | {'style': [1, None, float('nan')]}\n"
        "def endless(images, prompts):\n    return good(images, prompts) | {'style': [1, 2, float('inf')]}\n"
        "def wide(images, prompts):\n    return good(images, prompts) | {'style': [1, 6, 5]}\n"
    )
    grades = load_judge(f"{name}:good")(IMAGES, PROMPTS)
    assert {a: values.tolist() for a, values in grades.items()} == {a: [1.0, 3.0, 5.0] for a in grades}
    np.testing.assert_array_equal(load_judge(f"{name}:gaps")(IMAGES, PROMPTS)["style"], [1, np.nan, np.nan])
    with pytest.raises(ImageFailure, match=r"image 2 .*style returned inf; expected a finite number"):
        load_judge(f"{name}:endless")(IMAGES, PROMPTS)
    with pytest.raises(UserError, match=r"returned \['alignment'\]; expected a dictionary with the keys"):
        load_judge(f"{name}:short")(IMAGES, PROMPTS)
    with pytest.raises(ImageFailure, match=r"image 1 .*style returned 6; expected 1 to 5"):
        load_judge(f"{name}:wide")(IMAGES, PROMPTS)
