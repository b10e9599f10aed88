"""What gdro requires of a model: predict a velocity, encode text, decode latents, carry a LoRA."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

Text = dict[str, Tensor]
"""Encoded prompts: named tensors (e.g. prompt_embeds (n, L, D), pooled_prompt_embeds (n, P)); first axis n."""


class FlowModel(Protocol):
    """A rectified-flow text-to-image model: x_t = (1 - t) x0 + t eps, velocity target v = eps - x0.

    Latents are *packed*, as the transformer sees them: (n, tokens, channels), float32; t is in (0, 1).
    """

    name: str  # as the user gave it: "tiny", a folder, a hub id
    device: torch.device
    transformer: torch.nn.Module
    nfe: int  # model evaluations so far: one per image and forward pass, three with gradient

    @property
    def revision(self) -> str:
        """Identifies the exact base weights (digest or commit); stored with every group."""
        ...

    @property
    def fingerprint(self) -> str:
        """`revision`, plus the adapter's digest while it is in use: identifies what velocity() computes now."""
        ...

    def encode_text(self, prompts: Sequence[str], max_sequence_length: int) -> Text:
        """Encoded prompts; n rows."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """(tokens, channels) of one image; UserError if the size does not fit the model's grid."""
        ...

    def velocity(self, x_t: Tensor, t: Tensor, text: Text, *, guidance_scale: float, height: int, width: int) -> Tensor:
        """v_theta(x_t, t, c) with the current adapter: x_t (n, tokens, channels), t (n,) -> x_t's shape, float32."""
        ...

    def passes(self, guidance_scale: float) -> int:
        """Passes through the transformer for one velocity."""
        ...

    def compile(self) -> None:
        """Compile the transformer's blocks (torch.compile): slow at first, faster afterward, equal up to rounding."""
        ...

    def checkpoint_activations(self, enabled: bool) -> None:
        """Whether velocity() with gradient keeps little and recomputes the rest in the backward pass."""
        ...

    def free(self) -> None:
        """Move the text encoders and VAE off the device until their next use."""
        ...

    def scheduler(self, name: str, num_inference_steps: int, height: int, width: int) -> Any:
        """A diffusers scheduler of class `name` with its timesteps set (resolution-dependent shift included)."""
        ...

    def decode(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """Images of packed latents (n, tokens, channels)."""

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Packed latents (n, tokens, channels) of images of one size (for import)."""
        ...

    def check_targets(self, targets: str | Sequence[str]) -> None:
        """UserError if the model lacks any of the layers that `targets` name."""
        ...

    def add_adapter(self, *, rank: int, alpha: int, targets: str | Sequence[str], seed: int) -> None:
        """Add a LoRA that leaves the model unchanged (B = 0)."""

    def adapter(self) -> dict[str, torch.nn.Parameter]:
        """The trainable LoRA parameters by name; float32."""
        ...

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` (same names as adapter()) into the adapter in place."""
        ...

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """Within it, the model is the reference (base weights only)."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Add and load an adapter that gdro exported (or any diffusers trainer wrote)."""
        ...
