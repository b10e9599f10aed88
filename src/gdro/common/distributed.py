"""Several processes (torchrun, accelerate launch): which one this is, and how they communicate.

The model's tensors travel by NCCL on GPUs; everything else is JSON over gloo, without a timeout, because one process
may judge images for an hour while the others wait. A process that fails reports why in one line, unless another already
has; the others end when they notice. With a single process, all of this does nothing.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from gdro.common import environment
from gdro.common.device import is_of_device
from gdro.common.errors import LostProcess, UserError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
FAILED = "failed"

_store: dist.Store | None = None
_patient: dist.ProcessGroup | None = None  # gloo's; None if there is only one process


@contextmanager
def started() -> Iterator[None]:
    """Join the other processes of the run, if a launcher's environment variables indicate any. Nested calls join once.

    Raises UserError for missing or invalid variables.
    """
    global _store, _patient
    environment.check()
    if environment.world_size() == 1 or _patient is not None:
        yield
        return
    gpu = int(os.environ["LOCAL_RANK"])
    if gpu < torch.cuda.device_count():
        torch.cuda.set_device(gpu)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        _store, rank, size = _rendezvous()
        dist.init_process_group(backend, store=_store, rank=rank, world_size=size)
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"MASTER_ADDR is {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}: the "
            f"{os.environ['WORLD_SIZE']} processes did not find each other ({str(error).splitlines()[0]})"
        ) from None
    yield
    dist.destroy_process_group()  # not after an error, when the others may be waiting for this process
    _store = _patient = None


def rank() -> int:
    """Which process this is, from 0."""
    return dist.get_rank() if _patient else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _patient else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes shared files."""
    return rank() == 0


def local_size() -> int:
    """How many processes share this machine."""
    return environment.whole("LOCAL_WORLD_SIZE", 1) or 1 if _patient else 1


def of_first(label: str) -> str:
    """`label` for progress that counts only the first process's share."""
    return f"{label}, first of {size()} processes" if _patient else label


def mine(items: Sequence[T]) -> list[T]:
    """This process's share of `items`, which must be the same in all processes."""
    return list(items[rank() :: size()])


def gather(value: T) -> list[T]:
    """Every process's JSON-able value, in order of rank; all wait for the last."""
    if not _patient:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    with _missing_no_one():
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=_patient)
        longest = max(int(length) for length in lengths)
        values = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
        padded = torch.nn.functional.pad(data, (0, longest - len(data)))
        dist.all_gather(values, padded, group=_patient)
    return [json.loads(bytes(v[: int(n)].tolist())) for v, n in zip(values, lengths, strict=True)]


def wait() -> None:
    """Wait until all processes get here; each can then read what the others wrote before."""
    gather(None)


def first(act: Callable[[], T]) -> T:
    """Call `act` in the first process only and return its JSON-able result in all."""
    return gather(act() if is_first() else None)[0]  # type: ignore[return-value]


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """The sums of `values` over the processes, which must have the same keys; the same bits in all."""
    found = gather(dict(values))
    return {name: sum(one[name] for one in found) for name in values}


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over the processes, in one message, in place. The same parameters must have one in all.

    DDP does this during the backward pass; here it happens after a step's last one, so its many passes need no wrapper
    around the model, and a LoRA's gradients are small.
    """
    if not _patient:
        return
    own = [parameter for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([parameter.grad.flatten() for parameter in own if parameter.grad is not None])
    with _missing_no_one():
        dist.all_reduce(flat)
    for parameter, total in zip(own, flat.split([parameter.numel() for parameter in own]), strict=True):
        parameter.grad = total.view_as(parameter)


def shard(module: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Spread a frozen transformer over the processes' devices (FSDP2); a block is gathered while it computes.

    `module` is on the CPU, so no device ever holds all of it. Every process must call it equally often. Anything added
    later, such as a LoRA, stays whole in each process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Blocks return slices of a tensor, which nothing here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (size(),))
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether every process must call `module` equally often."""
    if not _patient:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def fails_first() -> bool:
    """Whether this process is the first to end with an error, and thus the one to report it. Call it once."""
    store = _store
    if store is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return os.environ.get("RANK", "0") == "0"  # the processes never met, and their launcher has no store
    try:
        return bool((store or _rendezvous()[0]).add(FAILED, 1) == 1)
    except (RuntimeError, ValueError):
        return False  # the store is gone, together with the process that kept it


def _rendezvous() -> tuple[dist.Store, int, int]:
    """(the store shared by the processes of this launch, rank, size)."""
    store, rank, size = next(iter(dist.rendezvous("env://")))
    return dist.PrefixStore(f"gdro/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank, size


@contextmanager
def _missing_no_one() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_of_device(error) and "NCCL" not in str(error):  # from an earlier kernel, reported late
            raise
        raise LostProcess(
            f"process {rank()} of {size()} lost another one ({str(error).splitlines()[0]}); if none has said why, it "
            "was killed, perhaps out of memory"
        ) from None
