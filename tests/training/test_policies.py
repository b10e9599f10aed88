from typing import Any

import pytest
import torch

from gdro.training.policies import Policies, ema_decay, ema_update


def test_decay_rises_to_its_limit() -> None:
    decays = [ema_decay(i, warmup=0.001, decay=0.5) for i in (1, 100, 500, 501, 10_000)]
    assert decays == [0.001, 0.1, 0.5, 0.5, 0.5]


def test_average_is_the_recursion_written_out() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    ema = {"w": parameter.detach().clone()}
    expected = torch.zeros(3, dtype=torch.float64)
    for step in range(1, 20):
        parameter.data += step
        decay = ema_decay(step, warmup=0.05, decay=0.5)
        ema_update(ema, {"w": parameter}, decay)
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(ema["w"], expected, rtol=1e-12, atol=0)
    assert not ema["w"].requires_grad


def test_swapping_in_and_out_leaves_both_sets_of_weights_bit_for_bit(flux: Any) -> None:
    flux.add_adapter(rank=2, alpha=4, targets="attention", seed=0)
    parameters = flux.adapter()
    ema = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    policies = Policies(flux, {}, {"ema": ema})
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_()
    ema_update(ema, parameters, 0.3)
    raw = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    average = {name: weight.clone() for name, weight in ema.items()}

    def swap_and_fail() -> None:
        with policies.carrying("ema"):
            assert all(torch.equal(parameters[name], weight) for name, weight in average.items())
            with torch.no_grad():  # whatever happens inside must reach neither set
                for parameter in parameters.values():
                    parameter.zero_()
            raise KeyError

    with pytest.raises(KeyError):
        swap_and_fail()
    assert all(torch.equal(parameters[name], weight) for name, weight in raw.items())
    assert all(torch.equal(ema[name], weight) for name, weight in average.items())
    pointers = {tensor.data_ptr() for tensor in (*parameters.values(), *ema.values())}
    assert len(pointers) == 2 * len(parameters)
