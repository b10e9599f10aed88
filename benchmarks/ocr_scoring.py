"""Images a second of the OCR reward as `gdro score` runs it, over calling its engine one image at a time; its memory.

Ours: `score_groups` on a store of groups, a process a core: with the start of the processes, decoding PNG, the rule
and writing the rewards file. One at a time, on the same images already decoded, models loaded and warm, reading only:

* default: `RapidOCR()` as it comes: all cores for each call, classifier of angles, the short side enlarged to 736
  pixels, lines padded to 320 pixels and read in batches of six;
* all_cores: with the reward's settings, but ONNX Runtime's default threads, all cores for each call;
* one_core: with the reward's settings and one thread, as the reward itself reads in a process. Two cores can at best
  be twice as fast as this; what is lost is the start of the processes.

The sides are measured in turns, the order reversed each turn; a ratio is of one turn. Processor seconds an image are
given too: on a machine that other work keeps busy, a side of two processes is given twice the time of a side of one
thread, and only those compare the work. Images are signs, of the tiny world's size by default.

    python benchmarks/ocr_scoring.py --out benchmarks/results/ocr_scoring.json
    python benchmarks/ocr_scoring.py --memory 10000 --out benchmarks/results/ocr_memory.json

`--memory N` scores N images and samples the memory of the whole process tree every half second: what is resident and
backed by no file (pages of libraries come and go as the system likes). A slope is the line through the samples of one
half of the run.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gdro.common.files import write_json
from gdro.common.prompts import Prompt
from gdro.rewards.ocr.engines import RAPIDOCR

# torch and the like are imported where they are used: score_groups starts processes that import this file again, and
# would pay for them as those of `gdro score` do not
GROUP, SHARD = 16, 16  # images a group, groups a file


def sign(word: str, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A white sign with `word` on a wall of noise, as the tiny model's images: no two are alike."""
    wall = rng.integers(40, 200, 3) + rng.normal(0, 8, (height, width, 3))
    image = Image.fromarray(wall.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.rectangle((width * 0.05, height * 0.15, width * 0.95, height * 0.75), fill="#fafafa", outline="#141414")
    font = ImageFont.load_default(int(min(height * 0.45, width / len(word))))
    draw.text((width / 2, height * 0.45), word, font=font, fill="black", anchor="mm")
    return image


def write_groups(folder: Path, images: int, width: int, height: int) -> None:
    """A store of `images` signs with words of four letters, every other one misspelled."""
    import torch

    from gdro.common.rng import numpy_rng
    from gdro.groups.store import GroupWriter, ImageRow

    writer, letters = GroupWriter(folder), [chr(ord("A") + i) for i in range(26)]
    groups = -(-images // GROUP)
    for shard, first in enumerate(range(0, groups, SHARD)):
        rows, text = [], {}
        for group in range(first, min(first + SHARD, groups)):
            rng = numpy_rng(0, "ocr benchmark", group)
            word = "".join(rng.choice(letters, 4))
            prompt = Prompt(f"g{group}", f'a wall with a sign that says "{word}"')
            text[prompt.id] = {"prompt_embeds": torch.zeros(1, 1, 1)}
            for index in range(min(GROUP, images - group * GROUP)):
                shown = word if index % 2 else "".join(rng.permutation(list(word)))
                row = ImageRow(
                    group_id=prompt.id,
                    index=index,
                    prompt=prompt,
                    image=sign(shown, width, height, rng),
                    latent=torch.zeros(1, 1),
                    seed=0,
                    scheduler="none",
                    num_inference_steps=1,
                    guidance_scale=1.0,
                    max_sequence_length=1,
                    height=height,
                    width=width,
                    generator="benchmark",
                    revision="0",
                    round=0,
                )
                rows.append(row)
        writer.write_shard(shard, rows, text)


def engines() -> dict[str, Callable[[np.ndarray], Any]]:
    from rapidocr import RapidOCR

    one = {"EngineConfig.onnxruntime.intra_op_num_threads": 1, "EngineConfig.onnxruntime.inter_op_num_threads": 1}
    quiet = {"Global.log_level": "error"}
    return {
        "default": RapidOCR(params=quiet),
        "all_cores": RapidOCR(params=quiet | RAPIDOCR),
        "one_core": RapidOCR(params=quiet | RAPIDOCR | one),
    }


def seconds(work: Callable[[], Any]) -> np.ndarray:
    """(wall, processor) seconds; the latter of this process and of those it started and saw end."""

    def now() -> np.ndarray:
        spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return np.array([time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in spent)])

    start = now()
    work()
    return now() - start


def speed(arguments: argparse.Namespace, groups: Path, folder: Path) -> dict[str, Any]:
    from gdro.groups.scoring import score_groups
    from gdro.groups.store import GroupStore
    from gdro.rewards.registry import load_reward

    store = GroupStore(groups)
    pixels = [np.asarray(image)[:, :, ::-1].copy() for group in store.group_ids for image in store.images(group)]
    singles = {name: engine for name, engine in engines().items() if name in arguments.against}
    for engine in singles.values():
        engine(pixels[0])
    some = pixels[:: max(1, len(pixels) // arguments.single)]  # enough of them to tell the rate of one at a time

    def ours(turn: int) -> np.ndarray:
        out = folder / f"rewards-{turn}"
        return seconds(lambda: score_groups(load_reward("ocr"), groups, out, workers=arguments.workers)) / len(pixels)

    def single(name: str) -> np.ndarray:
        part = some[:: 8 if name == "default" else 1]  # it takes a second an image
        return seconds(lambda: [singles[name](one) for one in part]) / len(part)

    taken: dict[str, list[np.ndarray]] = {name: [] for name in ("ours", *singles)}
    for turn in range(arguments.repeats):
        for name in list(taken)[:: 1 if turn % 2 else -1]:
            taken[name].append(ours(turn) if name == "ours" else single(name))
        print({name: (1000 * values[-1]).round(1).tolist() for name, values in taken.items()}, "ms", flush=True)
    wall, processor = ({name: np.median(values, 0)[i] for name, values in taken.items()} for i in range(2))
    found: dict[str, Any] = {
        "images_per_second": {name: round(1 / value, 2) for name, value in wall.items()},
        "processor_ms_an_image": {name: round(1000 * value, 2) for name, value in processor.items()},
    }
    for name in singles:
        for i, kind in enumerate(("", "_processor")):
            ratios = [one[i] / our[i] for one, our in zip(taken[name], taken["ours"], strict=True)]
            quartiles = [round(q, 3) for q in statistics.quantiles(ratios, n=4)]
            found[f"ours_over_{name}{kind}"] = {"median": round(statistics.median(ratios), 3), "quartiles": quartiles}
    return found


@contextmanager
def sampled_memory(every: float = 0.5) -> Iterator[list[tuple[float, float]]]:
    """(seconds, MB of this process and its descendants, without pages of files), filled while the block runs."""
    import psutil

    samples: list[tuple[float, float]] = []
    over, start, me = threading.Event(), time.monotonic(), psutil.Process()

    def sample() -> None:
        while not over.wait(every):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    found = process.memory_info()
                    total += found.rss - found.shared
                except psutil.NoSuchProcess:
                    continue
            samples.append((time.monotonic() - start, total / 1e6))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def memory(arguments: argparse.Namespace, groups: Path, folder: Path) -> dict[str, Any]:
    from gdro.groups.scoring import score_groups
    from gdro.rewards.registry import load_reward

    with sampled_memory() as samples:
        taken, _ = seconds(
            lambda: score_groups(load_reward("ocr"), groups, folder / "rewards", workers=arguments.workers)
        )
    at, used = np.array(samples).T
    per_image = taken / arguments.memory
    found: dict[str, Any] = {"seconds": round(taken, 1), "samples": len(samples), "peak_mb": round(used.max(), 1)}
    quarters = [used[(at >= taken * q / 4) & (at < taken * (q + 1) / 4)] for q in range(4)]
    found["median_mb_of_each_quarter"] = [round(float(np.median(one)), 1) for one in quarters]
    for half, inside in (("first", at < taken / 2), ("second", at >= taken / 2)):
        started = inside & (at > 0.1 * taken) & (at < 0.98 * taken)  # without the start and the end of the processes
        slope = np.polyfit(at[started], used[started], 1)[0]
        found[f"slope_{half}_half_mb_per_1000_images"] = round(float(slope) * per_image * 1000, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--single", type=int, default=128, help="of them, for the calls one at a time")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--height", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="of ours; 0: as gdro score chooses")
    parser.add_argument("--against", nargs="+", default=["default", "all_cores", "one_core"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=int, metavar="N", help="sample the memory over N images instead")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    os.environ.pop("OMP_NUM_THREADS", None)  # else it would bind the default side
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups = folder / "groups"
        write_groups(groups, arguments.memory or arguments.images, arguments.width, arguments.height)
        found = (memory if arguments.memory else speed)(arguments, groups, folder)
    result = {
        **found,
        "settings": {key: value for key, value in vars(arguments).items() if key != "out"},
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {package: version(package) for package in ("rapidocr", "onnxruntime")},
    }
    write_json(arguments.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
