"""Win rates: R_i = 1/(K-1) sum_j P(i beats j), from all pairs, or from some through Bradley-Terry strengths."""

import itertools

import numpy as np
import pytest
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.common.rng import numpy_rng
from gdro.rewards.registry import load_comparator, load_reward
from gdro.rewards.winrate import WinRate, bradley_terry, choose_pairs, expected_shares, shares

PROMPT = Prompt("p", "a picture")


class Judge:
    """Prefers the brighter image, but the first one whenever they are within `bias`; silent about `silent` values."""

    name, version = "brighter", "1"

    def __init__(self, bias: float = 0.0, silent: frozenset[int] = frozenset()) -> None:
        self.bias, self.silent, self.asked = bias, silent, 0

    def check(self, prompts: object) -> None: ...

    def compare(self, pairs: list[tuple[Image.Image, Image.Image, Prompt]]) -> list[float | None]:
        self.asked += len(pairs)
        return [self._one(a.getpixel((0, 0)), b.getpixel((0, 0))) for a, b, _ in pairs]

    def _one(self, a: int, b: int) -> float | None:
        if {a, b} & self.silent:
            return None
        if abs(a - b) <= self.bias:
            return 1.0
        return float(a > b)


def images(*values: int) -> list[Image.Image]:
    return [Image.new("L", (2, 2), value) for value in values]


def test_all_pairs_give_the_share_beaten() -> None:
    judge = Judge()
    found = WinRate(judge, None, True, 0)(images(30, 10, 20), [PROMPT] * 3)
    np.testing.assert_allclose(found.values, [1, 0, 0.5])
    assert judge.asked == 6  # both orders
    assert found.evidence[1] == {"opponents": [0, 2], "wins": [0.0, 0.0]}


def test_a_taste_for_the_first_place_becomes_a_tie() -> None:
    pictures = images(30, 28, 10)
    np.testing.assert_allclose(WinRate(Judge(bias=5), None, True, 0)(pictures, [PROMPT] * 3).values, [0.75, 0.75, 0])
    one_order = WinRate(Judge(bias=5), None, False, 0)(pictures, [PROMPT] * 3)
    np.testing.assert_allclose(one_order.values, [1, 0.5, 0])


def test_unanswered_comparisons_are_left_out_and_an_image_without_any_is_missing() -> None:
    found = WinRate(Judge(silent=frozenset({20})), None, True, 0)(images(30, 10, 20), [PROMPT] * 3)
    np.testing.assert_allclose(found.values, [1, 0, np.nan])
    assert found.evidence[2] == {"opponents": [0, 1], "wins": [None, None]}


@pytest.mark.parametrize("budget", [3, 8, 11, 15])
def test_a_budget_of_pairs_links_all_images(budget: int) -> None:
    for draw in range(20):
        pairs = choose_pairs(8, budget, numpy_rng(0, "test", draw))
        assert len(pairs) == len(set(pairs)) == max(8, budget)  # never fewer than the ring
        reached, before = {0}, set()
        while reached != before:
            before = set(reached)
            reached |= {x for pair in pairs if set(pair) & reached for x in pair}
        assert reached == set(range(8))
    assert choose_pairs(4, None, numpy_rng(0, "test")) == list(itertools.combinations(range(4), 2))


def test_bradley_terry_is_a_maximum_of_its_likelihood() -> None:
    """The gradient of sum_ij w_ij log p_i/(p_i + p_j) + prior vanishes, against finite differences."""
    rng = np.random.default_rng(0)
    wins = rng.uniform(size=(6, 6))
    wins = np.where(np.eye(6), np.nan, np.triu(wins, 1) + np.tril(1 - wins.T, -1))
    wins[0, 3] = wins[3, 0] = np.nan

    def likelihood(logs: np.ndarray) -> float:
        p = np.exp(logs)
        total = sum(
            wins[i, j] * np.log(p[i] / (p[i] + p[j])) for i in range(6) for j in range(6) if np.isfinite(wins[i, j])
        )
        return total + sum(0.05 * np.log(x / (x + 1)) + 0.05 * np.log(1 / (x + 1)) for x in p)

    logs = np.log(bradley_terry(wins))
    best = max((likelihood(logs + shift), shift) for shift in np.linspace(-0.5, 0.5, 2001))[1]  # mean log 0 is ours
    for i in range(6):
        step = np.zeros(6)
        step[i] = 1e-5
        slope = (likelihood(logs + best + step) - likelihood(logs + best - step)) / 2e-5
        assert abs(slope) < 2e-3


def test_few_comparisons_recover_the_order() -> None:
    """16 images, noiseless answers to a quarter of the pairs: close to the true win rates."""
    truth = np.random.default_rng(1).permutation(16)
    wins = np.full((16, 16), np.nan)
    for i, j in choose_pairs(16, 60, numpy_rng(0, "pairs")):
        wins[i, j] = float(truth[i] > truth[j])
        wins[j, i] = 1 - wins[i, j]
    rates = expected_shares(wins)
    assert np.corrcoef(rates, truth)[0, 1] > 0.9
    np.testing.assert_allclose(rates.mean(), 0.5)
    assert np.corrcoef(shares(wins), truth)[0, 1] < np.corrcoef(rates, truth)[0, 1]


def test_a_win_for_ever_stays_finite() -> None:
    wins = np.array([[np.nan, 1.0], [0.0, np.nan]])
    assert np.isfinite(np.log(bradley_terry(wins))).all()


def test_any_pointwise_reward_compares(tmp_path, monkeypatch) -> None:
    (tmp_path / "bright_rewards.py").write_text(
        "import numpy as np\nCALLS = []\n"
        "def bright(images, prompts):\n    CALLS.append(len(images))\n"
        "    return [float(np.asarray(i).mean()) for i in images]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = load_reward({"name": "win_rate", "comparator": "bright_rewards:bright"})
    found = reward([i.convert("RGB") for i in images(10, 40, 10)], [PROMPT] * 3)
    np.testing.assert_allclose(found.values, [0.25, 1, 0.25])
    import bright_rewards

    assert bright_rewards.CALLS == [3]  # each image scored once
    assert reward.grouped
    assert reward.name == "win_rate.bright_rewards.bright"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "win_rate"}, "score.reward.comparator is missing"),
        ({"name": "win_rate", "comparator": "ocrr"}, '"ocrr" is not a comparator; did you mean "ocr"'),
        ({"name": "win_rate", "comparator": "ocr", "pairs": 1}, "score.reward.pairs is 1; expected at least 2"),
        (
            {"name": "win_rate", "comparator": {"name": "win_rate", "comparator": "ocr"}},
            "compares the images of a group itself",
        ),
    ],
)
def test_bad_input(spec: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(spec)


def test_comparators_are_loaded_by_name() -> None:
    assert load_comparator("ocr", "x").name == "ocr"
