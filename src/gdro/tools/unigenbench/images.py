"""Sources of the benchmark's images: a model, or a folder of images made elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.common.hub import digest
from gdro.common.images import open_image
from gdro.common.prompts import Prompt
from gdro.common.sealed import find_record, write_record
from gdro.samplers.settings import Generation

if TYPE_CHECKING:  # which imports torch
    from gdro.groups.store import GroupStore


@dataclass(frozen=True)
class Folder:
    """Images `<index>_<i>.png`, i from 0, as the published code names them."""

    path: Path
    per_prompt: int

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if a file is missing or not an image."""
        paths = [self._path(prompt, i) for prompt in prompts for i in range(self.per_prompt)]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise UserError(
                f"--images-from: {missing[0]} and {len(missing) - 1} more of {len(paths)} not found; "
                f"expected {self.per_prompt} images per prompt, named <index>_<i>.png"
            )
        for path in paths:
            open_image(path, f"--images-from: {path}")

    def make(self, prompts: Sequence[Prompt]) -> None:
        """Do nothing: the images exist."""

    def images(self, prompt: Prompt) -> list[Image.Image]:
        """The prompt's images; raises UserError naming a damaged file."""
        paths = [self._path(prompt, i) for i in range(self.per_prompt)]
        return [open_image(path, f"--images-from: {path}") for path in paths]

    @property
    def about(self) -> dict[str, Any]:
        """The origin of the images, for the results."""
        return {"folder": str(self.path)}

    def _path(self, prompt: Prompt, i: int) -> Path:
        return self.path / f"{prompt.id}_{i}.png"


@dataclass(frozen=True)
class Sampled:
    """Images made by a model and kept as a store of groups in `store`; sampling resumes there."""

    store: Path
    model: str
    adapter: Path | None  # the folder that holds its files
    generation: Generation
    seed: int
    device: str
    mixed_precision: str

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if the model, adapter or device is missing."""
        from gdro.common.device import torch_device
        from gdro.models import check_model
        from gdro.runner.checks import tell_cut

        check_model(self.model)
        tell_cut(self.model, prompts, self.generation.max_sequence_length)
        torch_device(self.device, "--device")

    def make(self, prompts: Sequence[Prompt]) -> None:
        """Make missing images. If there are none, the model is not loaded, so a judge can have the GPU.

        Raises UserError if the store was begun with other settings, prompts or weights.
        """
        done = self.store.with_name("images.json")
        whole = self.about | {"prompts": fingerprint([prompt.to_json() for prompt in prompts])}
        if find_record(done) == whole:
            return
        import torch

        from gdro.groups.sampling import sample_groups
        from gdro.models import load_model

        dtype = torch.bfloat16 if self.mixed_precision == "bf16" else torch.float32
        model = load_model(self.model, device=self.device, dtype=dtype)
        if self.adapter is not None:
            model.load_adapter(self.adapter)
        # the same purpose as in evaluation: noise depends on (seed, prompt, index), not on the model
        sample_groups(
            self.generation, model, prompts, self.store, seed=self.seed, purpose="evaluation", label="benchmark"
        )
        write_record(done, whole)

    def images(self, prompt: Prompt) -> list[Image.Image]:
        """The prompt's images."""
        return self._groups.images(prompt.id)

    @cached_property
    def _groups(self) -> GroupStore:
        from gdro.groups.store import GroupStore

        return GroupStore(self.store)

    @cached_property
    def about(self) -> dict[str, Any]:
        """The origin of the images, for the results."""
        from gdro.models.adapter_file import adapter_files
        from gdro.models.loading import model_revision

        adapter = self.adapter and {"folder": str(self.adapter), "digest": digest(adapter_files(self.adapter))}
        settings = self.generation.model_dump(exclude={"batch_size", "prompts_per_shard"})
        return {
            "model": self.model,
            "revision": model_revision(self.model),
            "adapter": adapter,
            "mixed_precision": self.mixed_precision,
            "seed": self.seed,
            **settings,
        }


def find_adapter(path: Path) -> Path:
    """The folder with the adapter's weights: `path`, or the export of a run at `path`. UserError if there is none."""
    from gdro.models.adapter_file import WEIGHTS, adapter_files

    for folder in (path, path / "adapter"):
        if adapter_files(folder):
            return folder
    raise UserError(
        f"--adapter: {path} holds no {' or '.join(WEIGHTS)}; expected an exported run, or an adapter's folder"
    )
