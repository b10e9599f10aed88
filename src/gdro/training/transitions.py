"""Stored trajectories as batches: for each visit, the stochastic steps it is trained on, one after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gdro.common.rng import torch_rng
from gdro.models.base import Text
from gdro.training.batch import Groups, Visit


@dataclass(frozen=True)
class TransitionBatch:
    """One stochastic step of each of n = g k images; the images of a visit share the step."""

    x: Tensor  # (n, tokens, channels) float32, before the step
    x_next: Tensor  # (n, tokens, channels), after it
    t: Tensor  # (n,)
    t_next: Tensor  # (n,)
    log_prob: Tensor  # (n,) under the policy that sampled
    advantages: Tensor  # (n,) float32
    ranked: Tensor  # (n,) 1.0, or 0.0 where all rewards of the visit are equal
    text: Text  # first axis n

    def __getitem__(self, images: slice) -> "TransitionBatch":
        rows = {field.name: getattr(self, field.name)[images] for field in fields(self) if field.name != "text"}
        return TransitionBatch(**rows, text={name: value[images] for name, value in self.text.items()})


class Transitions:
    """Reads the trajectories of visits and chooses `fraction` of each window's steps, at random for each visit."""

    def __init__(self, groups: Groups, *, fraction: float, device: torch.device, seed: int) -> None:
        self.groups, self.fraction, self.device, self.seed = groups, fraction, device, seed

    def of(self, visits: Sequence[Visit]) -> tuple[int, Iterator[TransitionBatch]]:
        """(number of batches, the batches): in the i-th each visit is at the i-th of its chosen steps."""
        chosen = [self._chosen(visit) for visit in visits]
        return len(chosen[0]), self._batches(visits, chosen)

    def count(self, visit: Visit) -> int:
        """How many steps a visit is trained on."""
        return max(1, round(self.fraction * self._window(visit)))

    def _window(self, visit: Visit) -> int:
        return len(self.groups.trajectory(visit.group).times) - 1

    def _chosen(self, visit: Visit) -> list[int]:
        generator = torch_rng(self.seed, "train/transitions", visit.step, visit.slot)
        order = torch.randperm(self._window(visit), generator=generator)
        return sorted(order[: self.count(visit)].tolist())

    def _batches(self, visits: Sequence[Visit], chosen: list[list[int]]) -> Iterator[TransitionBatch]:
        trajectories = [self.groups.trajectory(visit.group) for visit in visits]
        texts = [self.groups.text(visit.group) for visit in visits]
        k = len(visits[0].images)
        text = {
            name: torch.cat([one[name] for one in texts]).to(self.device).repeat_interleave(k, 0) for name in texts[0]
        }
        advantages = torch.cat([visit.advantages for visit in visits]).to(self.device, torch.float32)
        ranked = torch.tensor([float(visit.ranked) for visit in visits], device=self.device).repeat_interleave(k)
        for steps in zip(*chosen, strict=True):
            rows = list(zip(trajectories, visits, steps, strict=True))
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
