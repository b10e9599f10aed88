"""The file of an adapter: plain diffusers reads ours, and we refuse what does not fit."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gdro.errors import UserError
from gdro.models import load_model
from gdro.models.flux import FluxModel
from gdro.models.lora import write_lora

FILE = "pytorch_lora_weights.safetensors"
SHAPE = {"r": 4, "lora_alpha": 10}
HOW = {"guidance_scale": 3.5, "height": 32, "width": 64}


@pytest.fixture
def tuned(flux: FluxModel) -> FluxModel:
    flux.add_adapter(rank=4, alpha=10, targets="attention+ff", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flux.adapter().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return flux


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def velocity(model: FluxModel) -> torch.Tensor:
    x_t = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.velocity(x_t, torch.tensor([0.5]), model.encode_text(["a red wall"], 24), **HOW)


def test_adapter_comes_back_as_it_was(tuned: FluxModel, flux_folder: Path, tmp_path: Path):
    write_lora(tmp_path, tuned.adapter(), SHAPE, {"step": 3})
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o666 & ~umask()
    with safe_open(tmp_path / FILE, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["gdro"] == {"step": 3}
    other = load_model(str(flux_folder), device=torch.device("cpu"), dtype=torch.float32)
    other.load_adapter(tmp_path)
    assert other.adapter().keys() == tuned.adapter().keys()
    assert other.weights == tuned.weights
    assert torch.equal(velocity(other), velocity(tuned))
    write_lora(tmp_path / "again", other.adapter(), SHAPE, {"step": 3})
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()


def test_an_adapter_by_diffusers_own_trainers_is_read(tuned: FluxModel, flux_folder: Path, tmp_path: Path):
    """FluxPipeline.save_lora_weights is what diffusers' training scripts call; without metadata alpha = rank."""
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=dict(tuned.adapter()))
    pipe = FluxPipeline.from_pretrained(flux_folder)
    pipe.load_lora_weights(tmp_path, weight_name=FILE)
    tuned.load_adapter(tmp_path)
    ours = dict(tuned.transformer.named_modules())
    theirs = dict(pipe.transformer.named_modules())
    name = "transformer_blocks.0.attn.to_q"
    assert ours[name].scaling["default"] == theirs[name].scaling["default_0"] == 1.0


def test_state_is_copied_in_place(tuned: FluxModel):
    """The optimizer holds the parameters, so loading EMA weights must not replace them."""
    parameters = tuned.adapter()
    tuned.load_adapter_state({name: torch.zeros_like(p) for name, p in parameters.items()})
    assert all(tuned.adapter()[name] is p and not p.any() for name, p in parameters.items())
    with pytest.raises(UserError, match=r"proj_out\.lora_B\.weight is in only one"):
        tuned.load_adapter_state({**parameters, "proj_out.lora_B.weight": torch.zeros(64, 4)})
    with pytest.raises(UserError, match=r"has shape \(2, 2\); expected \(4, 32\)"):
        tuned.load_adapter_state({**parameters, "transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 2)})


def test_adapters_that_do_not_fit_are_refused(tuned: FluxModel, tmp_path: Path):
    with pytest.raises(UserError, match="not found; expected a folder holding pytorch_lora_weights"):
        tuned.load_adapter(tmp_path / "nowhere")

    tuned.add_adapter(rank=4, alpha=10, targets="attention", seed=0)
    write_lora(tmp_path, tuned.adapter(), SHAPE, {})
    good = load_file(tmp_path / FILE)
    wrong = {
        "damaged": None,
        "text_encoder.x.lora_A": {**good, "text_encoder.x.lora_A.weight": torch.zeros(4, 4)},
        "does not fit the model": {
            name.replace("transformer_blocks.0", "transformer_blocks.7"): value for name, value in good.items()
        },
        "not DoRA": {**good, "transformer.x.dora_scale": torch.zeros(4)},
        "no tensor": {},
    }
    for message, state in wrong.items():
        folder = tmp_path / message
        folder.mkdir()
        if state is None:
            (folder / FILE).write_bytes(b"\0" * 40)
        else:
            save_file(state, folder / FILE, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message) as error:
            tuned.load_adapter(folder)
        assert "\n" not in str(error.value)
