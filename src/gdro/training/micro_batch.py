"""How much goes through the model at once: a whole step if it fits in memory, else fewer groups, else fewer images.

Memory is dominated by what autograd keeps of a forward pass: gigabytes per image on a large model.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gdro.common import distributed
from gdro.common.progress import say
from gdro.training.config import TrainConfig
from gdro.training.learner import Learner, MicroBatch

MARGIN = 0.8  # of the free memory; the rest is for temporaries within a layer and for fragmentation


def configured_micro_batch(config: TrainConfig) -> MicroBatch:
    """The micro-batch that the configuration sets, without any measurement."""
    two_pass = config.group_gradient == "two_pass"
    images = config.images_per_pass or 1 if two_pass else None
    return MicroBatch(config.micro_batch_groups or config.groups_per_step, images)


def choose_micro_batch(learner: Learner, before: Mapping[str, Any] | None = None) -> MicroBatch:
    """The configured micro-batch or, for group_gradient "auto", a measured one; prints the choice and the reason.

    `before`: the choice of the run being resumed, kept if it still fits, so both end bit for bit the same.
    """
    config, data, draws = learner.config, learner.data, learner.data.draws.at(learner.data.draws.done + 1)
    if config.group_gradient != "auto" or not draws:
        return configured_micro_batch(config)
    size_of = data.groups.image_size
    largest = max(data.draws.rewards, key=lambda group: math.prod(size_of(group)))
    batch = data.batches.of([replace(draws[0], group=largest, images=torch.arange(config.k))])
    policies = learner.at(largest).policies
    text = {name: value[:1] for name, value in batch.text.items()}
    parameters = policies.model.transformer.parameters()
    weights = {storage.data_ptr() for weight in parameters for storage in _storages(weight)}
    each = saved_bytes(lambda: policies.velocity(batch.x0[0, :1], batch.t[0, :1, 0, 0], text), besides=weights)
    trained = sum(4 * weight.numel() for weight in policies.parameters.values())
    free = free_bytes(policies.model.device) - 3 * trained  # a gradient and AdamW's two moments
    fit = min(distributed.gather(int(MARGIN * free / max(each, 1))))  # all processes take the same number of passes
    micro_batch = largest_micro_batch(fit, groups=config.micro_batch_groups or config.groups_per_step, k=config.k)
    if before is not None and MicroBatch(**before).images_of(config.k) <= fit:
        micro_batch = MicroBatch(**before)
    how = "one_pass" if micro_batch.images is None else "two_pass"
    said = f"{how}, {micro_batch.images_of(config.k)} images at a time"
    said += f" ({each / 1e9:.3g} GB each, {free / 1e9:.3g} GB free)" + "; even one may not fit" * (fit < 1)
    say(f"train.group_gradient: {said}")
    return micro_batch


def largest_micro_batch(fit: int, *, groups: int, k: int) -> MicroBatch:
    """The largest micro-batch for a step of `groups` groups of k with at most `fit` images, but at least one."""
    return MicroBatch(min(groups, fit // k), None) if fit >= k else MicroBatch(1, max(1, fit))


def saved_bytes(forward: Callable[[], Any], *, besides: set[int]) -> int:
    """Bytes that autograd keeps from `forward()` for a backward pass, counting each storage once.

    `besides`: addresses of storages not to count, because they exist anyway (the weights).
    """
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        for storage in _storages(tensor):
            if storage.data_ptr() not in besides:
                found[storage.data_ptr()] = storage
        return tensor.detach()  # a node holding its own output would be a cycle that no collector frees

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # held until counted, or another tensor could take a freed one's address
    size = sum(storage.nbytes() for storage in found.values())  # 0 for a sharded weight, freed by now
    del kept
    return size


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The tensor's storages: several for a quantized weight, the process's share for a sharded one."""
    if hasattr(tensor, "__tensor_flatten__"):
        for part in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
            if isinstance(part, Tensor):
                yield from _storages(part)
    else:
        yield tensor.untyped_storage()


def free_bytes(device: torch.device) -> int:
    """Bytes this process can still allocate on the device; on a CPU, its share of what is free without swapping."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available) // distributed.local_size()
