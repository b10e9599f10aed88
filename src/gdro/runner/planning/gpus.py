"""What a device can do: memory, FLOPs and bytes per second, and how long the host takes to start a kernel.

For GPUs by name these are the makers' figures times shares that large models usually reach (`MATMUL`, `MEMORY`):
assumed, not measured. For the device at hand they are measured, in a second or two.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch

from gdro.common.errors import UserError, did_you_mean
from gdro.runner.planning.ledger import Work

MATMUL = 0.7  # of the bfloat16 or float32 peak, in large matrix products; less power-limited cards reach more
MEMORY = 0.85  # of the memory's peak rate, in elementwise kernels
CPU = 0.42  # of the measured rates, in passes of small transformers and VAEs; empirical
CALL = 8e-6  # seconds of Python and driver per kernel, uncompiled


@dataclass(frozen=True)
class Device:
    """Rates a program can reach, in FLOPs, bytes and seconds; memory in bytes."""

    name: str
    memory: float
    half: float  # FLOPs per second in bfloat16
    single: float  # FLOPs per second in float32
    rate: float  # bytes per second
    call: float  # host seconds per kernel
    ahead: bool  # the host runs ahead of the device, so the slower of the two counts; else their sum
    assumed: str  # where the rates come from, for the reader

    def seconds(self, work: Work, images: int) -> float:
        """Seconds of `work` for `images` at once; each kernel takes the longer of its arithmetic and memory times."""
        device = 0.0
        for (flops, moved, shared, half), count in work.operations.items():
            arithmetic = images * flops / (self.half if half else self.single)
            device += count * max(arithmetic, (images * moved + shared) / self.rate)
        host = self.call * work.operations.total()
        return max(device, host) if self.ahead else (device + host) / CPU


# Name: memory (GB), dense TFLOP/s in bfloat16 (float32 accumulation) and in float32, memory rate (GB/s), as published.
_PUBLISHED = {
    "b200": (180, 2250, 75, 8000),
    "h200": (141, 989, 67, 4800),
    "h100": (80, 989, 67, 3350),
    "h100-pcie": (80, 756, 51, 2000),
    "a100": (80, 312, 19.5, 2039),
    "a100-40gb": (40, 312, 19.5, 1555),
    "l40s": (48, 362, 91.6, 864),
    "l4": (24, 121, 30.3, 300),
    "a10": (24, 125, 31.2, 600),
    "a6000": (48, 155, 38.7, 768),
    "rtx6000-ada": (48, 364, 91.1, 960),
    "rtx5090": (32, 210, 104.8, 1792),
    "rtx4090": (24, 165, 82.6, 1008),
    "rtx3090": (24, 71, 35.6, 936),
    "mi300x": (192, 1307, 163.4, 5300),
}
GPUS = (*_PUBLISHED, "cpu")


def gpu(name: str) -> Device:
    """The GPU called `name` (any case, blanks or dashes); UserError with the nearest name if not in the table."""
    key = name.lower().replace(" ", "-").removeprefix("nvidia-").replace("rtx-", "rtx")
    if key not in _PUBLISHED:
        raise UserError(f'--gpu: "{name}" is not in the table of GPUs{did_you_mean(key, GPUS)}')
    memory, half, single, rate = _PUBLISHED[key]
    return Device(
        name=key,
        memory=memory * 1e9,
        half=half * 1e12 * MATMUL,
        single=single * 1e12 * MATMUL,
        rate=rate * 1e9 * MEMORY,
        call=CALL,
        ahead=True,
        assumed=(
            f"{MATMUL:.0%} of {half:g} TFLOP/s (bf16; {single:g} in float32), {MEMORY:.0%} of {rate:g} GB/s, "
            f"{CALL * 1e6:g} µs per kernel on the host: assumed, not measured"
        ),
    )


def present(device: torch.device) -> Device:
    """The device at hand, its rates measured."""
    cuda = device.type == "cuda"
    rows, inner, outer = (8192, 8192, 8192) if cuda else (2048, 128, 512)  # models that run on a CPU are small
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        images, weight = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, inner), (outer, inner)))
        seconds = _fastest(partial(torch.nn.functional.linear, images, weight), device)
        rates[dtype] = 2 * rows * inner * outer / seconds
    row = torch.randn(2**28 if cuda else 2**20, device=device)
    rate = 2 * row.nbytes / _fastest(lambda: row.mul(row), device)
    call = _fastest(lambda: row[:8] + 1, device)
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU"
    return Device(
        name=name,
        memory=torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total,
        half=rates[torch.bfloat16],
        single=rates[torch.float32],
        rate=rate,
        call=CALL if cuda else call,
        ahead=cuda,
        assumed=(
            f"{rates[torch.bfloat16] / 1e12:.3g} TFLOP/s in bfloat16, {rates[torch.float32] / 1e12:.3g} in float32, "
            f"{rate / 1e9:.3g} GB/s: measured now, on {torch.get_num_threads()} threads of the CPU"
        ),
    )


def _fastest(run: Callable[[], Any], device: torch.device, seconds: float = 0.3) -> float:
    """Seconds of the fastest run out of those that fit in `seconds`, the least slowed by other work."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best
