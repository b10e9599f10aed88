"""Writing and reading a store of groups against bare parquet, as ratios in one run.

Write: `GroupWriter` (PNG, digest, checks, checksums, embeddings, fsync, rename) against pyarrow writing a table of the
same PNGs and latents, already encoded. The PNG encoding is timed by itself: it is most of the writing, and any store
of images pays it. Read: latents, images and text of groups in random order through `GroupStore` against the same row
groups and tensors through pyarrow, Pillow and safetensors, each file opened once.

    python benchmarks/store.py --out benchmarks/results/store.json
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from gdro.common.files import write_json
from gdro.common.prompts import Prompt
from gdro.common.rng import numpy_rng, torch_rng
from gdro.groups.shard import SCHEMA
from gdro.groups.store import GroupStore, GroupWriter, ImageRow


def made_up(shard: int, groups: int, images: int, size: int, text: int) -> tuple[list[ImageRow], dict[str, Any]]:
    """Groups of smooth random pictures (PNG's cost depends on the picture), N(0, 1) latents and bf16 text."""
    rows, texts = [], {}
    for g in range(groups):
        prompt = Prompt(f"p{shard}-{g}", f"prompt {shard} {g}")
        texts[prompt.id] = {"prompt_embeds": torch.zeros(1, text, 4096, dtype=torch.bfloat16).normal_()}
        for i in range(images):
            small = numpy_rng(0, "image", shard, g, i).integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8)
            latent = torch.randn((size // 16) ** 2, 64, generator=torch_rng(0, "latent", shard, g, i))
            rows.append(
                ImageRow(
                    group_id=prompt.id,
                    index=i,
                    prompt=prompt,
                    image=Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC),
                    latent=latent,
                    seed=0,
                    scheduler="FlowMatchEulerDiscreteScheduler",
                    num_inference_steps=28,
                    guidance_scale=3.5,
                    max_sequence_length=text,
                    height=size,
                    width=size,
                    generator="made-up",
                    revision="0",
                    round=0,
                    sampler="ode",
                )
            )
    return rows, texts


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def encode(rows: list[ImageRow]) -> None:
    for row in rows:
        row.image.save(io.BytesIO(), "PNG", compress_level=1)


def written(folder: Path, shard: int, rows: list[ImageRow], texts: dict[str, Any]) -> dict[str, float]:
    """Seconds to write one file of groups: ours, the PNGs, bare parquet and safetensors of the same bytes."""
    ours = timed(lambda: GroupWriter(folder / "groups").write_shard(shard, rows, texts))
    png = timed(lambda: encode(rows))
    table = pq.read_table(folder / "groups" / f"groups-{shard:05d}.parquet")
    flat = {f"{group}/{name}": value for group, one in texts.items() for name, value in one.items()}

    def bare() -> None:
        pq.write_table(table, folder / f"bare-{shard}.parquet", row_group_size=len(rows) // len(texts))
        save_file(flat, folder / f"bare-{shard}.safetensors")

    return {"ours": ours, "png": png, "bare": timed(bare)}


def read(folder: Path, order: list[tuple[int, int]]) -> dict[str, dict[str, float]]:
    """Seconds to read the groups in `order` (file, place), by what is read: ours and bare."""
    store = GroupStore(folder / "groups")
    shards = sorted({shard for shard, _ in order})
    files = {i: pq.ParquetFile(folder / f"bare-{i}.parquet") for i in shards}
    texts = {i: safe_open(folder / f"bare-{i}.safetensors", framework="pt") for i in shards}
    ids = [f"p{shard}-{place}" for shard, place in order]

    def latents() -> None:
        for shard, place in order:
            cells = files[shard].read_row_group(place, columns=["latent"])["latent"].to_pylist()
            torch.from_numpy(np.stack([np.frombuffer(cell, "<f4") for cell in cells]))

    def images() -> None:
        for shard, place in order:
            for cell in files[shard].read_row_group(place, columns=["image"])["image"].to_pylist():
                Image.open(io.BytesIO(cell["bytes"])).convert("RGB")

    def text() -> None:
        for shard, place in order:
            texts[shard].get_tensor(f"p{shard}-{place}/prompt_embeds")

    return {
        "latents": {"ours": timed(lambda: [store.latents(i) for i in ids]), "bare": timed(latents)},
        "images": {"ours": timed(lambda: [store.images(i) for i in ids]), "bare": timed(images)},
        "text": {"ours": timed(lambda: [store.text(i) for i in ids]), "bare": timed(text)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--groups", type=int, default=16, help="groups a file")
    parser.add_argument("--images", type=int, default=16, help="images a group")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--text", type=int, default=512, help="text tokens of width 4096")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writes = []
        for shard in range(arguments.files):
            groups = made_up(shard, arguments.groups, arguments.images, arguments.size, arguments.text)
            writes.append(written(folder, shard, *groups))
            print("write", writes[-1], flush=True)
        order = [(shard, place) for shard in range(arguments.files) for place in range(arguments.groups)]
        reads = []
        for repeat in range(arguments.repeats):
            numpy_rng(0, "order", repeat).shuffle(order)
            reads.append(read(folder, order))
            print("read", reads[-1], flush=True)
    images = arguments.files * arguments.groups * arguments.images
    result: dict[str, Any] = {
        "write_over_bare": round(statistics.median(w["ours"] / w["bare"] for w in writes), 3),
        "write_over_bare_and_png": round(statistics.median(w["ours"] / (w["bare"] + w["png"]) for w in writes), 3),
        "write_images_per_second": round(images / sum(w["ours"] for w in writes), 1),
        "read_over_bare": {
            what: round(statistics.median(r[what]["ours"] / r[what]["bare"] for r in reads), 3) for what in reads[0]
        },
        "read_groups_per_second": {
            what: round(statistics.median(len(order) / r[what]["ours"] for r in reads), 1) for what in reads[0]
        },
        "settings": {key: value for key, value in vars(arguments).items() if key != "out"},
        "columns": len(SCHEMA),
    }
    write_json(arguments.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
