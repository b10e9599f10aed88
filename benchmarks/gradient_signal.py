"""Which noise levels teach: signal-to-noise ratio of the objective's gradient at the start of training, by t.

    python benchmarks/gradient_signal.py RUN --t 0.5 0.73 0.88 0.95

RUN is a run directory with groups and rewards. For each t (shared by a group, as in training) the gradient of the LoRA
is taken on `--batches` disjoint draws of `--groups` groups. Their mean dot product between different batches estimates
the squared length of the true gradient without bias, the mean squared length minus that its noise; the ratio is given
per thousand images. It says how well a direction is known, not that it is the right one: no image is generated.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from gdro.runner.config import saved_config
from gdro.runner.pipeline import Run
from gdro.stages.train import prepare
from gdro.training.step import backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--t", type=float, nargs="+", default=[0.3, 0.5, 0.73, 0.88, 0.95, 0.98])
    parser.add_argument("--subset", nargs="+", default=["spread", "extremes"])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--gamma", type=float, default=0.0, help="weight of the best image's term (0: the ranking's)")
    args = parser.parse_args()

    config = saved_config(args.run)
    if config is None:
        sys.exit(f"{args.run} is no run directory")
    job = Run(config, args.run)
    rows = []
    for subset in args.subset:
        for t in args.t:
            fields = {"timestep": "logit_normal", "logit_mean": math.log(t / (1 - t)), "logit_std": 1e-6}
            fields |= {"subset": subset, "groups_per_step": args.groups, "gamma": args.gamma}
            train = config.train.model_copy(update=fields)
            learner, _ = prepare(train, job.model, job.groups, job.scores, seed=0, sampling=job.sampling)
            gradients = []
            for step in range(1, args.batches + 1):
                draws = learner.data.draws.at(step)
                backward(learner, draws, sum(draw.ranked for draw in draws))
                found = [p.grad.flatten() for p in learner.policies.parameters.values() if p.grad is not None]
                gradients.append(torch.cat(found))
                learner.optimizer.zero_grad()
            products = torch.stack(gradients) @ torch.stack(gradients).T
            count = len(products)
            length = float(products.diagonal().mean())
            signal = float((products.sum() - products.diagonal().sum()) / (count * (count - 1)))
            ratio = 1000 * signal / (length - signal) / (args.groups * train.k)
            rows.append({"subset": subset, "t": t, "norm": length**0.5, "signal_to_noise_per_1000_images": ratio})
            print(f"{subset:9s} t {t:.2f}  |g| {length**0.5:6.2f}  per 1,000 images {ratio:6.3f}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
