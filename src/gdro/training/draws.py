"""Which groups and images each step learns from: a function of (seed, step, slot), without any state."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from gdro.common.errors import UserError
from gdro.common.rng import torch_rng
from gdro.objectives.advantage import advantages
from gdro.objectives.forward.gdro import order_by_reward
from gdro.training.joined import Groups


@dataclass(frozen=True)
class GroupDraw:
    """One group at one step: k of its images, best first, equal rewards in random order."""

    group: str
    step: int
    slot: int
    images: Tensor  # (k,) indices into the group
    rewards: Tensor  # (k,) float64, descending
    advantages: Tensor  # (k,) float64, from the rewards of the whole group; zeros if none are used

    @property
    def ranked(self) -> bool:
        """False if all k rewards are equal: such a draw teaches nothing and has no best image."""
        return bool(self.rewards[0] > self.rewards[-1])


def split(draws: Sequence[GroupDraw], process: int, processes: int) -> list[GroupDraw]:
    """A process's share of a step's draws: whole groups, the same number for each process.

    If there are too few draws, a process gets one with zero weight, so all make the same passes.
    """
    own = list(draws[process::processes])
    blank = replace(draws[0], rewards=torch.zeros_like(draws[0].rewards))
    return own + [blank] * (-(-len(draws) // processes) - len(own))


class GroupDraws:
    """The order of the groups and the images drawn from each.

    Groups come in epochs, each a new permutation. Images without a score (NaN) are never drawn. Groups that teach
    nothing are left out and counted in `excluded` by reason: fewer than k images with a score, all scores equal, a
    standard deviation below `min_spread`, or a mean above `max_mean` (already solved).

    subset: "spread" cuts the group's reward ranking into k equal slices and takes one image at random from each,
    redrawn until the k rewards are not all equal; "random" takes any k; "extremes" the best k - k // 2 and
    the worst k // 2.

    advantage: a kind of `objectives.advantage.advantages`, or None. `done`: steps before the round; its epochs start
    after them. `once`: no group appears twice in a step, however few there are; otherwise the groups of a small round
    are repeated, with new noise. Raises UserError if a group has fewer than k images.
    """

    def __init__(
        self,
        rewards: Mapping[str, Tensor],
        *,
        k: int,
        subset: str,
        groups_per_step: int,
        seed: int,
        advantage: str | None = None,
        advantage_exponent: float = 0.0,
        min_spread: float = 0.0,
        max_mean: float | None = None,
        done: int = 0,
        once: bool = False,
    ) -> None:
        self.k, self.subset, self.seed = k, subset, seed
        self.advantage, self.advantage_exponent, self.done = advantage, advantage_exponent, done
        self.rewards: dict[str, Tensor] = {}  # without missing ones
        self._images: dict[str, Tensor] = {}  # indices of those images in the group
        self.excluded: Counter[str] = Counter()
        for group, r in rewards.items():
            if len(r) < k:
                raise UserError(f"train.k: {k}, but group {group} has {len(r)} images; expected at most {len(r)}")
            present = torch.nonzero(~r.isnan())[:, 0]
            scores = r.double()[present]
            reason = _useless(scores, k, min_spread, max_mean)
            if reason:
                self.excluded[reason] += 1
            else:
                self.rewards[group], self._images[group] = scores, present
        self._groups = list(self.rewards)
        self._per_step = min(groups_per_step, len(self._groups)) if once else groups_per_step
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def at(self, step: int) -> list[GroupDraw]:
        """The draws of a step, counted from 1; empty if no group has a ranking."""
        if not self._groups:
            return []
        first = (step - 1 - self.done) * self._per_step
        groups = [self._group(first + slot) for slot in range(self._per_step)]
        rewards = [self.rewards[group] for group in groups]
        if self.advantage is None:
            values = [torch.zeros_like(r) for r in rewards]
        else:
            values = advantages(rewards, self.advantage, self.advantage_exponent)
        return [self._visit(group, a, step, slot) for slot, (group, a) in enumerate(zip(groups, values, strict=True))]

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch_rng(self.seed, "train/epoch", self.done + epoch)
        return torch.randperm(len(self._groups), generator=generator).tolist()

    def _group(self, position: int) -> str:
        epoch, place = divmod(position, len(self._groups))
        return self._groups[self._epoch(epoch)[place]]

    def _visit(self, group: str, values: Tensor, step: int, slot: int) -> GroupDraw:
        generator = torch_rng(self.seed, "train/images", step, slot)
        r = self.rewards[group]
        images = self._draw(r, generator)
        images = images[order_by_reward(r[images], generator)]
        return GroupDraw(group, step, slot, self._images[group][images], r[images], values[images])

    def _draw(self, r: Tensor, generator: torch.Generator) -> Tensor:
        if self.subset == "random":
            return torch.randperm(len(r), generator=generator)[: self.k]
        order = order_by_reward(r, generator)
        if self.subset == "extremes":
            worst = self.k // 2
            return torch.cat([order[: self.k - worst], order[len(r) - worst :]])
        edges = torch.arange(self.k + 1) * len(r) // self.k
        while True:  # each try includes the best and the worst image with probability >= (k / K)^2 / 4
            slices = edges[:-1] + (torch.rand(self.k, generator=generator) * edges.diff()).long()
            images = order[slices]
            if bool((r[images] != r[images[0]]).any()):
                return images


def _useless(scores: Tensor, k: int, min_spread: float, max_mean: float | None) -> str:
    """Why a group with these scores (K,) teaches nothing; empty if it does teach something."""
    if len(scores) < k:
        return "too few scores"
    if bool((scores == scores[0]).all()):
        return "all rewards equal"
    if float(scores.std(correction=0)) < min_spread:
        return "spread below train.min_spread"
    if max_mean is not None and float(scores.mean()) > max_mean:
        return "mean above train.max_mean"
    return ""


def of_one_size(draws: Sequence[GroupDraw], groups: Groups, most: int) -> Iterator[Sequence[GroupDraw]]:
    """All of `draws` in batches of at most `most`, each of one image size."""
    by_size: dict[tuple[int, int], list[GroupDraw]] = {}
    for draw in draws:
        by_size.setdefault(groups.image_size(draw.group), []).append(draw)
    for some in by_size.values():
        for first in range(0, len(some), most):
            yield some[first : first + most]
