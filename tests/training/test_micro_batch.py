"""The gradient of a group a few images at a time: the same as in one pass, in memory that does not grow with k."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_files import same, weights
from torch import Tensor
from toy_groups import SAMPLING, write_toy

from gdro.models import load_model
from gdro.models.base import FlowModel
from gdro.objectives.registry import FORWARD
from gdro.stages.train import prepare, train
from gdro.training import micro_batch
from gdro.training.config import TrainConfig
from gdro.training.learner import Learner, MicroBatch
from gdro.training.micro_batch import choose_micro_batch, largest_micro_batch, saved_bytes
from gdro.training.step import backward, check_reference, train_step


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, flux_folder: Path) -> tuple[Path, Path]:
    return write_toy(tmp_path_factory.mktemp("toy"), load(flux_folder), groups=3, images=16)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> FlowModel:
    return load_model(str(folder), device=torch.device("cpu"), dtype=dtype)


def learner(model: FlowModel, toy: tuple[Path, Path], **changes: Any) -> Learner:
    config = TrainConfig(**({"k": 4, "rank": 4, "groups_per_step": 2, "learning_rate": 2e-3} | changes))
    return prepare(config, model, *toy, seed=0, sampling=SAMPLING)[0]


def gradient(one: Learner, step: int) -> Tensor:
    one.optimizer.zero_grad()
    draws = one.data.draws.at(step)
    backward(one, draws, len(draws))
    return torch.cat([weight.grad.flatten() for weight in one.policies.parameters.values() if weight.grad is not None])


class Doubled:
    """A store whose latents are float64, so that x_t and the errors are too."""

    def __init__(self, groups: Any) -> None:
        self.groups = groups

    def image_size(self, group: str) -> tuple[int, int]:
        return self.groups.image_size(group)

    def latents(self, group: str) -> Tensor:
        return self.groups.latents(group).double()

    def text(self, group: str) -> dict[str, Tensor]:
        return self.groups.text(group)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [kind.name for kind in FORWARD])
def test_two_passes_have_the_gradient_of_one(
    flux_folder: Path, toy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """In float64 throughout, each cast to float32 made one to float64, by every objective."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    changes = {"objective": objective, "k": 2 if objective == "dpo" else 4}
    one = learner(load(flux_folder, torch.float64), toy, **changes)
    one.data.batches.groups = Doubled(one.data.batches.groups)  # type: ignore[assignment]
    train_step(one, 1)  # B = 0 before it, and A's gradient with it
    expected = gradient(one, 2)
    assert expected.dtype == torch.float64
    for images in (1, 3):
        one.micro_batch = MicroBatch(2, images)
        assert (gradient(one, 2) - expected).norm() < 1e-10 * expected.norm()


def test_two_passes_have_the_gradient_of_one_in_bfloat16(flux_folder: Path, toy: tuple[Path, Path]) -> None:
    """To its rounding: to what one pass in bfloat16 has of one in float32."""
    one, exact = (learner(load(flux_folder, dtype), toy) for dtype in (torch.bfloat16, torch.float32))
    for either in (one, exact):
        train_step(either, 1)
    exact.policies.model.load_adapter_state({name: value.detach() for name, value in one.policies.parameters.items()})
    expected, rounded = gradient(exact, 2), gradient(one, 2)
    one.micro_batch = MicroBatch(2, 1)
    rounding = (rounded - expected).norm()
    assert 0 < rounding < 0.2 * expected.norm()
    assert (gradient(one, 2) - rounded).norm() < rounding


@contextmanager
def peak_of_saved_bytes() -> Iterator[SimpleNamespace]:
    """`peak` of the bytes that autograd holds at one time, each storage once."""
    held: dict[int, list[int]] = {}  # address -> [holders, bytes]
    found = SimpleNamespace(peak=0)

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            address = tensor.untyped_storage().data_ptr()
            held.setdefault(address, [0, tensor.untyped_storage().nbytes()])[0] += 1
            found.peak = max(found.peak, sum(size for _, size in held.values()))
            weakref.finalize(self, release, address)

    def release(address: int) -> None:
        held[address][0] -= 1
        if not held[address][0]:
            del held[address]

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        yield found


def test_memory_does_not_grow_with_the_group(flux: Any, toy: tuple[Path, Path]) -> None:
    peaks = {}
    for how in ("one_pass", "two_pass"):
        for k in (2, 16):
            one = learner(flux, toy, k=k, groups_per_step=1, group_gradient=how)
            with peak_of_saved_bytes() as saved:
                train_step(one, 1)
            peaks[how, k] = saved.peak
    assert peaks["two_pass", 16] <= 1.05 * peaks["two_pass", 2]
    assert peaks["one_pass", 16] > 4 * peaks["one_pass", 2]


def test_a_step_counts_what_it_draws_however_memory_divides_it(flux: Any, toy: tuple[Path, Path]) -> None:
    """Of 2 x 4 images: the base once, the policy three times in one pass; in two once more, which is not counted."""
    for how, cost in (("one_pass", 4), ("two_pass", 5)):
        one = learner(flux, toy, group_gradient=how)
        before = flux.nfe
        assert train_step(one, 1)["nfe"] == 8 * 4
        assert flux.nfe - before == 8 * cost


@pytest.mark.slow
def test_a_step_counts_what_the_model_computes(flux: Any, toy: tuple[Path, Path]) -> None:
    """By every objective, at the round's first step and after; "round" is the policy itself at the first."""
    for name, cost in (
        ("gdro", (4, 4)),
        ("nft", (5, 5)),
        ("awm", (3, 4)),
        ("sft", (3, 3)),
        *((kind.name, None) for kind in FORWARD),
    ):
        one = learner(flux, toy, objective=name, k=2)
        for step in (1, 2):
            before = flux.nfe
            counted = train_step(one, step)["nfe"]
            assert counted == flux.nfe - before, name
            assert cost is None or counted == 4 * cost[step - 1], name


@pytest.mark.parametrize(
    ("room", "portion"),
    [(99, MicroBatch(8)), (20, MicroBatch(3)), (6, MicroBatch(1)), (5, MicroBatch(1, 5)), (0, MicroBatch(1, 1))],
)
def test_groups_are_kept_whole_while_one_fits(room: int, portion: MicroBatch) -> None:
    assert largest_micro_batch(room, groups=8, k=6) == portion


def test_what_autograd_keeps_is_counted_once_and_without_the_weights() -> None:
    x, weight = torch.zeros(100), torch.ones(100, requires_grad=True)
    address = weight.untyped_storage().data_ptr()
    assert saved_bytes(lambda: x * weight * weight, besides={address}) == 800  # x and x weight
    assert saved_bytes(lambda: x * weight * weight, besides=set()) == 1200


def living_bytes() -> int:
    """Of every tensor that there is, each storage once."""
    gc.collect()
    storages = [one.untyped_storage() for one in gc.get_objects() if type(one) in (Tensor, torch.nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.slow
def test_rounds_need_no_more_memory_than_one(flux: Any, toy: tuple[Path, Path]) -> None:
    """Whatever looks at a pass lets go of it: the measurement of `auto`, a step either way, the check after it."""

    def measured(one: Learner) -> None:
        choose_micro_batch(one)

    def stepped(one: Learner) -> None:
        check_reference(one, 1, train_step(one, 1))

    probes: list[tuple[Callable[[Learner], None], dict[str, Any]]] = [
        (measured, {}),
        (stepped, {"group_gradient": "one_pass"}),
        (stepped, {"group_gradient": "two_pass", "reference_draws": 2}),
        (stepped, {"gradient_checkpointing": True}),
    ]
    for probe, changes in probes:
        living = []
        for _ in range(4):
            probe(learner(flux, toy, **changes))
            living.append(living_bytes())
        assert living[3] == living[1], changes  # the first may fill a cache


@pytest.mark.slow
def test_auto_takes_what_fits_and_a_resumed_run_what_it_took(
    flux: Any,
    toy: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(micro_batch, "saved_bytes", lambda forward, besides: 10**9)

    def run(out: str, room: float, **changes: Any) -> str:
        monkeypatch.setattr(micro_batch, "free_bytes", lambda device: int(room * 10**9 / micro_batch.MARGIN))
        options = {"k": 4, "rank": 1, "groups_per_step": 2, "max_train_steps": 4, "checkpointing_steps": 2}
        config = TrainConfig(**(options | {"learning_rate": 2e-3, "target_modules": ["to_q"]} | changes))
        train(config, flux, *toy, tmp_path / out, seed=0, sampling=SAMPLING)
        return capsys.readouterr().err

    assert "train.group_gradient: one_pass, 8 images at a time (1 GB each, 125 GB free)\n" in run("roomy", 100)
    assert "train.group_gradient: one_pass, 4 images at a time" in run("groups", 7)
    assert "train.group_gradient: two_pass, 2 images at a time" in run("tight", 2.9)
    assert "train.group_gradient: two_pass, 1 images at a time (1 GB each, 0.625 GB free); even one" in run("full", 0.5)
    assert "group_gradient" not in run("said", 100, group_gradient="two_pass", images_per_pass=2, micro_batch_groups=1)
    assert same(weights(tmp_path / "tight", 4), weights(tmp_path / "said", 4))
    run("cut", 2.9, max_train_steps=2)
    assert "two_pass, 2 images" in run("cut", 100)  # more room than before: it stays with what it took
    assert same(weights(tmp_path / "cut", 4), weights(tmp_path / "tight", 4))
    for name, value in weights(tmp_path / "roomy", 4).items():
        torch.testing.assert_close(value, weights(tmp_path / "tight", 4)[name], rtol=1e-3, atol=1e-4)
