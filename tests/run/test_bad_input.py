"""Bad input is refused before any long work: exit code 2, one line that names the field or file, no traceback."""

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from small_run import REWARDS, small_run, start

from gdro.cli import main
from gdro.common.files import discard
from gdro.models.loading import FAMILIES
from gdro.stages import train
from gdro.training.learner import Learner
from gdro.training.step import train_step


class Workplace:
    """A folder with a small run's files, and the command line working in it."""

    def __init__(self, folder: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.config, self.out, self._capsys = folder, config, folder / "out", capsys

    def run(self, command: str, *arguments: str) -> tuple[int, str]:
        """(exit code, stderr)."""
        code = main([command, str(self.config), "--out", str(self.out), *arguments])
        return code, self._capsys.readouterr().err

    def refuses(self, *arguments: str, command: str = "run") -> str:
        """The one line with which the command is refused."""
        code, err = self.run(command, *arguments)
        assert code == 2, err
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert err.startswith("gdro: ")
        return err

    def refuses_at_once(self, *arguments: str, command: str = "run") -> str:
        line = self.refuses(*arguments, command=command)
        assert not (self.out / "groups").exists()
        assert not (self.out / "config.yaml").exists()
        return line


@pytest.fixture
def work(
    tmp_path: Path, flux_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Workplace:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return Workplace(tmp_path, small_run(tmp_path, flux_folder), capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.kk", "3"], 'unknown option --train.kk; did you mean "--train.k"?'),
        (["--ouut", "x"], 'unknown option --ouut; did you mean "--out"?'),
        (["--train.k"], "--train.k has no value; expected --train.k VALUE"),
        (["--train.k", "3", "--train.k=3"], "--train.k is given twice; expected once"),
        (["--engine", "rey"], 'engine is "rey"; expected "local" or "ray"'),
        (["--train.k", "six"], 'train.k is "six"; expected an integer'),
        (["--train.k", "2.5"], "train.k is 2.5; expected an integer"),
        (["--train.k", "5"], "train.k is 5; expected at most sample.images_per_prompt, which is 4"),
        (["--train.k", "1"], "train.k is 1; expected a number greater than or equal to 2"),
        (["--train.tau", "-0.05"], "train.tau is -0.05; expected a number greater than or equal to 0.000001"),
        (["--train.validation_prompts", ""], "--train.validation_prompts is empty; expected --train.validation_pro"),
        (["--train.resume_from_checkpoint= "], "--train.resume_from_checkpoint is empty; expected"),
        (["--train.resume_from_checkpoint", "."], "train.resume_from_checkpoint: . is not a gdro checkpoint"),
        (["--model", "no_such_folder"], "model: no_such_folder not found; expected"),
        (["--model", "."], "model: . has no model_index.json; expected"),
        (["--sample.prompts", "none.jsonl"], "sample.prompts: none.jsonl not found; expected"),
        (["--evaluate.prompts", "tiny:ocr:tset:9"], 'evaluate.prompts: "tiny:ocr:tset:9" names the split "tset"'),
        (
            ["--score.reward", "ocrr"],
            'score.reward: "ocrr" is neither a reward nor module:function; did you mean "ocr"?',
        ),
        (["--score.reward", "my_rewards:redish"], 'has nothing named "redish"; did you mean "redness"?'),
        (
            ["--score.reward", "my_rewards:missing"],
            'reward "my_rewards:missing" returned nan; expected a finite number',
        ),
        (["--score.reward", "my_rewards:short"], 'reward "my_rewards:short" returned 1 values for 2 images'),
        (
            [
                "--score.reward",
                "{name: win_rate, comparator: my_rewards:short}",
                "--evaluate.reward",
                "jpeg_compressibility",
            ],
            'reward "my_rewards:short" returned 1 values for 2 images',
        ),
        (
            ["--score.reward", "my_rewards:broken"],
            "raised AttributeError: 'Image' object has no attribute 'redness' (my_rewards.py, line 22)",
        ),
        (["--score.reward", "{nam: ocr}"], "score.reward has no name; expected a name, or a section such as"),
        (["--score.reward", "{name: ocr, standardise: false}"], 'no such option; did you mean "standardize"?'),
        (["--evaluate.judge", "my_rewards:redness"], 'judge "my_rewards:redness" returned list; expected a dictionary'),
        (["--evaluate.judge", "tiny"], "scene"),
        (["--sample.scheduler", "DDIM"], 'sample.scheduler is "DDIM"; expected'),
        (["--train.resume_from_checkpoint", "none"], "train.resume_from_checkpoint"),
        (["--train.target_modules", "[to_q, to_x]"], "train.target_modules: 'to_x' matches no linear layer"),
        (["--train.target_modules", "atention"], "train.target_modules: 'atention' is not a preset; did you mean"),
    ],
)
def test_one_line_before_any_work(work: Workplace, arguments: list[str], message: str) -> None:
    assert message in work.refuses_at_once(*arguments)


def test_ids_that_two_rounds_would_share(work: Workplace) -> None:
    prompts = work.folder / "train.jsonl"
    prompts.write_text(prompts.read_text().replace('"train3"', '"train0@1"'))
    line = work.refuses_at_once("--rounds.train_steps", "2", "--rounds.prompts", "2")
    assert 'sample.prompts has the ids "train0" and "train0@1"' in line


def test_an_engine_that_is_not_installed(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdro.runner.checks.find_spec", lambda name: None)
    line = work.refuses_at_once("--engine", "ray")
    assert line == 'gdro: engine is "ray", which is not installed; expected pip install "gdro[ray]", or local\n'


def test_two_engines_at_once(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdro.runner.checks.find_spec", lambda name: name)
    monkeypatch.setattr("gdro.common.distributed.size", lambda: 2)
    line = work.refuses_at_once("--engine", "ray")
    assert line == 'gdro: engine is "ray", but there are 2 processes; expected one, or local\n'


@pytest.mark.parametrize("kind", ['"StableDiffusionPipeline"', '["FluxPipeline"]'])
def test_a_model_of_an_unknown_class(work: Workplace, kind: str) -> None:
    (work.folder / "other").mkdir()
    (work.folder / "other" / "model_index.json").write_text(f'{{"_class_name": {kind}}}')
    line = work.refuses_at_once("--model", "other")
    assert "model: other is a" in line
    assert all(family in line for family in FAMILIES)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("tokenizer_2/tokenizer.json", "tokenizer_2/tokenizer.json not found; expected"),
        ("vae/config.json", "vae/config.json not found; expected what the AutoencoderKL is made of"),
    ],
)
def test_a_component_that_a_library_would_make_up(work: Workplace, file: str, message: str) -> None:
    shutil.copytree(yaml.safe_load(work.config.read_text())["model"], work.folder / "model")
    (work.folder / "model" / file).unlink()
    for command in ("run", "sample"):
        assert f"gdro: model: model: {message}" in work.refuses_at_once("--model", "model", command=command)


def test_a_vae_replaced_after_training(work: Workplace) -> None:
    """The adapter was trained on images of another one: base and tuned would not show what was trained."""
    model = work.folder / "model"
    shutil.copytree(yaml.safe_load(work.config.read_text())["model"], model)
    few = ("--model", str(model), "--train.max_train_steps", "1", "--train.groups_per_step", "1")
    for command in ("sample", "score", "train"):
        assert work.run(command, *few)[0] == 0
    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    state = {name: value.clone() for name, value in load_file(vae).items()}
    state["decoder.conv_out.bias"] += 0.5
    save_file(state, vae, metadata={"format": "pt"})
    for command in ("evaluate", "run"):
        code, err = work.run(command, *few)
        assert code == 2
        line = err.splitlines()[-1]
        assert f"gdro: model: {model} has revision 'sha256:" in line
        assert "was trained on 'sha256:" in line
    assert not (work.out / "evaluation").exists()


def test_prompts_that_are_cut(work: Workplace) -> None:
    """Said before any work, with one of them; refused where the OCR reward looks for what is cut off."""
    few = ("--sample.max_sequence_length", "10")
    line = work.refuses_at_once("--score.reward", "ocr", *few)
    assert 'max_sequence_length is 10, at which the train prompt "train0" is cut after "a sign \\""' in line
    assert "before the end of the text that the reward ocr looks for; expected more tokens" in line
    code, err = work.run("sample", *few)
    assert code == 0
    said = 'max_sequence_length is 10: 4 of 4 prompts are cut, such as "train0" after "a sign \\""'
    assert err.startswith(f"{said}\n")
    assert "are cut" not in work.run("sample", *few)[1]  # finished before


def test_unknown_key_in_the_file(work: Workplace) -> None:
    work.config.write_text(work.config.read_text().replace("max_train_steps", "max_steps"))
    assert 'unknown field "train.max_steps"; did you mean "train.max_train_steps"?' in work.refuses_at_once()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a sign without a word"}\n', "double quotes"),
        ('{"prompt": "a sign \\"\\""}\n', "quote"),
        ('{"id": "a", "prompt": "a \\"A\\""}\n{"id": "a", "prompt": "a \\"B\\""}\n', 'two prompts with the id "a"'),
        ("no json\n", "train.jsonl:1 is not JSON"),
    ],
)
def test_bad_prompt_files(work: Workplace, text: str, message: str) -> None:
    (work.folder / "train.jsonl").write_text(text)
    assert message in work.refuses_at_once("--score.reward", "ocr")


def test_prompts_that_are_not_held_out(work: Workplace) -> None:
    (work.folder / "test.jsonl").write_text((work.folder / "train.jsonl").read_text())
    assert "evaluate.prompts has 4 of sample.prompts" in work.refuses_at_once()
    rows = [json.loads(line) for line in (work.folder / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt"] = f" {row['prompt'].upper()}".replace(" ", "  ")
    (work.folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "evaluate.prompts has 4 of sample.prompts" in work.refuses_at_once()
    (work.folder / "test.jsonl").write_text((work.folder / "validation.jsonl").read_text())
    assert "train.validation_prompts has 2 of evaluate.prompts" in work.refuses_at_once()


def test_functions_changed_after_sampling_are_tried_before_training(work: Workplace) -> None:
    assert work.run("sample")[0] == 0
    assert work.run("score")[0] == 0
    for command in ("train", "run"):
        line = work.refuses("--evaluate.judge", "my_rewards:redness", command=command)
        assert "returned list; expected a dictionary" in line
    assert not (work.out / "checkpoints").exists()


def test_commands_and_options(work: Workplace) -> None:
    for arguments, message in (
        (["smaple"], 'unknown command "smaple"; did you mean "sample"?'),
        ([], "expected"),
        (["run", str(work.config)], "--out"),
        (["run", "none.yaml", "--out", "out"], "none.yaml not found"),
        (["prompts", "--out", "p.jsonl"], "expected gdro:TASK:SPLIT[:COUNT], tiny:TASK:SPLIT:COUNT[:SEED], or"),
        (["prompts", "tiny:ocr:train:0", "--out", "p.jsonl"], '"0"'),
    ):
        assert main(arguments) == 2
        err = work._capsys.readouterr().err
        assert err.count("\n") == 1
        assert message in err or not arguments


def test_stages_before_their_time(work: Workplace) -> None:
    assert "holds no groups" in work.refuses_at_once(command="score")
    assert "holds no groups" in work.refuses_at_once(command="train")
    assert "holds no checkpoint" in work.refuses_at_once(command="evaluate")
    assert "holds no checkpoint" in work.refuses_at_once(command="export")


def test_groups_that_do_not_fit_the_training(work: Workplace) -> None:
    """Groups brought from another run, made with another guidance or text length, are not trained on."""
    assert work.run("sample")[0] == 0
    assert work.run("score")[0] == 0
    made = work.out
    for field, value, old in (("guidance_scale", "5.0", "3.5"), ("max_sequence_length", "24", "32")):
        work.out = work.folder / field
        for part in ("groups", "rewards"):
            shutil.copytree(made / part, work.out / part)
        for command in ("train", "run"):
            line = work.refuses(f"--sample.{field}", value, command=command)
            assert f"sample.{field}: {value}, but the groups in" in line
            assert f"were made with {old}" in line
        assert not (work.out / "metrics.jsonl").exists()


@pytest.mark.slow
def test_changed_configuration_truncated_file_and_full_disk(work: Workplace) -> None:
    assert work.run("sample")[0] == 0
    line = work.refuses("--sample.guidance_scale", "5")
    assert "sample.guidance_scale is 5.0 but" in line
    assert "has 3.5" in line
    assert work.run("score")[0] == 0

    # a full disk, as the system tells a process that may write no more than 500 bytes to a file
    rewards = work.out / "rewards" / "my_rewards.redness.parquet"
    before = rewards.read_bytes()
    module = work.folder / "my_rewards.py"
    module.write_text(module.read_text() + "# another version\n")
    command = start(
        work.folder, "score", str(work.config), "--out", str(work.out),
        preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),
    )  # fmt: skip
    _, err = command.communicate(timeout=300)
    assert command.returncode == 2, err
    lines = [line for line in err.splitlines() if not line.startswith("score ")]  # progress apart
    assert len(lines) == 1
    assert "could not be written" in lines[0]
    assert rewards.read_bytes() == before

    # other versions of a reward: not trained on before scoring, not scored by after training
    line = work.refuses(command="train")
    assert "score.reward: my_rewards.redness has version" in line
    assert 'run "gdro score" again' in line
    module.write_text(REWARDS)
    assert work.run("train", "--train.learning_rate", "1e-3")[0] == 0
    module.write_text(REWARDS + "# another version\n")
    for stage in ("run", "score", "train"):
        assert "expected the version trained on, or another --out" in work.refuses(
            "--train.learning_rate", "1e-3", command=stage
        )
    module.write_text(REWARDS)

    line = work.refuses("--train.learning_rate", "1e-3", "--train.beta", "6")
    assert "train.beta is 6.0 but" in line
    assert "has 12.0" in line
    assert "evaluate.judge is null but" in work.refuses("--train.learning_rate", "1e-3", "--evaluate.judge", "null")
    assert "seed is 3 but" in work.refuses("--train.learning_rate", "1e-3", "--seed", "3")
    own = work.out / "config.yaml"
    written = own.read_text()
    work.config = own
    own.write_text(written.replace("beta: 12.0", "beta: 6.0"))
    assert "train.beta is 6.0 but" in work.refuses()
    own.write_text(written)

    groups = work.out / "groups" / "groups-00001.parquet"
    groups.write_bytes(groups.read_bytes()[:-10])
    for stage in ("run", "score", "train"):
        assert str(groups) in work.refuses(command=stage)


def test_groups_with_a_gap_are_sampled_again_and_half_of_them_not_trained_on(work: Workplace) -> None:
    assert work.run("sample")[0] == 0
    folder = work.out / "groups"
    whole = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    (folder / "groups-00001.parquet").unlink()
    assert "has groups-00002.parquet but no groups-00001.parquet" in work.refuses(command="score")
    assert work.run("sample")[0] == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == whole

    (folder / "groups-00003.parquet").unlink()
    assert work.run("score")[0] == 0
    assert "holds 3 groups, which are not those of the 4 sample.prompts" in work.refuses(command="train")


def test_images_of_another_size_are_not_imported(work: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"file_name": f"{i}.png", "prompt": "a", "reward": i, "group": "g"} for i in range(3)]
    for row in rows:
        Image.new("RGB", (48, 32)).save(work.folder / str(row["file_name"]))
    (work.folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["import", str(work.folder), "--config", str(work.config), "--out", str(work.out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gdro: sample.height, sample.width: 64x32, but ")
    assert err.endswith("0.png is 48x32; expected the same, or [32, 48] in sample.buckets\n")
    assert not (work.out / "groups").exists()


def test_training_settings_may_change_until_there_is_a_checkpoint(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(one: Learner, step: int) -> dict[str, float]:
        for weight in one.policies.parameters.values():
            weight.data.fill_(float("inf"))
        return train_step(one, step)

    assert work.run("sample")[0] == 0
    assert work.run("score")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", diverge)
        line = work.run("train")[1]
    assert "Copy groups/ and rewards/ to another --out" in line
    discard(work.out / "checkpoints")
    assert (work.out / "validation" / "step-000000").exists()
    changed = ("--evaluate.images_per_prompt", "3", "--train.max_train_steps", "1", "--train.beta", "6")
    assert work.run("train", *changed)[0] == 0
    assert work.run("train", *changed)[0] == 0


def test_folders_that_a_run_finds_are_left_alone(work: Workplace) -> None:
    """--out may be where the user's own files lie."""
    mine = work.out / "validation" / "photos" / "1.png"
    mine.parent.mkdir(parents=True)
    mine.write_text("")
    assert work.run("sample")[0] == 0
    assert mine.exists()


def test_validation_prompts_given_up_before_training_leave_no_file(work: Workplace) -> None:
    assert work.run("sample")[0] == 0
    assert (work.out / "prompts" / "validation.jsonl").exists()
    assert work.run("score", "--train.validation_prompts", "null")[0] == 0
    assert not (work.out / "prompts" / "validation.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--train.kk", "3"], ["--score.reward", "my_rewards:missing"], ["--model", "gone"]]
)
def test_a_process_ends_with_exit_code_2_and_one_line(work: Workplace, arguments: list[str]) -> None:
    command = start(work.folder, "run", str(work.config), "--out", "out", *arguments)
    out, err = command.communicate(timeout=300)
    assert command.returncode == 2
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert not (work.folder / "out" / "groups").exists()
