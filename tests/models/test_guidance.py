import torch

from gdro.models.guidance import guided, with_negative


def test_guidance_extrapolates_from_nothing_through_the_prompt() -> None:
    velocity, nothing = torch.randn(2, 3, 5, 4, dtype=torch.float64).unbind()
    assert torch.equal(guided(velocity, nothing, 0.0), nothing)
    torch.testing.assert_close(guided(velocity, nothing, 1.0), velocity)
    torch.testing.assert_close(guided(velocity, nothing, 3.5), nothing + 3.5 * (velocity - nothing))
    assert torch.equal(guided(velocity, nothing, 0.0, start=velocity), velocity)
    torch.testing.assert_close(guided(velocity, nothing, 2.5, start=velocity), guided(velocity, nothing, 3.5))


def test_both_go_through_the_network_as_one_batch() -> None:
    text = {"embeds": torch.zeros(2, 3), "negative_embeds": torch.ones(2, 3)}
    (both,) = with_negative(text).values()
    assert torch.equal(both, torch.tensor([[0.0] * 3] * 2 + [[1.0] * 3] * 2))
