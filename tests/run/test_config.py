"""The configuration: strict, overridable by dotted names, one-line errors, the same after saving and loading."""

from pathlib import Path

import pytest
import yaml

from gdro.common.errors import UserError
from gdro.common.yaml import dump_yaml, parse_yaml
from gdro.objectives.forward.dpo import Dpo
from gdro.objectives.forward.gdro import Gdro, Rank
from gdro.objectives.forward.sft import Sft
from gdro.runner.config import CONFIG, RENAMED, RunConfig, check_unchanged, load_config, save_config, savings, validate
from gdro.tools.comparison.spec import load_spec

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALL = """
model: some/model
sample: {prompts: train.jsonl}
evaluate: {prompts: test.jsonl}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def config(**sections: dict) -> RunConfig:
    data = parse_yaml(SMALL, "small")
    for name, fields in sections.items():
        data[name] = data.get(name, {}) | fields
    return validate(data)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_reads_the_same_by_any_yaml_reader(path: Path) -> None:
    load_spec(path) if path.stem == "comparison" else load_config(path)
    assert yaml.safe_load(path.read_text()) == parse_yaml(path.read_text(), str(path))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.k", "4", 4),
        ("train.learning_rate", "1e-4", 1e-4),
        ("train.micro_batch_groups", "null", None),
        ("train.report_to", "[tensorboard]", ["tensorboard"]),
        ("train.target_modules", "[to_q, to_k]", ["to_q", "to_k"]),
        ("model", "1234/5678", "1234/5678"),
        ("mixed_precision", "no", "no"),
        ("score.reward", "my_module:my_function", "my_module:my_function"),
    ],
)
def test_an_override_sets_any_field(small: Path, name: str, text: str, value: object) -> None:
    found = load_config(small, [(name, text)])
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_an_objectives_hyperparameters_have_dotted_names(small: Path) -> None:
    assert load_config(small, [("train.gamma", "0")]).train.objective == Gdro(gamma=0.0)
    found = load_config(small, [("train.objective", "{name: dpo, beta: 5}"), ("train.beta", "6"), ("train.k", "2")])
    assert found.train.objective == Dpo(beta=6.0)


def test_another_objective_on_a_resolved_configuration_brings_its_own_defaults(small: Path, tmp_path: Path) -> None:
    save_config(load_config(small, [("train.beta", "3")]), tmp_path)
    assert load_config(tmp_path / CONFIG).train.objective == Gdro(beta=3.0)
    for name, objective in (("sft", Sft()), ("rank", Rank())):
        assert load_config(tmp_path / CONFIG, [("train.objective", name)]).train.objective == objective


def test_the_old_name_of_a_reference_is_refused_with_the_new_one(small: Path) -> None:
    with pytest.raises(
        UserError, match=r'^train\.reference is "round"; expected "base", "old" or "ema" \(round is now'
    ):
        load_config(small, [("train.reference", "round")])


def test_another_objective_on_a_recipe_does_too() -> None:
    """The demo's beta, tau and gamma stand beside its objective; what the command line says stays."""
    assert load_config("demo", [("train.objective", "sft")]).train.objective == Sft()
    found = load_config("demo", [("train.beta", "5"), ("train.objective", "dpo")])
    assert (found.train.objective, found.train.learning_rate) == (Dpo(beta=5.0), 8e-4)
    with pytest.raises(UserError, match=r'^train\.tau is 0\.1, which objective "sft" does not have'):
        load_config("demo", [("train.objective", "sft"), ("train.tau", "0.1")])


OWN = """
from dataclasses import dataclass
from typing import ClassVar
from gdro.objectives.base import ForwardObjective
@dataclass(frozen=True)
class Hinge(ForwardObjective):
    margin: float = 0.1
    uses_reference: ClassVar = "error"
    reference: str = "base"
    def loss(self, batch):
        loss = (self.margin + batch.d[:, 0] - batch.d[:, -1]).clamp_min(0)
        return loss, {"loss_rank": loss.detach()}
class Plain: pass
@dataclass(frozen=True)
class Lossless(ForwardObjective):
    margin: float = 0.1
"""


def test_an_objective_of_your_own(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_hinges.py").write_text(OWN)
    found = load_config(small, [("train.objective", "my_hinges:Hinge"), ("train.margin", "0.5")])
    assert found.train.objective.margin == 0.5
    save_config(found, tmp_path)
    assert load_config(tmp_path / CONFIG) == found
    for name, said in (
        ("my_hinges:Hing", 'has nothing named "Hing"; did you mean "Hinge"'),
        ("my_hinges:Lossless", '"my_hinges:Lossless" has no loss; expected'),
        ("my_hinges:Plain", '"my_hinges:Plain" is not an objective; expected a frozen dataclass'),
    ):
        with pytest.raises(UserError, match=f"^train.objective: .*{said}"):
            load_config(small, [("train.objective", name)])
    with pytest.raises(UserError, match=r'^train\.margin is "wide"; expected a number'):
        load_config(small, [("train.objective", "my_hinges:Hinge"), ("train.margin", "wide")])


@pytest.mark.parametrize("name", RENAMED)
def test_an_old_name_is_refused_with_the_new_one(small: Path, name: str) -> None:
    with pytest.raises(UserError, match=f'^unknown field "{name}"; it is now "{RENAMED[name]}"$'):
        load_config(small, [(name, "1")])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.k", "six", 'train.k is "six"; expected an integer'),
        ("train.k", "2.5", "train.k is 2.5; expected an integer"),
        ("train.k", "6.0", "train.k is 6.0; expected an integer"),
        ("train.k", '"6"', 'train.k is "6"; expected an integer'),
        ("train.k", "true", "train.k is true; expected an integer"),
        ("train.k", "1", "train.k is 1; expected a number greater than or equal to 2"),
        ("train.k", "17", "train.k is 17; expected at most sample.images_per_prompt, which is 16"),
        ("train.tau", "-0.05", "train.tau is -0.05; expected a number greater than or equal to 0.000001"),
        ("train.tau", "0", "train.tau is 0; expected a number greater than or equal to 0.000001"),
        ("train.tau", ".nan", 'train.tau is ".nan"; expected a number'),
        ("train.tau", "1e999", "--train.tau:1: 1e999; expected a finite number"),
        (
            "train.objective",
            "gdr",
            'train.objective: "gdr" is neither an objective nor a module:Class; did you mean "gdro"?',
        ),
        ("train.objective", "3", "train.objective is 3; expected a string"),
        (
            "train.advantage",
            "group",
            'train.advantage is "group", which objective "gdro" does not have; expected one of beta',
        ),
        ("train.target_modules", "3", "train.target_modules is 3; expected a string or a list"),
        (
            "train.images_per_pass",
            "2",
            'train.images_per_pass is 2, but train.group_gradient is "auto"; expected null, or',
        ),
        ("train.micro_batch_groups", "x", 'train.micro_batch_groups is "x"; expected an integer'),
        ("train", "4", "train is 4; expected a section of fields"),
        ("train.kk", "4", 'unknown field "train.kk"; did you mean "train.k"?'),
        ("train.learing_rate", "4", 'unknown field "train.learing_rate"; did you mean "train.learning_rate"?'),
        ("trian.k", "4", 'unknown field "trian"; did you mean "train"?'),
        ("tau", "0.1", 'unknown field "tau"; did you mean "train.tau"?'),
        ("sample.guidance", "1", 'unknown field "sample.guidance"; did you mean "sample.guidance_scale"?'),
        ("model.name", "x", 'model is "some/model"; expected a section, for --model.name'),
        ("sample.height", "[", "--sample.height:1: "),
        ("quantization", "int4", 'quantization is "int4"; expected'),
        ("compile", "1", "compile is 1; expected"),
        ("seed", "-1", "seed is -1; expected a number greater than or equal to 0"),
        ("evaluate.judge", "3", "evaluate.judge is 3; expected a string"),
    ],
)
def test_a_mistake_is_named_with_its_value_and_what_was_expected(
    small: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(small, [(name, text)])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_file_of_a_comparison_names_the_command_it_is_for() -> None:
    with pytest.raises(UserError, match=r"^comparison describes a comparison of methods, .*; expected `gdro compare"):
        load_config("comparison")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", 'bad.yaml:2: the key "model" a second time'),
        ("sample: {prompts: x}\n", "evaluate is missing; expected a value"),
        ("sample: {}\nevaluate: {prompts: x}\n", "sample.prompts is missing; expected a value"),
        ("- a\n", 'bad.yaml holds ["a"]; expected sections'),
        ("", "bad.yaml holds null; expected sections"),
        ("a: b: c\n", "bad.yaml:1: mapping values are not allowed here"),
        ("1: 2\n", "bad.yaml:1: key 1; expected a word"),
        ("train: !!python/object:os.system {}\n", "bad.yaml:1: could not determine a constructor"),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(message)


def test_saved_configuration_loads_as_itself(tmp_path: Path) -> None:
    tricky = config(score={"reward": "1e5:no"}, train={"learning_rate": 1e-5, "report_to": ["tensorboard"]})
    save_config(tricky, tmp_path)
    assert load_config(tmp_path / CONFIG) == tricky
    assert yaml.safe_load((tmp_path / CONFIG).read_text()) == tricky.model_dump(mode="json")


@pytest.mark.parametrize("value", ["no", "null", "1e5", "2024-01-01", "0x1F", "", ".5", "1:30", "tiny:ocr:test:1", "ü"])
def test_words_stay_words(value: str) -> None:
    assert parse_yaml(dump_yaml({"a": value}), "x") == {"a": value} == yaml.safe_load(dump_yaml({"a": value}))


def test_a_changed_field_is_refused_with_both_values_once_its_stage_has_begun(tmp_path: Path) -> None:
    save_config(config(), tmp_path)
    changed = config(train={"k": 4})
    with pytest.raises(UserError, match=r"train\.k is 4 but .*config\.yaml has 6; expected"):
        check_unchanged(changed, tmp_path, {"sample", "train"})
    check_unchanged(changed, tmp_path, {"sample"})  # training has not begun
    check_unchanged(changed, tmp_path, set())
    check_unchanged(config(), tmp_path, {"sample", "train", "evaluate"})


def test_what_changes_no_result_may_change(tmp_path: Path) -> None:
    save_config(config(), tmp_path)
    free = config(
        sample={"batch_size": 3}, score={"workers": 1}, train={"checkpointing_steps": 7, "max_train_steps": 900}
    )
    check_unchanged(free, tmp_path, {"sample", "train", "evaluate"})


def test_the_seed_is_fixed_by_any_stage(tmp_path: Path) -> None:
    save_config(config(), tmp_path)
    other = validate(parse_yaml(SMALL, "small") | {"seed": 1})
    with pytest.raises(UserError, match=r"seed is 1 but .* has 0"):
        check_unchanged(other, tmp_path, {"sample"})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"objective": "nft"}, 'expected null for objective "nft", which sees its reference\'s velocities'),
        ({"objective": "sft"}, 'expected null for objective "sft", which has no reference'),
        ({"reference": "ema"}, 'and train.reference "ema", which moves; expected null, or base'),
        ({"objective": "flow_grpo"}, 'expected null for objective "flow_grpo"'),
    ],
)
def test_a_pool_of_draws_needs_a_frozen_reference_and_its_errors_alone(train: dict, message: str) -> None:
    sample = {"sampler": "flow_grpo" if train.get("objective") == "flow_grpo" else "ode"}
    with pytest.raises(UserError, match=r"^train\.reference_draws is 8(;|) " + message):
        config(sample=sample, train={"reference_draws": 8} | train)


def test_what_is_done_already_is_not_recommended() -> None:
    train = {"group_gradient": "two_pass", "gradient_checkpointing": True}
    small = RunConfig.model_validate(
        {
            "model": "tiny",
            "sample": {"prompts": "p", "batch_size": 1},
            "train": train,
            "mixed_precision": "bf16",
            "quantization": "int8",
            "evaluate": {"prompts": "q"},
        }
    )
    assert savings(small, "sample") == savings(small, "train") == ["smaller images"]
