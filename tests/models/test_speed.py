"""Compiled, checkpointed, quantized: the same model, its adapter switched as before."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from toy_groups import SAMPLING, write_toy

from gdro.common.errors import UserError
from gdro.models import check_compiler, check_quantization, load_model
from gdro.models.base import FlowModel
from gdro.stages.train import train
from gdro.training.config import TrainConfig
from gdro.training.micro_batch import saved_bytes

CPU = torch.device("cpu")


def adapted(model: FlowModel) -> FlowModel:
    model.add_adapter(rank=4, alpha=8, targets="attention+ff", seed=0)
    with torch.no_grad():
        for weight in model.adapter().values():
            weight.add_(0.01)
    return model


def velocity(model: FlowModel, images: int = 2) -> Tensor:
    x = torch.randn(2, *model.latent_shape(32, 64), generator=torch.Generator().manual_seed(0))[:images]
    text = model.encode_text(["a", "b"][:images], 16)
    return model.velocity(x, torch.tensor([0.3, 0.6])[:images], text, guidance_scale=3.5, height=32, width=64)


def outputs(model: FlowModel) -> tuple[Tensor, Tensor, Tensor]:
    """Policy, reference, and the gradient of the policy's mean square."""
    with torch.no_grad():
        policy = velocity(model)
        with model.adapter_disabled():
            reference = velocity(model)
    for weight in model.adapter().values():
        weight.grad = None
    velocity(model).square().mean().backward()
    gradient = torch.cat([w.grad.flatten() for w in model.adapter().values() if w.grad is not None])
    return policy, reference, gradient


def agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def compile_with(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """torch.compile as it is but for its options: without generating C++ it takes seconds."""
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: real(module, **options))


@pytest.mark.slow
def test_a_compiled_model_is_the_same_and_switches_its_adapter(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outputs(adapted(flux))
    compile_with(monkeypatch, backend="eager")
    flux.compile()
    for _ in range(2):
        agree(outputs(flux), expected)
    agree((velocity(flux, 1),), (expected[0][:1],))
    adapted(flux)  # another adapter in place of the first
    agree(outputs(flux), expected)


@pytest.mark.skipif(not os.environ.get("GDRO_COMPILE_TEST"), reason="takes minutes; set GDRO_COMPILE_TEST=1")
def test_the_default_compiler_too(flux: Any) -> None:
    expected = outputs(adapted(flux))
    flux.compile()
    agree(outputs(flux), expected)


def keep_to_first_state(module: nn.Module) -> None:
    """What torch.compile would make of a block if it did not notice the switch: one trace for each gradient mode."""
    forward = module.forward
    traced: dict[bool, bool] = {}

    def stuck(*arguments: Any, **options: Any) -> Any:
        layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        disabled = layers[0].disable_adapters
        for layer in layers:
            layer.enable_adapters(not traced.setdefault(torch.is_grad_enabled(), disabled))
        try:
            return forward(*arguments, **options)
        finally:
            for layer in layers:
                layer.enable_adapters(not disabled)

    module.forward = stuck


def test_a_compiled_model_whose_switch_has_no_effect_is_noticed(
    flux: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = write_toy(tmp_path / "toy", flux, groups=3, images=4)
    monkeypatch.setattr(nn.Module, "compile", keep_to_first_state)
    flux.compile()
    config = TrainConfig(k=4, rank=4, groups_per_step=3, max_train_steps=2, learning_rate=2e-3, validation_steps=0)
    with pytest.raises(RuntimeError, match="policy equals the reference"):
        train(config, flux, *toy, tmp_path / "run", seed=0, sampling=SAMPLING)


def test_checkpointed_activations_give_the_same_gradient_in_less_memory(flux: Any) -> None:
    expected = outputs(adapted(flux))
    whole = saved_bytes(lambda: velocity(flux), besides=set())
    flux.checkpoint_activations(True)
    agree(outputs(flux), expected)
    assert saved_bytes(lambda: velocity(flux), besides=set()) < 0.5 * whole
    flux.checkpoint_activations(False)
    assert saved_bytes(lambda: velocity(flux), besides=set()) == whole


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("fp8", 0.1)])
def test_a_quantized_base_is_nearly_the_same_model(flux: Any, flux_folder: Path, kind: Any, error: float) -> None:
    pytest.importorskip("torchao")
    model = load_model(str(flux_folder), device=CPU, dtype=torch.float32, quantization=kind)
    assert model.revision == f"{flux.revision}-{kind}"
    policy, reference, gradient = outputs(adapted(model))
    exact = outputs(adapted(flux))
    for found, expected in zip((policy, reference, gradient), exact, strict=True):
        assert 0 < (found - expected).norm() < error * expected.norm()
    model.add_adapter(rank=4, alpha=8, targets="attention+ff", seed=1)
    with torch.no_grad():
        assert torch.equal(velocity(model), reference)  # B = 0
    assert all(weight.dtype == torch.float32 for weight in model.adapter().values())


def test_training_on_a_quantized_base_passes_its_checks(flux_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model = load_model(str(flux_folder), device=CPU, dtype=torch.bfloat16, quantization="int8")
    toy = write_toy(tmp_path / "toy", model, groups=3, images=4)
    config = TrainConfig(k=4, rank=4, groups_per_step=3, max_train_steps=2, learning_rate=2e-3, validation_steps=0)
    train(config, model, *toy, tmp_path / "run", seed=0, sampling=SAMPLING)
    assert (tmp_path / "run/checkpoints/step-000002").is_dir()


def test_what_quantization_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'^quantization is "int8", which needs torchao; pip install "gdro\[quant'):
        check_quantization("int8", CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(UserError, match=r'^quantization is "nf4", which needs a GPU, but device is cpu; expected int8'):
        check_quantization("nf4", CPU)


def test_what_compiling_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"^compile is true, which needs a C\+\+ compiler"):
        check_compiler(CPU)


def test_parts_off_the_device_come_back_when_used(flux: Any) -> None:
    before = flux.encode_text(["a"], 16)
    latents = torch.zeros(1, *flux.latent_shape(32, 64))
    image = flux.decode(latents, 32, 64)[0].tobytes()
    flux.free()
    assert torch.equal(flux.encode_text(["a"], 16)["prompt_embeds"], before["prompt_embeds"])
    assert flux.decode(latents, 32, 64)[0].tobytes() == image
