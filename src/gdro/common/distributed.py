"""More than one process (torchrun, accelerate launch): which one this is, and what the processes tell each other.

The model's tensors travel by NCCL on GPUs; everything else is JSON over gloo, which waits as long as it takes, because
one process may judge images for an hour while the others have nothing to do. A process that fails says why in one
line, unless another has done so before; the others end when they miss it. With one process nothing here does anything.
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
_patient: dist.ProcessGroup | None = None  # of gloo; only beside other processes


@contextmanager
def started() -> Iterator[None]:
    """Join the other processes of the run, if a launcher's environment variables say that there are any.

    Raises UserError for variables that are missing or make no sense.
    """
    global _store, _patient
    environment.check()
    if environment.world_size() == 1:
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
    dist.destroy_process_group()  # not after an error: the others may be waiting for this process
    _store = _patient = None


def rank() -> int:
    """Which process this is, from 0."""
    return dist.get_rank() if _patient else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _patient else 1


def is_first() -> bool:
    """Whether this is the process that prints, and writes what there is only one of."""
    return rank() == 0


def local_size() -> int:
    """How many processes share this machine."""
    return environment.whole("LOCAL_WORLD_SIZE", 1) or 1 if _patient else 1


def of_first(label: str) -> str:
    """`label` of progress that counts the first process's share only."""
    return f"{label}, first of {size()} processes" if _patient else label


def mine(items: Sequence[T]) -> list[T]:
    """This process's share of work that every process knows."""
    return list(items[rank() :: size()])


def gather(value: T) -> list[T]:
    """Every process's JSON-able value, in order; all wait for the last."""
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
    """Go on when all processes have come here: what each has written before, the others can read."""
    gather(None)


def first(act: Callable[[], T]) -> T:
    """What `act` returns, JSON-able, in the first process, which alone calls it."""
    return gather(act() if is_first() else None)[0]  # type: ignore[return-value]


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """The sums over the processes of values that each of them has; the same bits in all."""
    found = gather(dict(values))
    return {name: sum(one[name] for one in found) for name in values}


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients over the processes, in one message, in place. Which parameters have one is the same in all.

    This is what DDP does beside the backward pass, here after the last of a step: each step's many passes then need no
    wrapper around the model, and the gradients of a LoRA are small.
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

    `module` is on the CPU, so that no device ever holds the whole. Every process must call it equally often. What is
    added to it later, as a LoRA is, stays whole in each process.
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
    """Whether this process is the first of several to end with an error, and so the one to say why. Ask once."""
    store = _store
    if store is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return os.environ.get("RANK", "0") == "0"  # the processes have not met, nor has their launcher a store
    try:
        return bool((store or _rendezvous()[0]).add(FAILED, 1) == 1)
    except (RuntimeError, ValueError):
        return False  # the store is gone, with the process that kept it


def _rendezvous() -> tuple[dist.Store, int, int]:
    """(what the processes of this start share, rank, size)."""
    store, rank, size = next(iter(dist.rendezvous("env://")))
    return dist.PrefixStore(f"gdro/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank, size


@contextmanager
def _missing_no_one() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_of_device(error) and "NCCL" not in str(error):  # of a kernel begun before: told of here, being late
            raise
        raise LostProcess(
            f"process {rank()} of {size()} lost another one ({str(error).splitlines()[0]}); if none has said why, it "
            "was killed: out of memory, perhaps"
        ) from None
