"""A whole run of a few seconds: a very small model, prompts in files, a reward and a judge of the user's own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

REWARDS = """
import numpy as np


def redness(images, prompts):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def blueness(images, prompts):
    return [float(np.asarray(image)[..., 2].mean()) / 255 for image in images]


def missing(images, prompts):
    return [float("nan")] * len(images)


def short(images, prompts):
    return [0.5] * (len(images) - 1)


def broken(images, prompts):
    return [image.redness for image in images]


def calm(images, prompts):
    grades = [1 + 4 * float(np.asarray(image)[..., 1].mean()) / 255 for image in images]
    return {"alignment": grades, "coherence": grades, "style": grades}
"""


def prompt_lines(prefix: str, count: int) -> str:
    return "".join(f'{{"id": "{prefix}{i}", "prompt": "a sign \\"{prefix}{i}\\""}}\n' for i in range(count))


def small_run(folder: Path, model: Path) -> Path:
    """Write prompts, `my_rewards.py` and config.yaml into `folder`; returns the latter's path."""
    for name, count in (("train", 4), ("validation", 2), ("test", 2)):
        (folder / f"{name}.jsonl").write_text(prompt_lines(name, count))
    (folder / "my_rewards.py").write_text(REWARDS)
    config: dict[str, Any] = {
        "model": str(model),
        "sample": {
            "prompts": str(folder / "train.jsonl"),
            "images_per_prompt": 4,
            "num_inference_steps": 2,
            "max_sequence_length": 32,
            "height": 32,
            "width": 64,
            "prompts_per_shard": 1,
        },
        "score": {"reward": "my_rewards:redness"},
        "train": {
            "k": 3,
            "max_train_steps": 6,
            "groups_per_step": 2,
            "rank": 2,
            "checkpointing_steps": 2,
            "validation_steps": 3,
            "validation_prompts": str(folder / "validation.jsonl"),
        },
        "evaluate": {
            "prompts": str(folder / "test.jsonl"),
            "images_per_prompt": 2,
            "num_inference_steps": 2,
            "judge": "my_rewards:calm",
            "bootstrap_samples": 100,
        },
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(
    folder: Path, *arguments: str, program: Sequence[str] = ("-m", "gdro"), slow: bool = False, preexec: Any = None
) -> subprocess.Popen[str]:
    """`python -m gdro ARGUMENTS` in `folder`; `slow` makes the reward take a while."""
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "REWARD_SECONDS": "0.2" if slow else "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec,
    )
