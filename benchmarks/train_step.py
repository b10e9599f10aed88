"""Time of a training step over its floor: the bare forward and backward passes it needs.

Floor: the forward passes of reference and base without gradient that the objective asks for (none of the reference once
its errors are kept), the policy's forward and the backward through it, image by image in two passes, on batches already
made. Step: everything `gdro train` does between two steps' log lines: draws, reading, noise, passes, loss, clipping,
AdamW, EMA, figures. Both are measured in turns in one process; the ratio is the median of the turns' ratios. Weights do
not matter for time: the default is the tiny model's shape untrained; latents, trajectories and rewards are random. On
a CPU the time is the process's own, which other work on the machine hardly touches; on a GPU it is the clock's.

The share of the ceiling is the arithmetic that the floor needs (forward passes, and the backward pass through frozen
weights to the adapter; with checkpointing, what is computed again too) over what this device's matrix multiplication
does, measured here. On a GPU the peak of its memory is given too, of steps and floor together.

    python benchmarks/train_step.py --k 2 4 6 8 16 --draws 1 --gradients one_pass two_pass --out FILE.json
    python benchmarks/train_step.py --objectives all --repeats 7 --out FILE.json
    python benchmarks/random_flux.py --device cuda --out flux-random
    python benchmarks/train_step.py --model flux-random --device cuda --bf16 --height 512 --width 512 --length 512 \
        --images 24 --micro 1 --gradients one_pass two_pass --draws 1 --compile --repeats 6 --out FILE.json
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from gdro.common.files import write_json
from gdro.common.prompts import Prompt
from gdro.common.rng import numpy_rng, torch_rng
from gdro.groups.scores import Header, rewards_table, write_rewards
from gdro.groups.store import GroupStore, GroupWriter, ImageRow
from gdro.models import load_model
from gdro.models.base import FlowModel
from gdro.objectives.registry import OBJECTIVES
from gdro.rewards.base import Scores
from gdro.runner.planning.gpus import present
from gdro.samplers.trajectory import Trajectory
from gdro.stages.train import prepare
from gdro.training.config import TrainConfig
from gdro.training.learner import Learner
from gdro.training.log import MetricsLog
from gdro.training.step import train_step

TIMES = (1.0, 0.9, 0.7, 0.4)  # of the made-up trajectories: three stochastic steps


def made_up_groups(folder: Path, model: FlowModel, groups: int, size: int, sampling: dict[str, int | float]) -> None:
    """A store in `folder` of `groups` groups of `size` images with N(0, 1) latents and states, and U(0, 1) rewards."""
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
            sampler="flow_grpo",
        )
        for prompt in prompts
        for i in range(size)
    ]
    texts = {prompt.id: {name: value[[i]].cpu() for name, value in text.items()} for i, prompt in enumerate(prompts)}
    shape = (size, len(TIMES), *model.latent_shape(height, width))
    paths = {
        prompt.id: Trajectory(
            torch.randn(shape, generator=torch_rng(0, "states", prompt.id)),
            torch.zeros(size, len(TIMES) - 1),
            torch.tensor(TIMES),
        )
        for prompt in prompts
    }
    GroupWriter(folder / "groups").write_shard(0, rows, texts, paths)
    store = GroupStore(folder / "groups")
    header = Header("made_up", "1", store.contents)
    ids = [image for prompt in prompts for image in store.image_ids(prompt.id)]
    scores = Scores(numpy_rng(0, "rewards").random(len(ids)), [{} for _ in ids])
    write_rewards(folder / "rewards.parquet", header, [rewards_table(header, ids, scores)])


def now(device: torch.device) -> float:
    """Seconds, everything that was asked of the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def objective_passes(learner: Learner) -> int:
    """Passes without gradient that the objective asks for beside the policy's own."""
    objective = learner.objective
    if objective.kind == "trajectory":
        return objective.uses_base + objective.uses_old_mean
    return (bool(objective.uses_reference) and learner.data.reference_errors is None) + objective.uses_base


def floor_seconds(learner: Learner, step: int) -> float:
    """The passes alone, batch by batch, on inputs made beforehand."""
    draws, model, objective, total = learner.data.draws.at(step), learner.policies.model, learner.objective, 0.0
    size = learner.micro_batch.groups
    learner = learner.at(draws[0].group)
    for first in range(0, len(draws), size):
        if objective.kind == "trajectory":
            inputs = [(one.x, one.t, one.text) for one in learner.data.transitions.of(draws[first : first + size])[1]]
        else:
            inputs = [learner.data.batches.of(draws[first : first + size]).noised()]
        for x, t, text in inputs:
            parts = [(x[p], t[p], {name: v[p] for name, v in text.items()}) for p in learner.passes(len(t))]
            start = now(model.device)
            for _ in range(objective_passes(learner)):
                with torch.no_grad(), model.adapter_disabled():
                    for part in parts:
                        learner.policies.velocity(*part)
            for part in parts if objective.kind == "forward" and learner.micro_batch.images else ():
                with torch.no_grad():
                    learner.policies.velocity(*part)
            for part in parts:
                learner.policies.velocity(*part).square().mean().backward()
            total += now(model.device) - start
    learner.optimizer.zero_grad()
    return total


def flops(learner: Learner) -> dict[str, float]:
    """Of a velocity of one image: "forward" without gradient, "both" with the backward pass to the adapter."""
    draw = learner.data.draws.at(1)[0]
    learner = learner.at(draw.group)
    x, t, text = learner.data.batches.of([draw]).noised()
    x, t, text = x[:1], t[:1], {name: value[:1] for name, value in text.items()}
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        learner.policies.velocity(x, t, text)
    with FlopCounterMode(display=False) as both:
        learner.policies.velocity(x, t, text).sum().backward()
    learner.optimizer.zero_grad()
    return {"forward": forward.get_total_flops(), "both": both.get_total_flops()}


def step_seconds(learner: Learner, step: int, log: MetricsLog) -> float:
    start = now(learner.policies.model.device)
    log.write(step, train_step(learner, step))
    return now(learner.policies.model.device) - start


def measured(
    arguments: argparse.Namespace,
    model: FlowModel,
    folder: Path,
    sampling: dict[str, int | float],
    ceiling: float,
    *,
    objective: str,
    k: int,
    gradient: str,
    draws: int | None,
) -> dict[str, Any]:
    """Step over floor; the store in `folder` has groups of k images."""
    groups = arguments.images // k
    config = TrainConfig(
        objective=objective,
        k=k,
        groups_per_step=groups,
        micro_batch_groups=arguments.micro,
        rank=arguments.rank,
        group_gradient=gradient,
        images_per_pass=arguments.pieces if gradient == "two_pass" else None,
        reference_draws=draws,
        gradient_checkpointing=arguments.checkpointing,
    )
    options = sampling | {"sampler": "flow_grpo", "noise_level": 0.7}
    learner, _ = prepare(config, model, folder / "groups", folder / "rewards.parquet", seed=0, sampling=options)
    work = flops(learner)  # counted before compiling, which hides the operations
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if arguments.compile:
        model.compile()
    floors, steps = [], []
    with MetricsLog(folder / "metrics.jsonl", resumed=None) as log:
        for step in range(1, arguments.repeats + 3):
            if step % 2:  # in turns, so that a drift of the machine's speed favors neither
                floors.append(floor_seconds(learner, step))
                steps.append(step_seconds(learner, step, log))
            else:
                steps.append(step_seconds(learner, step, log))
                floors.append(floor_seconds(learner, step))
    floors, steps = floors[2:], steps[2:]  # the first two warm up, and fill what is kept of the reference
    ratios = [step / floor for step, floor in zip(steps, floors, strict=True)]
    others = objective_passes(learner)
    rate = groups * k / statistics.median(steps)
    found = {
        "objective": objective,
        "k": k,
        "gradient": gradient,
        "reference_draws": draws,
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
        "step_seconds": round(statistics.median(steps), 5),
        "floor_seconds": round(statistics.median(floors), 5),
        "images_per_second": round(rate, 2),
    }
    if learner.objective.kind == "forward":
        found["share_of_ceiling"] = round(rate * (work["both"] + others * work["forward"]) / ceiling, 4)
    if model.device.type == "cuda":
        found["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder or Hub id; default: the tiny model's shape, untrained")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--height", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=24, help="text length")
    parser.add_argument("--objectives", nargs="+", default=["gdro"], help="names, or all")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--images", type=int, default=96, help="images a step")
    parser.add_argument("--k", type=int, nargs="+", default=[6], help="images a group; DPO takes 2")
    parser.add_argument("--gradients", nargs="+", default=["one_pass"], choices=["one_pass", "two_pass"])
    parser.add_argument("--pieces", type=int, default=1, help="images a pass of two_pass")
    parser.add_argument("--draws", type=int, help="measure with train.reference_draws too, where it can be; take 1")
    parser.add_argument("--micro", type=int, help="groups a forward pass; default: all")
    parser.add_argument("--compile", action="store_true", help="compiled blocks")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--quantization", choices=["int8", "fp8", "nf4"], help="of the base's weights")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), arguments.model
        if source is None:
            from tiny.build import build_pipeline

            source = str(folder / "model")
            build_pipeline().save_pretrained(source)
        dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        device = torch.device(arguments.device)
        rates = present(device)
        ceiling = rates.half if arguments.bf16 else rates.single
        model = load_model(source, device=device, dtype=dtype, quantization=arguments.quantization)
        sampling: dict[str, int | float] = {"height": arguments.height, "width": arguments.width}
        sampling |= {"max_sequence_length": arguments.length, "guidance_scale": 3.5}
        names = list(OBJECTIVES) if arguments.objectives == ["all"] else arguments.objectives
        rows = []
        for k in sorted({2 if name == "dpo" else k for name in names for k in arguments.k}):
            made_up_groups(folder / str(k), model, arguments.images // k, k, sampling)
            for name in names:
                kind = OBJECTIVES[name]
                if kind.kind == "forward" and kind.fixed_k not in (None, k):
                    continue
                kept = [None, arguments.draws] if getattr(kind, "uses_reference", None) == "error" else [None]
                rows += [
                    measured(
                        arguments,
                        model,
                        folder / str(k),
                        sampling,
                        ceiling,
                        objective=name,
                        k=k,
                        gradient=gradient,
                        draws=draws,
                    )
                    for gradient in arguments.gradients
                    for draws in (kept if arguments.draws else [None])
                ]
    result = {
        "rows": rows,
        "ceiling_teraflops": round(ceiling / 1e12, 3),
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
