"""A real store of groups with made-up latents and rewards, for tests of training."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gdro.common.prompts import Prompt
from gdro.common.rng import torch_rng
from gdro.groups.scores import Header, rewards_table, write_rewards
from gdro.groups.store import GroupStore, GroupWriter, ImageRow
from gdro.models.base import FlowModel, Text
from gdro.rewards.base import Scores

HEIGHT, WIDTH, LENGTH, GUIDANCE = 32, 64, 16, 3.5
SAMPLING = {"guidance_scale": GUIDANCE, "max_sequence_length": LENGTH, "height": HEIGHT, "width": WIDTH}


def write_toy(
    folder: Path,
    model: FlowModel,
    *,
    groups: int = 6,
    images: int = 8,
    rewards: list[list[float]] | None = None,
    sizes: Sequence[tuple[int, int]] = ((HEIGHT, WIDTH),),
) -> tuple[Path, Path]:
    """(groups, rewards): latents N(0, 1); rewards U(0, 1) unless given, one list a group; sizes take turns."""
    ids = [f"g{i}" for i in range(groups)]
    prompts = [Prompt(group, f'a red wall with a sign "word{i}"') for i, group in enumerate(ids)]
    text = model.encode_text([prompt.text for prompt in prompts], LENGTH)
    texts: dict[str, Text] = {group: {n: v[[i]].clone() for n, v in text.items()} for i, group in enumerate(ids)}
    rows = [
        ImageRow(
            group_id=prompt.id,
            index=index,
            prompt=prompt,
            image=Image.new("RGB", (width, height)),
            latent=torch.randn(model.latent_shape(height, width), generator=torch_rng(0, "toy", prompt.id, index)),
            seed=0,
            scheduler="FlowMatchEulerDiscreteScheduler",
            num_inference_steps=28,
            guidance_scale=GUIDANCE,
            max_sequence_length=LENGTH,
            height=height,
            width=width,
            generator=model.name,
            revision=model.revision,
            round=0,
        )
        for prompt, (height, width) in zip(prompts, cycle(sizes), strict=False)
        for index in range(images)
    ]
    GroupWriter(folder / "groups").write_shard(0, rows, texts)
    store = GroupStore(folder / "groups")
    values = np.random.default_rng(0).random((groups, images)) if rewards is None else np.array(rewards)
    header = Header("toy", "1", store.contents)
    scores = Scores(values.ravel(), [{} for _ in range(values.size)])
    table = rewards_table(header, [i for group in ids for i in store.image_ids(group)], scores)
    write_rewards(folder / "rewards" / "toy.parquet", header, [table])
    return folder / "groups", folder / "rewards" / "toy.parquet"
