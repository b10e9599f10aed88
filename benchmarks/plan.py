"""A plan against the run it is a plan of, on the tiny model: seconds of sampling and training, and disk.

Seconds are the process's own on one thread, so that other work on the machine is not counted.

python benchmarks/plan.py --out benchmarks/results/plan.json
"""

import argparse
import json
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from gdro.common.files import write_json
from gdro.runner.config import load_config
from gdro.runner.pipeline import run
from gdro.runner.planning.gpus import present
from gdro.runner.planning.plan import plan
from gdro.runner.planning.shapes import shapes_of
from gdro.runner.planning.timing import measured_pace

PROMPTS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    overrides = [
        ("device", "cpu"),
        ("sample.prompts", f"tiny:ocr:train:{PROMPTS}"),
        ("train.max_train_steps", str(arguments.steps)),
        ("train.validation_prompts", "null"),
        ("evaluate.prompts", f"tiny:ocr:test:{PROMPTS}"),
    ]
    with (
        resources.as_file(resources.files("gdro") / "recipes" / "demo.yaml") as recipe,
        tempfile.TemporaryDirectory() as folder,
    ):
        config = load_config(recipe, overrides)
        counts = {"train": PROMPTS, "validation": None, "test": PROMPTS}
        shapes, here = shapes_of(config, cuda=False), present(device)
        timed = plan(config, shapes, here, counts, measured_pace(config, device, time.process_time))
        counted = plan(config, shapes, here, counts)
        out = Path(folder) / "run"
        seconds = {}
        for stage in ("sample", "score", "train"):
            begun = time.process_time()
            run(config, out, [stage])
            seconds[stage] = time.process_time() - begun
        disk = sum(p.stat().st_size for p in (out / "groups").iterdir())
    stages: dict[str, Any] = {}
    for how, found in (("timed passes", timed), ("counted, with the device's rates", counted)):
        for planned in found.stages:
            if planned.name in ("sample", "train") and planned.hours is not None:
                predicted = 3600 * planned.hours
                stages.setdefault(planned.name, {"seconds": round(seconds[planned.name], 3)})[how] = {
                    "seconds": round(predicted, 3),
                    "ratio": round(predicted / seconds[planned.name], 3),
                }
    groups = counted.disk["groups"] or 0.0
    result = {
        "stages": stages,
        "groups_bytes": {"found": disk, "ratio": round(groups / disk, 3)},
        "rates": here.assumed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_json(arguments.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
