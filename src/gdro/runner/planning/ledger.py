"""The cost of operations without doing them: FLOPs, bytes moved, bytes alive, counted on tensors without values.

The tensors are torch's fake ones: an operation only finds the shape and type of its result. Everything is counted for
a batch of one image, separately by whether it grows with the batch: an operation's result does if one of its inputs
does, starting with the images themselves.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Operation(NamedTuple):
    """One call of a kernel for one image."""

    flops: int  # of matrix products, convolutions and attention; a multiplication and an addition are two
    bytes: int  # read and written, that grow with the batch
    shared: int  # read and written once, regardless of the batch: weights
    half: bool  # computed in 16 bits


@dataclass(frozen=True)
class Work:
    """The cost of a pass: n images take n times what grows with the batch, and the rest once."""

    operations: Counter[Operation]
    peak: int  # most bytes alive at once that grow with the batch, beside what was there before
    shared_peak: int  # the same of those that do not grow

    @property
    def flops(self) -> int:
        """Of one image."""
        return sum(operation.flops * count for operation, count in self.operations.items())

    def memory(self, images: int) -> int:
        """Bytes that `images` at once need in addition to what was there before."""
        return self.shared_peak + images * self.peak

    def __add__(self, other: "Work") -> "Work":
        """One after the other, in memory together."""
        peaks = max(self.peak, other.peak), max(self.shared_peak, other.shared_peak)
        return Work(self.operations + other.operations, *peaks)


class Ledger(TorchDispatchMode):
    """Counts operations within it; `there` are the weights, `images` the tensors that grow with the batch."""

    def __init__(self, there: Iterable[Tensor], images: Iterable[Tensor]) -> None:
        super().__init__()
        self._there = {_key(t): False for t in there} | {_key(t): True for t in images}  # storage: whether it grows
        self._made: dict[int, bool] = {}
        self._alive = {False: 0, True: 0}
        self._peak = {False: 0, True: 0}
        self._operations: Counter[Operation] = Counter()

    def work(self) -> Work:
        """What was counted so far."""
        return Work(self._operations.copy(), peak=self._peak[True], shared_peak=self._peak[False])

    @property
    def alive(self) -> int:
        """Bytes made so far that are still held and grow with the batch."""
        return self._alive[True]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        grows = any(self._grows(tensor) for tensor in given)
        for tensor in made:
            self._count(tensor, grows)
        if given and made:  # asking for a tensor's device is not a kernel
            self._operations[self._operation(func, args, kwargs, out, [*given, *made])] += 1
        return out

    def _grows(self, tensor: Tensor) -> bool:
        key = _key(tensor)
        return self._made.get(key, self._there.get(key, False))

    def _count(self, tensor: Tensor, grows: bool) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._there:
            return
        if key not in self._made:
            self._made[key] = grows
            self._alive[grows] += storage.nbytes()
            weakref.finalize(storage, self._forget, key, storage.nbytes())
        elif grows and not self._made[key]:  # an image written into what was made empty
            self._made[key] = True
            self._alive[False] -= storage.nbytes()
            self._alive[True] += storage.nbytes()
        self._peak = {kind: max(peak, self._alive[kind]) for kind, peak in self._peak.items()}

    def _forget(self, key: int, size: int) -> None:
        self._alive[self._made.pop(key)] -= size

    def _operation(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> Operation:
        moved = {False: 0, True: 0}
        for tensor in tensors:
            size = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())  # expanded: once
            moved[self._grows(tensor)] += size
        half = tensors[0].dtype in (torch.bfloat16, torch.float16)
        return Operation(_flops(func, args, kwargs, out), moved[True], moved[False], half)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func.overloadpacket
    if packet is _ATTENTION:
        query, key, value = args[:3]
        return sdpa_flop_count(query.shape, key.shape, value.shape)
    if packet is _ATTENTION_BACKWARD:
        gradient, query, key, value = args[:4]
        return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)
    formula = flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=out) if formula else 0


class Kernels(TorchFunctionMode):
    """The kernels of the device being planned, although the tensors are on the CPU.

    Attention is always one kernel that keeps no weight matrix. With `cuda`, so is a root mean square norm, and under
    autocast the functions in `_FLOAT32` take and return float32, which the CPU's autocast does not change. If a model
    asks how long prompts are, the answer is `text_length`, the maximum.
    """

    def __init__(self, *, cuda: bool, text_length: int) -> None:
        super().__init__()
        self.cuda, self.text_length = cuda, text_length

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is Tensor.item and args[0].dtype == torch.int64:
            return self.text_length
        if self.cuda and func in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = [_widened(value) for value in args]
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        if self.cuda and func in (F.rms_norm, torch.rms_norm):
            return _RmsNorm.apply(args[0])
        return func(*args, **kwargs)


# The part of torch's list (ATen/autocast_mode.h) that transformers and VAEs use.
_FLOAT32 = frozenset(
    {F.layer_norm, F.rms_norm, F.group_norm, torch.layer_norm, torch.rms_norm, torch.group_norm, torch.rsqrt}
    | {torch.pow, torch.exp, torch.sum, torch.softmax, F.softmax, F.softplus}
    | {Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.exp, Tensor.sum, Tensor.softmax}
)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class _RmsNorm(torch.autograd.Function):
    """Costs as much as a fused kernel: it reads and writes once in each direction, and keeps its input."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        context.save_for_backward(value)
        return value * 2

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * context.saved_tensors[0]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (one.to(torch.get_autocast_dtype("cpu")) for one in (query, key, value))
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    return _ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def counting(there: Iterable[Tensor], images: Iterable[Tensor], *, cuda: bool, text_length: int) -> Iterator[Ledger]:
    """Within it, everything done to fake tensors is counted as if on a GPU (`cuda`) or a CPU."""
    ledger = Ledger(there, images)
    with Kernels(cuda=cuda, text_length=text_length), ledger:
        yield ledger
