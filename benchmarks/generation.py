"""Images a second of `gdro sample` over those of the plain diffusers loop, as ratios in one run.

Plain: what a script would do, one `pipe(prompt)` an image, each saved as PNG. Ours: `sample_groups`, from prompts to a
store on the disk, by batch size. They take turns, the order changing; a ratio is the median of the turns'. Weights do
not matter for time: the default is the tiny model's shape, untrained. No warm-up is counted.

    python benchmarks/generation.py --out benchmarks/results/generation.json
    python benchmarks/generation.py --model FLUX.1-dev --device cuda --bf16 --height 512 --width 512 --length 512 \\
        --prompts 2 --batches 1 4 8 16 --out benchmarks/results/generation_flux_h200.json
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from gdro.common.files import write_json
from gdro.common.prompts import Prompt
from gdro.groups.sampling import sample_groups
from gdro.models import load_model
from gdro.samplers.settings import Generation


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder; default: the tiny model's shape, untrained")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--height", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=24, help="text length")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--images", type=int, default=16, help="images a prompt")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    prompts = [Prompt(f"p{i}", f'a red wall with a sign that says "word{i}"') for i in range(arguments.prompts)]
    count = arguments.prompts * arguments.images

    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), arguments.model
        if source is None:
            from tiny.build import build_pipeline

            source = str(folder / "model")
            build_pipeline().save_pretrained(source)
        pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype).to(arguments.device)
        pipe.set_progress_bar_config(disable=True)
        model = load_model(source, device=torch.device(arguments.device), dtype=dtype)
        common: dict[str, Any] = {"height": arguments.height, "width": arguments.width}
        common |= {"num_inference_steps": arguments.steps, "max_sequence_length": arguments.length}

        def plain() -> None:
            for prompt in prompts:
                for i in range(arguments.images):
                    pipe(prompt.text, guidance_scale=3.5, **common).images[0].save(folder / f"{prompt.id}-{i}.png")

        def ours(batch: int, turn: int) -> Callable[[], object]:
            settings = Generation(images_per_prompt=arguments.images, batch_size=batch, guidance_scale=3.5, **common)
            return lambda: sample_groups(settings, model, prompts, folder / f"{batch}-{turn}", seed=0)

        ratios: dict[int, list[float]] = {batch: [] for batch in arguments.batches}
        rates: dict[int | str, list[float]] = {}
        for turn in range(arguments.repeats + 1):
            seconds: dict[int | str, float] = {}
            jobs: list[tuple[int | str, Callable[[], object]]] = [("plain", plain)]
            jobs += [(batch, ours(batch, turn)) for batch in arguments.batches]
            for key, job in jobs if turn % 2 else reversed(jobs):
                seconds[key] = timed(job)
            if turn:  # the first warms up
                for batch in arguments.batches:
                    ratios[batch].append(seconds["plain"] / seconds[batch])
                for key, value in seconds.items():
                    rates.setdefault(key, []).append(count / value)
            print({key: round(count / value, 3) for key, value in seconds.items()}, flush=True)

    result = {
        "speed_over_plain": {
            str(batch): {
                "median": round(statistics.median(found), 3),
                "quartiles": [round(q, 3) for q in statistics.quantiles(found, n=4)],
            }
            for batch, found in ratios.items()
        },
        "images_per_second": {str(key): round(statistics.median(found), 3) for key, found in rates.items()},
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("out", "model")},
        "model": "tiny, untrained" if arguments.model is None else Path(arguments.model).name,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
    }
    write_json(arguments.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
