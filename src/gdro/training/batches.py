"""Draws as tensors: clean images, their noise and times, and their text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdro.common.rng import torch_rng
from gdro.models.base import Text
from gdro.objectives.flow import TimestepDistribution, interpolate, sample_timesteps, velocity_target
from gdro.training.draws import GroupDraw
from gdro.training.joined import Groups


@dataclass(frozen=True)
class Batch:
    """GroupDraws as tensors on the device: g groups of k images; each image has its own row of text and t."""

    x0: Tensor  # (g, k, tokens, channels) float32
    eps: Tensor  # (g, k, tokens, channels), or (g, 1, ...) if the group shares it
    t: Tensor  # (g, k, 1, 1) in (0, 1)
    text: Text  # first axis g k
    rewards: Tensor  # (g, k) float64 on the CPU, descending
    advantages: Tensor  # (g, k) float32
    ranked: Tensor  # (g,) 1.0, or 0.0 where all rewards are equal

    @property
    def v(self) -> Tensor:
        """The target velocities (g, k, tokens, channels)."""
        return velocity_target(self.x0, self.eps)

    def noised(self) -> tuple[Tensor, Tensor, Text]:
        """(x_t, t, text) of all g k images: x_t (g k, tokens, channels), t (g k,)."""
        return interpolate(self.x0, self.eps, self.t).flatten(0, 1), self.t.flatten(), self.text


class Batches:
    """Turns draws into batches; keeps groups in memory up to `memory_bytes` and rereads the others at each draw.

    timestep: "logit_normal" is sigmoid(N(logit_mean, logit_std^2)), "uniform" is U(0, 1). Scope "group" shares one
    value among the k images of a draw, "image" draws one for each.

    pool: None for new t and eps at each draw; otherwise each group (or image, by scope) has a pool of this many, and
    each draw takes one of them.
    """

    def __init__(
        self,
        groups: Groups,
        *,
        timestep: TimestepDistribution,
        logit_mean: float,
        logit_std: float,
        timestep_scope: str,
        noise_scope: str,
        memory_bytes: float,
        device: torch.device,
        seed: int,
        pool: int | None = None,
    ) -> None:
        self.groups, self.device, self.seed, self.pool = groups, device, seed, pool
        self.timestep, self.timestep_scope, self.noise_scope = timestep, timestep_scope, noise_scope
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self._memory: dict[str, tuple[Tensor, Text]] = {}
        self._left = memory_bytes

    def of(self, draws: Sequence[GroupDraw]) -> Batch:
        """The batch for draws from groups of one image size."""
        k = len(draws[0].images)
        data = [self._read(draw.group) for draw in draws]
        x0 = torch.stack([latents[draw.images] for draw, (latents, _) in zip(draws, data, strict=True)])
        noise = [self._noise(draw, x0.shape[2:]) for draw in draws]
        text = {
            name: torch.cat([text[name] for _, text in data]).to(self.device).repeat_interleave(k, 0)
            for name in data[0][1]
        }
        return Batch(
            x0=x0.to(self.device),
            eps=torch.stack([eps for _, eps in noise]).to(self.device),
            t=torch.stack([t for t, _ in noise]).expand(-1, k)[..., None, None].to(self.device),
            text=text,
            rewards=torch.stack([draw.rewards for draw in draws]),
            advantages=torch.stack([draw.advantages for draw in draws]).to(self.device, torch.float32),
            ranked=torch.tensor([float(draw.ranked) for draw in draws], device=self.device),
        )

    def pool_index(self, draw: GroupDraw) -> int:
        """Which entry of its pool a draw takes."""
        generator = torch_rng(self.seed, "train/draw", draw.step, draw.slot)
        return int(torch.randint(self.pool or 1, (), generator=generator))

    def _noise(self, draw: GroupDraw, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """t (k,) or (1,) and eps (k, tokens, channels) or (1, ...), float32."""
        k = len(draw.images)
        if self.pool is None:
            generator = torch_rng(self.seed, "train/noise", draw.step, draw.slot)
            t = self._times(k if self.timestep_scope == "image" else 1, generator)
            return t, torch.randn(k if self.noise_scope == "image" else 1, *shape, generator=generator)

        def pooled(purpose: str, scope: str, values: Callable[[torch.Generator], Tensor]) -> Tensor:
            """By group or by image, so an image's value does not depend on which others it is drawn with."""
            places = [(image,) for image in draw.images.tolist()] if scope == "image" else [()]
            name = draw.group, self.pool_index(draw)
            return torch.cat([values(torch_rng(self.seed, purpose, *name, *place)) for place in places])

        t = pooled("pool/t", self.timestep_scope, lambda generator: self._times(1, generator))
        eps = pooled("pool/eps", self.noise_scope, lambda generator: torch.randn(1, *shape, generator=generator))
        return t, eps

    def _times(self, count: int, generator: torch.Generator) -> Tensor:
        mean, std = self.logit_mean, self.logit_std
        return sample_timesteps(count, generator, distribution=self.timestep, mean=mean, std=std)

    def _read(self, group: str) -> tuple[Tensor, Text]:
        if group in self._memory:
            return self._memory[group]
        data = self.groups.latents(group), self.groups.text(group)
        size = sum(tensor.nbytes for tensor in (data[0], *data[1].values()))
        if size <= self._left:
            self._left -= size
            self._memory[group] = data
        return data
