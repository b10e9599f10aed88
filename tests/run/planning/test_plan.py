"""A plan against what it is a plan of: the loaded model, its passes, a store, a run."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_pipelines import PIPELINES
from small_run import small_run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from gdro.cli import main
from gdro.common.errors import UserError
from gdro.common.prompts import read_prompts
from gdro.common.sealed import read_record
from gdro.groups.sampling import sample_groups
from gdro.models import load_model
from gdro.runner.config import RunConfig, load_config
from gdro.runner.pipeline import run
from gdro.runner.planning.gpus import gpu
from gdro.runner.planning.ledger import Operation, Work
from gdro.runner.planning.plan import memory_parts, micro_batch_of, plan, refuse
from gdro.runner.planning.report import plan_run, prompt_counts
from gdro.runner.planning.shapes import KNOWN, configurations, shapes_of
from gdro.tiny.prompts import tiny_prompts
from gdro.training.micro_batch import saved_bytes

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LENGTH, N, SCALE = 16, 3, 4.0


def config_of(folder: Path, model: Path | str, *overrides: tuple[str, str]) -> RunConfig:
    folder.mkdir(exist_ok=True)
    return load_config(
        small_run(folder, Path(model)), [("model", str(model)), ("sample.max_sequence_length", str(LENGTH)), *overrides]
    )


class Real:
    """The model of a configuration, loaded, with the passes that a plan counts."""

    def __init__(self, config: RunConfig) -> None:
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.model: Any = load_model(config.model, device=CPU, dtype=dtype)
        train = config.train
        self.base = sum(p.numel() for p in self.model.transformer.parameters())
        self.model.add_adapter(rank=train.rank, alpha=train.lora_alpha, targets=train.target_modules, seed=0)
        self.text = self.model.encode_text(["a b c d"] * N, LENGTH)
        for name in self.text:
            if name.endswith("mask"):  # a plan takes every prompt to be as long as it can be
                self.text[name][:] = True
        self.x, self.t = torch.randn(N, *self.model.latent_shape(32, 64)), torch.rand(N)

    def velocity(self) -> torch.Tensor:
        return self.model.velocity(self.x, self.t, self.text, guidance_scale=SCALE, height=32, width=64)

    def reference(self) -> None:
        with torch.no_grad(), self.model.adapter_disabled():
            self.velocity()

    def learn(self) -> None:
        self.velocity().square().mean().backward()


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # torch counts no CPU's flash kernel
        run()
    return counter.get_total_flops()


def peak(run: Callable[[], Any]) -> int:
    """Most bytes that `run` had at once, by the allocator's own account."""
    run()  # what the first call alone makes: gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    found = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    now = most = 0
    for _, size in found:
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize("family", PIPELINES)
def test_parameters_and_flops_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        PIPELINES[family]().save_pretrained(tmp_path / "model")
    config = config_of(tmp_path / "run", tmp_path / "model", ("sample.guidance_scale", str(SCALE)))
    shapes, real = shapes_of(config, cuda=False), Real(config)
    assert shapes.transformer.parameters == real.base
    assert shapes.trainable == sum(p.numel() for p in real.model.adapter().values())
    assert shapes.latent == real.x.shape[1:]
    assert shapes.base.flops * N == flops(real.reference)
    before = real.model.nfe
    real.reference()
    assert shapes.nfe * N == real.model.nfe - before
    learning = flops(real.learn) / N  # the plan's attention computes its scores once more on the way back
    assert learning <= shapes.learning.flops <= 1.1 * learning
    text = {name: tuple(value.shape[1:]) for name, value in real.text.items()}
    planned = real.model.text_shapes(LENGTH)
    if family == "qwen-image":  # a blank prompt's length is the tokenizer's
        assert text.pop("negative_prompt_embeds")[1:] == planned.pop("negative_prompt_embeds")[1:]
    assert text == planned


@pytest.mark.parametrize("precision", ['"no"', "bf16"])
def test_memory_is_what_autograd_keeps_and_the_allocator_gives(
    precision: str, flux_folder: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path, flux_folder, ("mixed_precision", precision), ("sample.guidance_scale", str(SCALE)))
    shapes, real = shapes_of(config, cuda=False), Real(config)
    weights = {p.untyped_storage().data_ptr() for p in real.model.transformer.parameters()}
    kept = saved_bytes(real.velocity, besides=weights)
    assert shapes.saved * N + shapes.learning.shared_peak == pytest.approx(kept, rel=0.15)
    assert shapes.learning.memory(N) == pytest.approx(peak(real.learn), rel=0.15)
    assert shapes.base.memory(N) == pytest.approx(peak(real.reference), rel=0.15)


def test_checkpointing_keeps_little_and_computes_again(flux_folder: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, flux_folder, ("train.gradient_checkpointing", "true"))
    shapes, real = shapes_of(config, cuda=False), Real(config)
    real.model.checkpoint_activations(True)
    assert shapes.learning.memory(N) == pytest.approx(peak(real.learn), rel=0.15)
    assert shapes.learning.flops == pytest.approx(flops(real.learn) / N, rel=0.1)
    for precision in ('"no"', "bf16"):  # as on a GPU too, where autocast's types decide what is kept
        plain, thrifty = (
            config_of(tmp_path, flux_folder, ("mixed_precision", precision), ("train.gradient_checkpointing", on))
            for on in ("false", "true")
        )
        assert shapes_of(thrifty, cuda=True).learning.peak < shapes_of(plain, cuda=True).learning.peak / 1.3


def test_quantized_weights_take_a_byte_or_nine_sixteenths(flux_folder: Path, tmp_path: Path) -> None:
    whole, int8, nf4 = (
        shapes_of(config_of(tmp_path, flux_folder, ("quantization", kind)), cuda=True).transformer
        for kind in ("null", "int8", "nf4")
    )
    assert whole.parameters == int8.parameters == nf4.parameters
    assert whole.bytes / int8.bytes == pytest.approx(4, abs=0.3)  # of float32; norms and biases stay
    assert whole.bytes / nf4.bytes == pytest.approx(4 / (9 / 16), abs=0.9)


def test_disk_is_that_of_a_store(tmp_path: Path) -> None:
    prompts = "tiny:ocr:train:8"
    config = config_of(tmp_path / "run", "tiny", ("sample.prompts", prompts), ("sample.num_inference_steps", "4"))
    model = load_model("tiny", device=CPU, dtype=torch.float32)
    folder = tmp_path / "groups"
    sample_groups(config.sample, model, tiny_prompts(prompts), folder, seed=0)
    found = sum(path.stat().st_size for path in folder.glob("*groups*")) + sum(
        path.stat().st_size for path in folder.glob("_embeddings*")
    )
    planned = plan(config, shapes_of(config, cuda=False), gpu("l4"), {"train": 8, "validation": 2, "test": 2})
    assert planned.disk["groups"] == pytest.approx(found, rel=0.15)


RUNS = {
    "gdro": [],
    "two passes": [("train.group_gradient", "two_pass")],
    "no reference": [("train.objective", "sft")],
    "rounds of DiffusionNFT": [("train.objective", "nft"), ("rounds.train_steps", "2"), ("rounds.prompts", "3")],
    "rounds of Flow-GRPO": [
        ("train.objective", "flow_grpo"),
        ("sample.sampler", "flow_grpo"),
        ("sample.num_inference_steps", "4"),
        ("rounds.train_steps", "2"),
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_evaluations_are_those_a_run_counts(
    name: str, flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, flux_folder, *RUNS[name], ("train.validation_prompts", "null"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run(config, tmp_path / "out")
    counted = read_record(tmp_path / "out" / "summary.json")["nfe"]
    prompts = {"train": 4, "validation": None, "test": len(read_prompts(tmp_path / "test.jsonl"))}
    planned = plan(config, shapes_of(config, cuda=False), gpu("l4"), prompts)
    stages = {stage.name: stage.nfe for stage in planned.stages}
    assert {stage: stages[stage] for stage in counted} == counted


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("black-forest-labs/FLUX.1-dev", 11.90),
        ("stabilityai/stable-diffusion-3.5-large", 8.06),
        ("Qwen/Qwen-Image", 20.43),
        ("Tongyi-MAI/Z-Image-Turbo", 6.15),
        ("black-forest-labs/FLUX.2-dev", 32.22),
    ],
)
def test_known_models_have_their_published_size_without_the_hub(name: str, billions: float) -> None:
    with configurations(name) as folder:
        model = load_model(folder, device=torch.device("meta"), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.transformer.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert name in json.loads(KNOWN.read_text())


def test_a_kernel_waits_for_arithmetic_or_for_memory() -> None:
    h200 = gpu("H200")
    product, copy = Operation(10**15, 0, 0, True), Operation(0, 10**9, 10**9, False)
    work = Work(Counter({product: 1, copy: 2}), peak=0, shared_peak=0)
    assert h200.seconds(work, 3) == pytest.approx(3e15 / h200.half + 2 * 4e9 / h200.rate)


def test_training_goes_through_in_portions_that_fit(flux_folder: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, flux_folder)
    shapes = shapes_of(config, cuda=True)
    there = shapes.transformer.bytes + 20 * shapes.trainable
    assert micro_batch_of(config, shapes, there + 100 * shapes.saved).images is None
    one = micro_batch_of(config, shapes, there + 2 * shapes.saved)
    assert (one.groups, one.images) == (1, 1)
    parts = memory_parts(config, shapes, one)
    assert parts["training, 1 images at once"] < parts["a group of 3, one pass"] / 2


def test_what_cannot_fit_is_refused_naming_the_part(flux_folder: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, flux_folder, ("train.group_gradient", "one_pass"))
    shapes, stages = shapes_of(config, cuda=True), ("sample", "train", "evaluate")
    refuse(config, shapes, 1e9, stages)
    with pytest.raises(UserError, match="base weights need at least"):
        refuse(config, shapes, shapes.transformer.bytes - 1, stages)
    tight = shapes.transformer.bytes + 20 * shapes.trainable + 2 * shapes.saved
    with pytest.raises(UserError, match=r"6 images being trained on .* train.group_gradient: auto"):
        refuse(config, shapes, tight, ["train"])
    refuse(config.model_copy(update={"train": config.train.model_copy(update={"group_gradient": "auto"})}), shapes,
           tight, ["train"])  # fmt: skip


def test_a_run_that_cannot_fit_is_refused_before_loading(
    flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, flux_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))
    monkeypatch.setattr("gdro.runner.state.load_model", None)
    with pytest.raises(UserError, match=r"base weights need at least .* by the plan"):
        run(config, tmp_path / "out")


def test_prompts_are_looked_at_before_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake in them costs no seconds; a name too long for a file is one that is not there yet."""
    config = config_of(tmp_path, "no-such-model")
    with pytest.raises(UserError, match='names the split "tran"; did you mean "train"'):
        plan_run(with_prompts(config, "gdro:ocr:tran"), "h200", as_json=False)
    counts, notes = prompt_counts(with_prompts(config, "x" * 5000))
    assert (counts["train"], len(notes)) == (None, 1)


def with_prompts(config: RunConfig, spec: str) -> RunConfig:
    return config.model_copy(update={"sample": config.sample.model_copy(update={"prompts": spec})})


def test_the_command_prints_a_table_or_json(
    flux_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(small_run(tmp_path, flux_folder))
    assert main(["plan", config, "--gpu", "h200", "--train.k", "2"]) == 0
    out = capsys.readouterr().out
    for word in (
        "h200, 141 GB",
        "sample",
        "a group of 2, one pass",
        "checkpoints",
        "evaluations per training prompt: ",
        "assumed, not measured",
    ):
        assert word in out
    assert main(["plan", config, "--gpu", "a100", "--json", "--sample.prompts", "nowhere.txt"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stages"]["sample"]["hours"] is None
    assert found["stages"]["train"]["hours"] > 0
    assert found["nfe_per_prompt"] is None
    assert "nowhere.txt does not exist yet" in found["notes"][0]
    assert main(["plan", config, "--gpu", "cpu"]) == 0
    assert "timed here" in capsys.readouterr().out
    assert main(["plan", config, "--gpu", "h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stages, cost = found["stages"], found["nfe_per_prompt"]
    prompts = stages["sample"]["images"] / load_config(Path(config)).sample.images_per_prompt
    assert cost == {name: stages[name]["nfe"] / prompts for name in ("sample", "train")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h20"], 'did you mean "h200"?'),
        (["--device", "cuda"], "expected --gpu NAME"),
        (["--gpu", "h200", "--model", "nobody/nothing"], "nobody/nothing is neither a folder nor"),
        (["--gpu", "h200", "--sample.height", "30"], "height: 30 does not fit"),
    ],
)
def test_a_mistake_is_one_line(
    flux_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["plan", str(small_run(tmp_path, flux_folder)), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
