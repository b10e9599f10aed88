"""The paper's ablations in miniature on the embedded default: one change at a time, three seeds each.

    python benchmarks/ablations.py --groups runs/demo [--jobs 2] [--only k=2 gamma=0] [--steps 80] [--seeds 3]

Groups and rewards of an existing run are shared; each variant trains from them and is measured on validation prompts
(never the test prompts) with its last weights, not its best ones, so that a collapse shows. Results are kept a run at
a time in benchmarks/results/ablations.jsonl, so a stopped call goes on where it was. What a fixed pool of draws costs:

    gdro sample configs/demo.yaml --out runs/draws && gdro score configs/demo.yaml --out runs/draws
    python benchmarks/ablations.py --groups runs/draws --only default draws=2 draws=8 draws=32 \\
        --results benchmarks/results/reference_draws.jsonl
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "k=2": {"k": 2},
    "k=4": {"k": 4},
    "k=8": {"k": 8},
    "gamma=0": {"gamma": 0.0},
    "beta/2": {"beta": 0.5},
    "beta*2": {"beta": 2.0},
    "tau=.025": {"tau": 0.025},
    "tau=.5": {"tau": 0.5},
    "draws=2": {"reference_draws": 2},
    "draws=8": {"reference_draws": 8},
    "draws=32": {"reference_draws": 32},
}
IMAGES_A_STEP = 48  # the same for every k


def one(run: Path, name: str, seed: int, steps: int, results: Path) -> None:
    """Train and measure one variant with one seed; append its row to `results`."""
    import torch

    torch.set_num_threads(1)
    from gdro.evaluation.measure import make_scored, measure
    from gdro.models import load_model
    from gdro.rewards.registry import load_judge, load_reward
    from gdro.runner.config import load_config
    from gdro.stages.train import train
    from gdro.tiny.prompts import tiny_prompts
    from gdro.training.config import TrainConfig

    config = load_config(run / "config.yaml")
    change = {"k": 6, "subset": "spread", **VARIANTS[name]}  # what the rows so far were measured with
    if "beta" in change:
        change["beta"] *= config.train.objective.beta
    k = change["k"]
    section = TrainConfig.model_validate(
        {
            **config.train.flat(),
            **change,
            "groups_per_step": IMAGES_A_STEP // k,
            "max_train_steps": steps,
            "validation_steps": steps,
            "checkpointing_steps": steps,
        }
    )
    model = load_model(config.model, device=torch.device("cpu"), dtype=torch.float32)
    reward, judge = load_reward(config.score.reward), load_judge("tiny")
    prompts = tiny_prompts("tiny:ocr:validation:64")
    found: dict[int, dict[str, float]] = {}

    with tempfile.TemporaryDirectory() as folder:

        def validate(model: Any, step: int) -> dict[str, float]:
            settings = config.evaluate.model_copy(update={"images_per_prompt": 4})
            images, how = Path(folder) / f"step-{step}", config.sample
            scores = make_scored(settings, model, prompts, reward, images, seed=1000 + seed, generation=how, label=name)
            found[step] = measure(settings, prompts, reward, judge, scores, label=name).means()
            return found[step]

        train(
            section,
            model,
            run / "groups",
            run / "rewards" / f"{reward.name}.parquet",
            Path(folder),
            seed=seed,
            sampling=config.sample.model_dump(include={"guidance_scale", "max_sequence_length", "height", "width"}),
            validate=validate,
        )
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        last = [row for row in rows if "loss" in row][-20:]
        evaluations = [row["validation"]["nfe"]["train"] for row in rows if "validation" in row][-1]
    figures = {n: float(np.mean([r[n] for r in last])) for n in ("drift_best", "drift_worst", "entropy_p", "spread_s")}
    scores = {
        f"{axis}_{when}": found[step][axis]
        for axis in ("reward", "corrected", "alignment", "coherence", "style")
        for when, step in (("base", 0), ("tuned", steps))
    }
    row = {"variant": name, "seed": seed, "steps": steps, "nfe": evaluations, **scores, **figures}
    with open(results, "a") as file:
        file.write(json.dumps(row) + "\n")


def table(results: Path) -> str:
    """A Markdown table: mean over seeds, with the half-width of a 95 % t-interval over them.

    Differences from the default are by seed: the same groups, order of draws and validation images.
    """
    rows = defaultdict(list)
    for line in results.read_text().splitlines():
        row = json.loads(line)
        rows[row["variant"]].append(row)
    lines = [
        "| variant | seeds | reward gain | corrected gain | reward - default | corrected - default | judge mean "
        "| drift best | drift worst |",
        "|---|" + "---|" * 8,
    ]
    defaults = {row["seed"]: row for row in rows["default"]}
    for name in VARIANTS:
        if name not in rows:
            continue
        found = rows[name]
        pairs = [(row, defaults[row["seed"]]) for row in found if row["seed"] in defaults]
        cells = [
            *(interval([r[f"{a}_tuned"] - r[f"{a}_base"] for r in found]) for a in ("reward", "corrected")),
            *(interval([r[f"{a}_tuned"] - d[f"{a}_tuned"] for r, d in pairs]) for a in ("reward", "corrected")),
            f"{np.mean([[r[f'{a}_tuned'] for a in ('alignment', 'coherence', 'style')] for r in found]):.2f}",
            *(f"{np.mean([r[n] for r in found]):+.4f}" for n in ("drift_best", "drift_worst")),
        ]
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> str:
    """Mean and half-width of its 95 % t-interval."""
    if len(values) < 2:
        return f"{values[0]:+.3f}" if values else "-"
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}[len(values)]
    return f"{np.mean(values):+.3f} ± {t * np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=Path, required=True, help="a run directory with groups and rewards")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "ablations.jsonl")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.groups, args.one[0], int(args.one[1]), args.steps, args.results)
        return
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if args.results.exists():
        done = {(r["variant"], r["seed"]) for r in map(json.loads, args.results.read_text().splitlines())}
    todo = [(n, s) for s in range(args.seeds) for n in args.only if (n, s) not in done]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(variant: tuple[str, int]) -> int:
        command = [sys.executable, __file__, "--groups", str(args.groups), "--steps", str(args.steps)]
        command += ["--results", str(args.results), "--one", variant[0], str(variant[1])]
        return subprocess.run(command, env=environment).returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(start, todo))
    if any(codes):
        sys.exit("a variant failed; see above")
    print(table(args.results))


if __name__ == "__main__":
    main()
