"""Stored trajectories as batches: the stochastic steps that each draw is trained on, one after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gdro.common.rng import torch_rng
from gdro.models.base import Text
from gdro.training.draws import GroupDraw
from gdro.training.joined import Groups


@dataclass(frozen=True)
class TransitionBatch:
    """One stochastic step of each of n = g k images; the images of a draw share the step."""

    x: Tensor  # (n, tokens, channels) float32, before the step
    x_next: Tensor  # (n, tokens, channels), after it
    t: Tensor  # (n,)
    t_next: Tensor  # (n,)
    log_prob: Tensor  # (n,) under the sampling policy
    advantages: Tensor  # (n,) float32
    ranked: Tensor  # (n,) 1.0, or 0.0 where all rewards of the draw are equal
    text: Text  # first axis n

    def __getitem__(self, images: slice) -> "TransitionBatch":
        rows = {field.name: getattr(self, field.name)[images] for field in fields(self) if field.name != "text"}
        return TransitionBatch(**rows, text={name: value[images] for name, value in self.text.items()})


class Transitions:
    """Reads the trajectories of draws and picks a random `fraction` of each window's steps per draw."""

    def __init__(self, groups: Groups, *, fraction: float, device: torch.device, seed: int) -> None:
        self.groups, self.fraction, self.device, self.seed = groups, fraction, device, seed

    def of(self, draws: Sequence[GroupDraw]) -> tuple[int, Iterator[TransitionBatch]]:
        """(number of batches, the batches): in the i-th, each draw is at the i-th of its chosen steps."""
        chosen = [self._chosen(draw) for draw in draws]
        return len(chosen[0]), self._batches(draws, chosen)

    def count(self, draw: GroupDraw) -> int:
        """How many steps a draw is trained on."""
        return max(1, round(self.fraction * self._window(draw)))

    def _window(self, draw: GroupDraw) -> int:
        return len(self.groups.trajectory(draw.group).times) - 1

    def _chosen(self, draw: GroupDraw) -> list[int]:
        generator = torch_rng(self.seed, "train/transitions", draw.step, draw.slot)
        order = torch.randperm(self._window(draw), generator=generator)
        return sorted(order[: self.count(draw)].tolist())

    def _batches(self, draws: Sequence[GroupDraw], chosen: list[list[int]]) -> Iterator[TransitionBatch]:
        trajectories = [self.groups.trajectory(draw.group) for draw in draws]
        texts = [self.groups.text(draw.group) for draw in draws]
        k = len(draws[0].images)
        text = {
            name: torch.cat([one[name] for one in texts]).to(self.device).repeat_interleave(k, 0) for name in texts[0]
        }
        advantages = torch.cat([draw.advantages for draw in draws]).to(self.device, torch.float32)
        ranked = torch.tensor([float(draw.ranked) for draw in draws], device=self.device).repeat_interleave(k)
        for steps in zip(*chosen, strict=True):
            rows = list(zip(trajectories, draws, steps, strict=True))
            times = torch.stack([trajectory.times[step : step + 2] for trajectory, _, step in rows])
            times = times.to(self.device).repeat_interleave(k, 0)
            yield TransitionBatch(
                x=torch.cat([one.states[v.images, step] for one, v, step in rows]).to(self.device),
                x_next=torch.cat([one.states[v.images, step + 1] for one, v, step in rows]).to(self.device),
                t=times[:, 0],
                t_next=times[:, 1],
                log_prob=torch.cat([one.log_probs[v.images, step] for one, v, step in rows]).to(self.device),
                advantages=advantages,
                ranked=ranked,
                text=text,
            )
