"""How good the embedded base is before any post-training, and how much room and spread it leaves.

    python benchmarks/base_model.py [--model FOLDER] [--prompts 64] [--images 12] [--steps 28]

On validation prompts: OCR reward (mean, spread within a group, best of the group), the judge's axes, and the strict
and soft GenEval verdicts for each of the six tags, read off the pictures by the tiny world's own classical vision.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline

from gdro.common.rng import torch_rng
from gdro.models.loading import TINY_FOLDER
from gdro.rewards.derived import base_rewards
from gdro.rewards.geneval.rules import summary
from gdro.rewards.registry import load_reward
from gdro.tiny import world
from gdro.tiny.judge import TinyJudge
from gdro.tiny.prompts import tiny_prompts


def generate(pipe: FluxPipeline, prompts: list[Any], images: int, steps: int) -> list[Any]:
    pictures = []
    for prompt in prompts:
        noise = [torch.randn(32, 64, generator=torch_rng(0, "base-model", prompt.id, i)) for i in range(images)]
        pictures += pipe(
            [prompt.text] * images,
            height=world.HEIGHT,
            width=world.WIDTH,
            num_inference_steps=steps,
            guidance_scale=3.5,
            max_sequence_length=24,
            latents=torch.stack(noise),
        ).images
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY_FOLDER)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--sheet", type=Path, help="also save a contact sheet of pictures here")
    args = parser.parse_args()
    pipe = FluxPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    result: dict[str, Any] = {"prompts": args.prompts, "images": args.images, "steps": args.steps}
    sheet = []

    prompts = tiny_prompts(f"tiny:ocr:validation:{args.prompts}")
    pictures = generate(pipe, prompts, args.images, args.steps)
    records = [p for p in prompts for _ in range(args.images)]
    rewards = base_rewards(load_reward("ocr"))[0](pictures, records).values.reshape(-1, args.images)
    grades = TinyJudge()(pictures, records)
    result["ocr"] = {
        "mean": rewards.mean(),
        "spread_within_group": rewards.std(1).mean(),
        "best_of_group": rewards.max(1).mean(),
        "groups_without_spread": (rewards.std(1) == 0).mean(),
        **{axis: values.mean() for axis, values in grades.items()},
    }
    sheet += pictures[:: args.images][:24]

    prompts = tiny_prompts(f"tiny:geneval:validation:{2 * args.prompts}")
    count = max(2, args.images // 3)
    pictures = generate(pipe, prompts, count, args.steps)
    records = [p for p in prompts for _ in range(count)]
    evidence = base_rewards(load_reward("geneval"))[0](pictures, records).evidence
    grades = TinyJudge()(pictures, records)
    result["geneval"] = {axis: values.mean() for axis, values in grades.items()}
    for kind, field in (("strict", "correct"), ("soft", "soft")):
        values = np.array([found[field] for found in evidence], np.float64).reshape(-1, count)
        result["geneval"][kind] = summary(values, [p.fields["tag"] for p in prompts])
    sheet += pictures[::count][:24]
    print(json.dumps(result, indent=2, default=lambda x: round(float(x), 4)))
    if args.sheet:
        from PIL import Image

        canvas = Image.new("RGB", (8 * 66, 6 * 34))
        for i, picture in enumerate(sheet):
            canvas.paste(picture, (i % 8 * 66 + 1, i // 8 * 34 + 1))
        canvas.resize((canvas.width * 2, canvas.height * 2), Image.Resampling.NEAREST).save(args.sheet)


if __name__ == "__main__":
    main()
