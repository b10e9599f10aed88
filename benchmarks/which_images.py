"""Which images of a group to train on, and how many, at equal cost: K sampled, k trained on, subset, gamma, objective.

    python benchmarks/which_images.py --task ocr --seeds 0 1 2 [--jobs 2] [--only "K=6 k=2 extremes gamma=5" ...]

Each seed samples a store of its own, of 12 images a prompt. A variant sees the first K of them, trains until sampling
(of K images) and training have cost BUDGET model evaluations together, and is measured with its last weights, never its
best, on validation prompts, never the test prompts. Results are kept a run at a time in
benchmarks/results/which_images.jsonl, so a stopped call resumes. Without --only all of the grid; `table` prints what
there is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ablations import interval

MOST = 12  # images a prompt in the stores
PROMPTS, SAMPLING_STEPS, GROUPS = 96, 6, 8  # of a store; groups of a training step
BUDGET = 9984  # PROMPTS x MOST x SAMPLING_STEPS for the images, the rest for training
COMMON = {
    "ocr": {"train.logit_mean": "1.0", "train.logit_std": "0.5", "train.ema_decay": "0.9", "train.ema_warmup": "0.02"},
    "geneval": {
        "train.logit_mean": "1.5",
        "train.logit_std": "1.0",
        "train.ema_decay": "0.95",
        "train.ema_warmup": "1",
    },
}
CONTROLS = (  # is a ranking worth anything beyond the best image? are soft targets? is another likelihood?
    "K=12 k=2 extremes sft",
    "K=6 k=2 extremes sft",
    "K=12 k=12 spread rwr",
    "K=12 k=2 extremes gamma=5 rank",
    "K=6 k=2 extremes gamma=5 rank",
)


def grid() -> list[str]:
    """The names of all variants; where k is K the subsets are one."""
    names = [
        f"K={most} k={k} {subset} gamma={gamma}"
        for most in (12, 6, 8)
        for k in (2, 4, 6)
        for subset in ("extremes", "spread", "random")
        for gamma in (5, 1, 0)
        if k < most or subset == "spread"
    ]
    return [*CONTROLS, *names]


def parse(name: str) -> tuple[int, dict[str, Any]]:
    """(K, fields of section `train`) of a variant."""
    most, k, subset, *rest = name.split()
    change: dict[str, Any] = {"k": int(k.removeprefix("k=")), "subset": subset, "objective": "gdro"}
    for word in rest:
        key, _, value = word.partition("=")
        change |= {key: float(value)} if value else {"objective": key}
    return int(most.removeprefix("K=")), change


def one(task: str, store: Path, name: str, seed: int, results: Path) -> None:
    """Train and measure one variant on a seed's store; append its row to `results`. "base" measures the base model."""
    import torch

    torch.set_num_threads(1)
    from gdro.evaluation.measure import make_scored, measure
    from gdro.groups.scores import Header, read_rewards, rewards_table, write_rewards
    from gdro.groups.store import GroupStore
    from gdro.models import load_model
    from gdro.rewards.base import Scores
    from gdro.rewards.registry import load_judge, load_reward
    from gdro.runner.config import load_config
    from gdro.stages.train import train
    from gdro.tiny.prompts import tiny_prompts
    from gdro.training.config import TrainConfig

    config = load_config(store / "config.yaml")
    model = load_model(config.model, device=torch.device("cpu"), dtype=torch.float32)
    reward, judge = load_reward(config.score.reward), load_judge("tiny")
    prompts, found = tiny_prompts(f"tiny:{task}:validation:64"), {}
    settings = config.evaluate.model_copy(update={"images_per_prompt": 4})
    row: dict[str, Any] = {"task": task, "variant": name, "seed": seed}

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def validate(model: Any, step: int) -> dict[str, float]:
            if step == 0 and name != "base":
                return {"reward": 0.0}
            how = config.sample
            scores = make_scored(
                settings, model, prompts, reward, folder / f"step-{step}", seed=1000 + seed, generation=how, label=name
            )
            found.update(measure(settings, prompts, reward, judge, scores, label=name).means())
            return found

        if name == "base":
            validate(model, 0)
        else:
            most, change = parse(name)
            groups = GroupStore(store / "groups")
            seen = read_rewards(store / "rewards" / f"{reward.name}.parquet", groups)
            header = Header(reward.name, reward.version, groups.contents)
            values = {group: np.where(np.arange(len(r)) < most, r.numpy(), np.nan) for group, r in seen.items()}
            tables = []
            for shard in groups.shards:
                ids = [f"{group}/{i}" for group, size in shard.groups.items() for i in range(size)]
                flat = np.concatenate([values[group] for group in shard.groups])
                tables.append(rewards_table(header, ids, Scores(flat, [{} for _ in ids])))
            write_rewards(folder / "first.parquet", header, tables)
            own = config.train.model_dump(exclude={"objective"})
            passes = 3 if change["objective"] in ("sft", "rwr") else 4
            images = GROUPS * change["k"]
            left = BUDGET - PROMPTS * most * SAMPLING_STEPS
            steps = left // (images * passes)
            limits = dict.fromkeys(("max_train_steps", "validation_steps", "checkpointing_steps"), steps)
            section = TrainConfig.model_validate(own | {"groups_per_step": GROUPS} | change | limits)
            shared = {"guidance_scale", "max_sequence_length", "height", "width"}
            train(
                section,
                model,
                store / "groups",
                folder / "first.parquet",
                folder,
                seed=seed,
                sampling=config.sample.model_dump(include=shared),
                validate=validate,
            )
            logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            last = [one for one in logged if "loss" in one][-20:]
            row |= {"steps": steps, "training": steps * images * passes, "sampling": BUDGET - left}
            for figure in ("drift_best", "drift_worst", "spread_s"):
                if figure in last[0]:
                    row[figure] = float(np.mean([one[figure] for one in last]))
    with open(results, "a") as file:
        file.write(json.dumps(row | found) + "\n")


def table(results: Path, task: str) -> str:
    """A Markdown table of a task: means over seeds of gains over the base, with half-widths of 95 % t-intervals."""
    rows: dict[str, dict[int, Any]] = defaultdict(dict)
    for line in results.read_text().splitlines():
        row = json.loads(line)
        if row["task"] == task:
            rows[row["variant"]][row["seed"]] = row
    base = rows.pop("base", {})
    lines = [
        "| variant | seeds | reward gain | corrected gain | judge | layout diversity | drift of the best |",
        "|---|" + "---|" * 6,
    ]

    def gain(found: dict[int, Any], field: str) -> str:
        return interval([row[field] - base[seed][field] for seed, row in found.items() if seed in base])

    order = sorted(rows, key=lambda name: -np.mean([row["corrected"] for row in rows[name].values()]))
    for name in order:
        found = rows[name]
        judge = np.mean([[row[a] for a in ("alignment", "coherence", "style")] for row in found.values()])
        drift = [row["drift_best"] for row in found.values() if "drift_best" in row]
        cells = [gain(found, "reward"), gain(found, "corrected"), f"{judge:.2f}", gain(found, "layout_diversity")]
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} | {f'{np.mean(drift):+.3f}' if drift else ''} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["ocr", "geneval"], default="ocr")
    parser.add_argument("--stores", type=Path, default=Path("runs/which_images"), help="where the seeds' stores lie")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=grid(), metavar="VARIANT")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "which_images.jsonl")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    store = {seed: args.stores / f"{args.task}-{seed}" for seed in args.seeds}
    if args.one:
        seed = int(args.one[1])
        one(args.task, store.get(seed, args.stores / f"{args.task}-{seed}"), args.one[0], seed, args.results)
        return
    args.results.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for seed, folder in store.items():
        fields = {
            "seed": seed,
            "sample.prompts": f"tiny:{args.task}:train:{PROMPTS}",
            "sample.images_per_prompt": MOST,
            "sample.num_inference_steps": SAMPLING_STEPS,
            "score.reward": args.task,
            "train.validation_prompts": f"tiny:{args.task}:validation:64",
            "evaluate.prompts": f"tiny:{args.task}:test:128",
            **COMMON[args.task],
        }
        options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
        for stage in ("sample", "score"):
            command = [sys.executable, "-m", "gdro", stage, "configs/demo.yaml", "--out", str(folder), *options]
            subprocess.run(command, env=environment, check=True)
    done = set()
    if args.results.exists():
        rows = map(json.loads, args.results.read_text().splitlines())
        done = {(row["variant"], row["seed"]) for row in rows if row["task"] == args.task}
    todo = [(n, s) for n in ("base", *args.only) for s in args.seeds if (n, s) not in done]

    def start(variant: tuple[str, int]) -> int:
        command = [sys.executable, __file__, "--task", args.task, "--stores", str(args.stores)]
        command += ["--results", str(args.results), "--one", variant[0], str(variant[1])]
        return subprocess.run(command, env=environment).returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(start, todo))
    if any(codes):
        sys.exit("a variant failed; see above")
    print(table(args.results, args.task))


if __name__ == "__main__":
    main()
