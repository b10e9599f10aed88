"""A model described for another process."""

import pickle
from pathlib import Path

import torch

from gdro.common.rng import torch_rng
from gdro.models.flux import FluxModel
from gdro.models.replica import Replica


def test_a_replica_is_the_same_model(flux: FluxModel, flux_folder: Path):
    replica = pickle.loads(pickle.dumps(Replica(name=str(flux_folder), dtype=torch.float32)))
    assert replica.load().fingerprint == flux.fingerprint


def test_a_replica_of_a_later_round_carries_its_adapter(flux: FluxModel, flux_folder: Path):
    lora = {"rank": 2, "alpha": 4, "targets": "attention", "seed": 3}
    flux.add_adapter(**lora)
    state = {
        name: torch.randn(parameter.shape, generator=torch_rng(0, "test", name))
        for name, parameter in flux.adapter().items()
    }
    flux.load_adapter_state(state)
    replica = pickle.loads(pickle.dumps(Replica(name=str(flux_folder), dtype=torch.float32, lora=lora, state=state)))
    model = replica.load()
    assert model.fingerprint == flux.fingerprint
    x, t, text = torch.ones(1, 32, 64), torch.full((1,), 0.5), flux.encode_text(["a"], 8)
    velocities = [m.velocity(x, t, text, guidance_scale=3.5, height=32, width=64) for m in (flux, model)]
    assert torch.equal(velocities[0], velocities[1])
