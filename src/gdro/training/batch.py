"""What each training step looks at. Every draw is a function of (seed, step, slot): nothing is carried along."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from gdro.common.errors import UserError
from gdro.common.rng import torch_rng
from gdro.groups.store import GroupStore
from gdro.models.base import Text
from gdro.objectives.advantage import advantages
from gdro.objectives.forward.gdro import order_by_reward
from gdro.samplers.trajectory import Trajectory


@dataclass(frozen=True)
class Visit:
    """One group at one step: k of its images, best first, equal rewards in random order."""

    group: str
    step: int
    slot: int
    images: Tensor  # (k,) indices into the group
    rewards: Tensor  # (k,) float64, descending
    advantages: Tensor  # (k,) float64, from the rewards of the whole group; zeros if no advantage is asked for

    @property
    def ranked(self) -> bool:
        """False if all k rewards are equal: such a visit says nothing, and has no best image either."""
        return bool(self.rewards[0] > self.rewards[-1])


def dealt(visits: Sequence[Visit], process: int, processes: int) -> list[Visit]:
    """A process's share of a step's visits: whole groups, and as many for each process.

    Where the visits run short a process gets one that counts for nothing, so that all make the same passes.
    """
    own = list(visits[process::processes])
    blank = replace(visits[0], rewards=torch.zeros_like(visits[0].rewards))
    return own + [blank] * (-(-len(visits) // processes) - len(own))


class Visits:
    """The order of the groups and the images drawn from each.

    Groups go by in epochs, each a new permutation. Images without a score (NaN) are never drawn. Groups that teach
    nothing are left out, and counted in `excluded` by reason: fewer than k images with a score, all scores equal, a
    standard deviation below `min_spread`, a mean above `max_mean` (already solved).

    subset: "spread" cuts the group's reward ranking into k equal slices and takes one image at random from each,
    drawn again until the k rewards are not all equal; "random" takes any k; "extremes" the best k - k // 2 and
    the worst k // 2.

    advantage: a kind of `objectives.advantage.advantages`, or None. `done`: steps before the round; its epochs start
    after them. `once`: no group twice in a step, however few there are; without it a small round is visited again,
    with new noise.
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
        self.rewards: dict[str, Tensor] = {}  # of the images that have one
        self._images: dict[str, Tensor] = {}  # their places in the group
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

    def at(self, step: int) -> list[Visit]:
        """The visits of a step, counted from 1; none if no group carries a ranking."""
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

    def _visit(self, group: str, values: Tensor, step: int, slot: int) -> Visit:
        generator = torch_rng(self.seed, "train/images", step, slot)
        r = self.rewards[group]
        images = self._draw(r, generator)
        images = images[order_by_reward(r[images], generator)]
        return Visit(group, step, slot, self._images[group][images], r[images], values[images])

    def _draw(self, r: Tensor, generator: torch.Generator) -> Tensor:
        if self.subset == "random":
            return torch.randperm(len(r), generator=generator)[: self.k]
        order = order_by_reward(r, generator)
        if self.subset == "extremes":
            worst = self.k // 2
            return torch.cat([order[: self.k - worst], order[len(r) - worst :]])
        edges = torch.arange(self.k + 1) * len(r) // self.k
        while True:  # each try holds the best and the worst image with probability >= (k / K)^2 / 4
            slices = edges[:-1] + (torch.rand(self.k, generator=generator) * edges.diff()).long()
            images = order[slices]
            if bool((r[images] != r[images[0]]).any()):
                return images


def _useless(scores: Tensor, k: int, min_spread: float, max_mean: float | None) -> str:
    """Why a group with these scores (K,) teaches nothing; or nothing."""
    if len(scores) < k:
        return "too few scores"
    if bool((scores == scores[0]).all()):
        return "all rewards equal"
    if float(scores.std(correction=0)) < min_spread:
        return "spread below train.min_spread"
    if max_mean is not None and float(scores.mean()) > max_mean:
        return "mean above train.max_mean"
    return ""


class Groups(Protocol):
    """The part of groups.store.GroupStore that training reads."""

    def image_size(self, group_id: str) -> tuple[int, int]: ...

    def latents(self, group_id: str) -> Tensor: ...

    def text(self, group_id: str) -> Text: ...

    def trajectory(self, group_id: str) -> Trajectory: ...


class Joined:
    """The stores of several rounds, read as one; their groups have different ids."""

    def __init__(self, stores: Sequence[GroupStore]) -> None:
        self._store = {group: store for store in stores for group in store.group_ids}

    def image_size(self, group_id: str) -> tuple[int, int]:
        return self._store[group_id].image_size(group_id)

    def latents(self, group_id: str) -> Tensor:
        return self._store[group_id].latents(group_id)

    def text(self, group_id: str) -> Text:
        return self._store[group_id].text(group_id)

    def trajectory(self, group_id: str) -> Trajectory:
        return self._store[group_id].trajectory(group_id)


def of_one_size(visits: Sequence[Visit], groups: Groups, most: int) -> Iterator[Sequence[Visit]]:
    """All of `visits`, at most `most` at a time and none together whose images have another size."""
    by_size: dict[tuple[int, int], list[Visit]] = {}
    for visit in visits:
        by_size.setdefault(groups.image_size(visit.group), []).append(visit)
    for some in by_size.values():
        for first in range(0, len(some), most):
            yield some[first : first + most]


@dataclass(frozen=True)
class Batch:
    """Visits as tensors on the device: g groups of k images, one image one row of text and t."""

    x0: Tensor  # (g, k, tokens, channels) float32
    eps: Tensor  # (g, k, tokens, channels), or (g, 1, ...) if the group shares it
    t: Tensor  # (g, k, 1, 1) in (0, 1)
    text: Text  # first axis g k
    rewards: Tensor  # (g, k) float64 on the CPU, descending
    advantages: Tensor  # (g, k) float32
    ranked: Tensor  # (g,) 1.0, or 0.0 where all rewards are equal

    def noised(self) -> tuple[Tensor, Tensor, Text]:
        """(x_t, t, text) of all g k images: x_t (g k, tokens, channels), t (g k,)."""
        return ((1 - self.t) * self.x0 + self.t * self.eps).flatten(0, 1), self.t.flatten(), self.text


class Batches:
    """Turns visits into batches; keeps groups in memory up to `memory_bytes`, reads the others at each visit.

    timestep: "logit_normal" is sigmoid(N(logit_mean, logit_std^2)), "uniform" is U(0, 1). Scope "group" shares one
    draw among the k images of a visit, "image" draws for each.

    draws: None for new t and eps at each visit; else each group (or image, by scope) has a pool of so many, and a visit
    takes one of them.
    """

    def __init__(
        self,
        groups: Groups,
        *,
        timestep: str,
        logit_mean: float,
        logit_std: float,
        timestep_scope: str,
        noise_scope: str,
        memory_bytes: float,
        device: torch.device,
        seed: int,
        draws: int | None = None,
    ) -> None:
        self.groups, self.device, self.seed, self.draws = groups, device, seed, draws
        self.timestep, self.timestep_scope, self.noise_scope = timestep, timestep_scope, noise_scope
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self._memory: dict[str, tuple[Tensor, Text]] = {}
        self._left = memory_bytes

    def of(self, visits: Sequence[Visit]) -> Batch:
        """The batch of visits to groups of one size."""
        k = len(visits[0].images)
        data = [self._read(visit.group) for visit in visits]
        x0 = torch.stack([latents[visit.images] for visit, (latents, _) in zip(visits, data, strict=True)])
        noise = [self._noise(visit, x0.shape[2:]) for visit in visits]
        text = {
            name: torch.cat([text[name] for _, text in data]).to(self.device).repeat_interleave(k, 0)
            for name in data[0][1]
        }
        return Batch(
            x0=x0.to(self.device),
            eps=torch.stack([eps for _, eps in noise]).to(self.device),
            t=torch.stack([t for t, _ in noise]).expand(-1, k)[..., None, None].to(self.device),
            text=text,
            rewards=torch.stack([visit.rewards for visit in visits]),
            advantages=torch.stack([visit.advantages for visit in visits]).to(self.device, torch.float32),
            ranked=torch.tensor([float(visit.ranked) for visit in visits], device=self.device),
        )

    def draw(self, visit: Visit) -> int:
        """Which of its pool's draws a visit takes."""
        generator = torch_rng(self.seed, "train/draw", visit.step, visit.slot)
        return int(torch.randint(self.draws or 1, (), generator=generator))

    def _noise(self, visit: Visit, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """t (k,) or (1,) and eps (k, tokens, channels) or (1, ...), float32."""
        k = len(visit.images)
        if self.draws is None:
            generator = torch_rng(self.seed, "train/noise", visit.step, visit.slot)
            t = self._times(k if self.timestep_scope == "image" else 1, generator)
            return t, torch.randn(k if self.noise_scope == "image" else 1, *shape, generator=generator)

        def pooled(purpose: str, scope: str, values: Callable[[torch.Generator], Tensor]) -> Tensor:
            """By group or by image, so that an image's draw does not depend on which others it is seen with."""
            places = [(image,) for image in visit.images.tolist()] if scope == "image" else [()]
            name = visit.group, self.draw(visit)
            return torch.cat([values(torch_rng(self.seed, purpose, *name, *place)) for place in places])

        t = pooled("pool/t", self.timestep_scope, lambda generator: self._times(1, generator))
        eps = pooled("pool/eps", self.noise_scope, lambda generator: torch.randn(1, *shape, generator=generator))
        return t, eps

    def _times(self, count: int, generator: torch.Generator) -> Tensor:
        if self.timestep == "logit_normal":
            return (self.logit_mean + self.logit_std * torch.randn(count, generator=generator)).sigmoid()
        return torch.rand(count, generator=generator)

    def _read(self, group: str) -> tuple[Tensor, Text]:
        if group in self._memory:
            return self._memory[group]
        data = self.groups.latents(group), self.groups.text(group)
        size = sum(tensor.nbytes for tensor in (data[0], *data[1].values()))
        if size <= self._left:
            self._left -= size
            self._memory[group] = data
        return data
