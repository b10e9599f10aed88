"""Time of a training step over its floor: the bare forward and backward passes it needs.

Floor: reference forward without gradient, policy forward, backward through its mean square, on a batch already made.
Step: everything `gdro train` does between two steps' log lines: draws, noise, both passes, loss, clipping, AdamW, EMA,
figures. Both are measured in turns in one process; the ratio is the median of the turns' ratios. Weights do not
matter for time, so the default is the tiny model's shape untrained; latents and rewards are random.

    python benchmarks/train_step.py --out benchmarks/results/train_step.json
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from gdro.files import write_json
from gdro.groups.store import GroupStore, GroupWriter, ImageRow
from gdro.models import load_model
from gdro.models.base import FlowModel
from gdro.prompts import Prompt
from gdro.rewards.base import Scores
from gdro.rewards.store import Header, rewards_table, write_rewards
from gdro.rng import numpy_rng, torch_rng
from gdro.stages.train import Learner, TrainConfig, prepare, train_step
from gdro.training.log import MetricsLog


def made_up_groups(folder: Path, model: FlowModel, groups: int, size: int, sampling: dict[str, int | float]) -> None:
    """A store of `groups` groups of `size` images with N(0, 1) latents, and U(0, 1) rewards."""
    height, width, length = (int(sampling[name]) for name in ("height", "width", "max_sequence_length"))
    prompts = [Prompt(f"g{i}", f'a red wall with a sign that says "word{i}"') for i in range(groups)]
    text = model.encode_text([prompt.text for prompt in prompts], length)
    rows = [
        ImageRow(
            group_id=prompt.id,
            index=i,
            prompt=prompt,
            image=Image.new("RGB", (width, height)),
            latent=torch.randn(model.latent_shape(height, width), generator=torch_rng(0, "latent", prompt.id, i)),
            seed=0,
            scheduler="FlowMatchEulerDiscreteScheduler",
            num_inference_steps=28,
            guidance_scale=float(sampling["guidance_scale"]),
            max_sequence_length=length,
            height=height,
            width=width,
            generator=model.name,
            revision=model.revision,
            round=0,
        )
        for prompt in prompts
        for i in range(size)
    ]
    texts = {prompt.id: {name: value[[i]].cpu() for name, value in text.items()} for i, prompt in enumerate(prompts)}
    GroupWriter(folder / "groups").write_shard(0, rows, texts)
    store = GroupStore(folder / "groups")
    header = Header("made_up", "1", store.contents)
    ids = [image for prompt in prompts for image in store.image_ids(prompt.id)]
    scores = Scores(numpy_rng(0, "rewards").random(len(ids)), [{} for _ in ids])
    write_rewards(folder / "rewards.parquet", header, [rewards_table(header, ids, scores)])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def floor_seconds(learner: Learner, step: int) -> float:
    """The passes alone, micro-batch by micro-batch, on inputs made beforehand."""
    visits, model, total = learner.visits.at(step), learner.model, 0.0
    size = learner.config.micro_batch_groups or len(visits)
    for first in range(0, len(visits), size):
        batch = learner.batches.of(visits[first : first + size])
        x_t = ((1 - batch.t) * batch.x0 + batch.t * batch.eps).flatten(0, 1)
        t = batch.t.flatten()
        with torch.no_grad(), model.adapter_disabled():
            wait(model.device)
            start = time.perf_counter()
            model.velocity(x_t, t, batch.text, **learner.geometry)
            wait(model.device)
            total += time.perf_counter() - start
        start = time.perf_counter()
        model.velocity(x_t, t, batch.text, **learner.geometry).square().mean().backward()
        wait(model.device)
        total += time.perf_counter() - start
    learner.optimizer.zero_grad()
    return total


def step_seconds(learner: Learner, step: int, log: MetricsLog) -> float:
    wait(learner.model.device)
    start = time.perf_counter()
    log.write(step, train_step(learner, step))
    wait(learner.model.device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder or Hub id; default: the tiny model's shape, untrained")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--height", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=24, help="text length")
    parser.add_argument("--k", type=int, default=6)
    parser.add_argument("--groups", type=int, default=16, help="groups a step")
    parser.add_argument("--micro", type=int, help="groups a forward pass; default: all")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), arguments.model
        if source is None:
            from gdro.tiny.build import build_pipeline

            source = str(folder / "model")
            build_pipeline().save_pretrained(source)
        dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        model = load_model(source, device=torch.device(arguments.device), dtype=dtype)
        sampling: dict[str, int | float] = {"height": arguments.height, "width": arguments.width}
        sampling |= {"max_sequence_length": arguments.length, "guidance_scale": 3.5}
        made_up_groups(folder, model, arguments.groups, 2 * arguments.k, sampling)
        config = TrainConfig(k=arguments.k, groups_per_step=arguments.groups, micro_batch_groups=arguments.micro)
        learner, _ = prepare(config, model, folder / "groups", folder / "rewards.parquet", seed=0, sampling=sampling)
        floors, steps = [], []
        with MetricsLog(folder / "metrics.jsonl", resumed=None) as log:
            for step in range(1, arguments.repeats + 3):
                if step % 2:  # in turns, so that a drift of the machine's speed favours neither
                    floors.append(floor_seconds(learner, step))
                    steps.append(step_seconds(learner, step, log))
                else:
                    steps.append(step_seconds(learner, step, log))
                    floors.append(floor_seconds(learner, step))
    floors, steps = floors[2:], steps[2:]  # the first two warm up
    ratios = [step / floor for step, floor in zip(steps, floors, strict=True)]
    step_time, floor_time = statistics.median(steps), statistics.median(floors)
    result = {
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
        "step_seconds": round(step_time, 5),
        "floor_seconds": round(floor_time, 5),
        "images_per_second": round(arguments.groups * arguments.k / step_time, 2),
        "repeats": arguments.repeats,
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("out", "model")},
        "model": "tiny, untrained" if arguments.model is None else Path(arguments.model).name,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
    }
    write_json(arguments.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
