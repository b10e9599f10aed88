"""Errors of the GPU, and want of memory, in one line: the stage, the likely cause, what to change."""

import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from gdro.common.errors import UserError

_OF_DEVICE = re.compile(r"CUDA|HIP error|cuDNN|CUDNN|CUBLAS|NCCL|mha_graph|DefaultCPUAllocator")
# What an error that is not of memory says, what it comes from as a rule, and what helps.
_CAUSES = (
    (
        r"mha_graph|cudnn",
        "cuDNN fails on this GPU, perhaps for want of memory; gdro keeps it out of attention",
        "no DIFFUSERS_ATTN_BACKEND in the environment, or smaller batches",
    ),
    (
        r"no kernel image|invalid device function|driver version|unsupported toolchain|No CUDA GPUs",
        "this build of torch does not fit the GPU or its driver",
        "a torch built for them, or device: cpu",
    ),
    (
        r"device-side assert",
        "a number outside of a table, as from a tokenizer that is not its text encoder's",
        "the tokenizers and text encoders that the model was published with",
    ),
    (r"NCCL", "the GPUs cannot reach each other", "NCCL_DEBUG=WARN, which says why, or fewer processes"),
    (
        r"",
        "a kernel that fails on this GPU, of attention or a compiled or quantized one",
        "compile: false, quantization: null or mixed_precision: no where it is otherwise",
    ),
)
_MEMORY = re.compile(r"out of memory|allocate memory|ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED")


@contextmanager
def telling(stage: str, change: Sequence[str] = ()) -> Iterator[None]:
    """Raise UserError for an error of the device inside; `change`: settings with which the stage needs less memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        line = failure(stage, error, change)
        if line is None:
            raise
        raise UserError(line) from error


def failure(stage: str, error: BaseException, change: Sequence[str] = ()) -> str | None:
    """The line for an error of the device, None for another one."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (is_of_device(error) and _MEMORY.search(text)):
        wanted = ", or ".join(change) or "smaller batches or images"
        return f"{stage}: out of memory ({text}); expected {wanted}; then the same command goes on"
    if not is_of_device(error):
        return None
    cause, help_ = next((cause, help_) for sign, cause, help_ in _CAUSES if re.search(sign, text, re.IGNORECASE))
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"it happened in {frame.name}, {frame.filename}:{frame.lineno}"
    else:
        where = "CUDA_LAUNCH_BLOCKING=1 in the environment tells where it happens"
    return f"{stage}: {text}; likely {cause}: expected {help_}; {where}"


def is_of_device(error: BaseException) -> bool:
    """Whether it is the GPU's, or the host's memory's."""
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and _OF_DEVICE.search(str(error)) is not None
    )
