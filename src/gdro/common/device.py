"""GPU and out-of-memory errors in one line: the stage, the likely cause, what to change."""

import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from gdro.common.errors import UserError

_OF_DEVICE = re.compile(r"CUDA|HIP error|cuDNN|CUDNN|CUBLAS|NCCL|mha_graph|DefaultCPUAllocator")
# Errors other than out of memory: what the message says, the usual cause, and what helps.
_CAUSES = (
    (
        r"mha_graph|cudnn",
        "cuDNN fails on this GPU, perhaps for lack of memory; gdro does not use it for attention",
        "no DIFFUSERS_ATTN_BACKEND in the environment, or smaller batches",
    ),
    (
        r"no kernel image|invalid device function|driver version|unsupported toolchain|No CUDA GPUs",
        "this build of torch does not fit the GPU or its driver",
        "a torch built for them, or device: cpu",
    ),
    (
        r"device-side assert",
        "an index outside of a table, for example from a tokenizer that is not its text encoder's",
        "the tokenizers and text encoders published with the model",
    ),
    (r"NCCL", "the GPUs cannot reach each other", "NCCL_DEBUG=WARN, which says why, or fewer processes"),
    (
        r"",
        "a kernel that fails on this GPU: attention, compiled or quantized",
        "compile: false, quantization: null or mixed_precision: no, where set otherwise",
    ),
)
_MEMORY = re.compile(r"out of memory|allocate memory|ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED")


def torch_device(name: str, field: str = "device") -> torch.device:
    """The device called `name`; auto is cuda if available. UserError naming `field` if a GPU is asked for in vain."""
    there = torch.cuda.is_available()
    if name.startswith("cuda") and not there:
        raise UserError(f'{field} is "{name}", but torch finds no GPU; expected "auto" or "cpu"')
    return torch.device(("cuda" if there else "cpu") if name == "auto" else name)


@contextmanager
def telling(stage: str, change: Sequence[str] = ()) -> Iterator[None]:
    """Turn device errors inside into a UserError; `change`: settings that make the stage need less memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        line = failure(stage, error, change)
        if line is None:
            raise
        raise UserError(line) from error


def failure(stage: str, error: BaseException, change: Sequence[str] = ()) -> str | None:
    """The line for a device error; None for any other error."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (is_of_device(error) and _MEMORY.search(text)):
        wanted = ", or ".join(change) or "smaller batches or images"
        return f"{stage}: out of memory ({text}); expected {wanted}; then the same command resumes"
    if not is_of_device(error):
        return None
    cause, help_ = next((cause, help_) for sign, cause, help_ in _CAUSES if re.search(sign, text, re.IGNORECASE))
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"it happened in {frame.name}, {frame.filename}:{frame.lineno}"
    else:
        where = "set CUDA_LAUNCH_BLOCKING=1 in the environment to see where it happens"
    return f"{stage}: {text}; likely {cause}: expected {help_}; {where}"


def is_of_device(error: BaseException) -> bool:
    """Whether the error comes from the GPU or from lack of host memory."""
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and _OF_DEVICE.search(str(error)) is not None
    )
