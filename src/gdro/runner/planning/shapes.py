"""A model without its weights: how large its parts are, and what a pass through them costs."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward

from gdro.models import Quantization, load_model
from gdro.runner.config import RunConfig
from gdro.runner.planning.ledger import Work, counting

KNOWN = resources.files("gdro.runner.planning") / "known.json"  # the published configurations of models on the Hub
BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 4 / 64}  # per quantized weight; nf4 has a float32 for each 64


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes of a component."""

    parameters: int
    bytes: int


@dataclass(frozen=True)
class Shapes:
    """The parts of a run's model, and the cost of one image at the run's size and text length."""

    family: str  # diffusers' pipeline
    transformer: Sizes  # the frozen base
    trainable: int  # parameters of the LoRA
    text_encoders: Sizes
    vae: Sizes
    latent: tuple[int, int]  # (tokens, channels)
    text_bytes: int  # of one prompt's embeddings
    text_flops: int  # of encoding one prompt
    nfe: int  # model evaluations of one velocity without gradient: two with classifier-free guidance
    base: Work  # one velocity of the frozen base
    policy: Work  # one velocity with the adapter, kept for its gradient
    learning: Work  # one velocity with the adapter, and its gradient
    saved: int  # bytes per image kept from the forward to the backward pass
    decode: Work  # latents to pixels


def shapes_of(config: RunConfig, *, cuda: bool) -> Shapes:
    """The shapes of `config`'s model as it would run on a GPU (`cuda`) or a CPU.

    Reads only configurations: from a folder, the Hub, or the packaged ones of known models. Raises UserError if there
    are none, the class is unknown, or the images' size or LoRA targets do not suit the model.
    """
    sample = config.sample
    model, networks, text_shapes = outline(config)
    model.checkpoint_activations(config.train.gradient_checkpointing)
    encoders = {part: network for part, network in networks.items() if part not in ("transformer", "vae")}
    sizes = {part: _sizes(network) for part, network in networks.items()}
    if config.quantization:
        sizes["transformer"] = _quantized(networks["transformer"], sizes["transformer"], config.quantization)
    trainable = _sizes(networks["transformer"], trained=True).parameters
    height, width = largest_size(config)
    tokens, channels = model.latent_shape(height, width)
    model.device = torch.device("cpu")
    with FakeTensorMode():
        for part in ("transformer", "vae"):
            _as_if_loaded(networks[part])
        trained = [parameter for parameter in networks["transformer"].parameters() if parameter.requires_grad]
        weights = [*_tensors(networks["transformer"]), *_tensors(networks["vae"])]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)  # there from the second step on
            weights.append(parameter.grad)
        text = {
            key: torch.empty(1, *shape, dtype=torch.bool if key.endswith("mask") else model.dtype)
            for key, shape in text_shapes.items()
        }
        x, t = torch.empty(1, tokens, channels), torch.empty(1)
        images = [x, t, *text.values()]

        def velocity() -> Tensor:
            return model.velocity(x, t, text, guidance_scale=sample.guidance_scale, height=height, width=width)

        def counted(run: Callable[[], Tensor]) -> Work:
            with counting(weights, images, cuda=cuda, text_length=sample.max_sequence_length) as ledger:
                run()
            return ledger.work()

        with torch.no_grad():
            with model.adapter_disabled():
                base = counted(velocity)
            nfe = model.nfe
            decode = counted(lambda: model._decode(x, height, width))
        with counting(weights, images, cuda=cuda, text_length=sample.max_sequence_length) as ledger:
            output = velocity()
            policy, saved = ledger.work(), ledger.alive - output.nbytes
            _backward(output.square().mean())
        learning = ledger.work()
    return Shapes(
        family=model.pipeline.__name__,
        transformer=sizes["transformer"],
        trainable=trainable,
        text_encoders=_total(sizes[part] for part in encoders),
        vae=sizes["vae"],
        latent=(tokens, channels),
        text_bytes=sum(value.nbytes for value in text.values()),
        text_flops=2 * sample.max_sequence_length * sum(_multiplied(network) for network in encoders.values()),
        nfe=nfe,
        base=base,
        policy=policy,
        learning=learning,
        saved=saved,
        decode=decode,
    )


def largest_size(config: RunConfig) -> tuple[int, int]:
    """(height, width) that a run's images are planned at: the largest of its sizes."""
    return max(config.sample.sizes, key=math.prod)


def outline(config: RunConfig) -> tuple[Any, dict[str, nn.Module], dict[str, tuple[int, ...]]]:
    """The model with the run's adapter, its networks by name, and shapes of a prompt's tensors; all without weights."""
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    train = config.train
    with configurations(config.model) as name:
        model: Any = load_model(name, device=torch.device("meta"), dtype=dtype)
        networks, text_shapes = model.networks(), model.text_shapes(config.sample.max_sequence_length)
    model.add_adapter(rank=train.rank, alpha=train.lora_alpha, targets=train.target_modules, seed=0)
    return model, networks, text_shapes


def _backward(loss: Tensor) -> None:
    """loss.backward() that keeps torch function modes: the public call drops them, so recomputed blocks would differ
    (torch 2.9 to 2.13)."""
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


@contextmanager
def configurations(name: str) -> Iterator[str]:
    """Make a known model's configurations available without the Hub; yields the name to load them under."""
    known = json.loads(KNOWN.read_text(encoding="utf-8"))
    if name not in known or Path(name).exists():
        yield name
        return
    with TemporaryDirectory() as folder:
        for file, content in known[known[name] if isinstance(known[name], str) else name].items():
            path = Path(folder) / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        yield folder


def _as_if_loaded(network: nn.Module) -> None:
    """Give a network without weights fake ones from the surrounding FakeTensorMode, on the CPU."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=weight.requires_grad)
        for tensors in (module._buffers, vars(module)):  # tables of positions are not always buffers
            for name, table in tensors.items():
                if isinstance(table, Tensor):
                    tensors[name] = torch.empty(table.shape, dtype=table.dtype)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _sizes(network: nn.Module, *, trained: bool = False) -> Sizes:
    """Sizes of the trained weights, or of all others."""
    weights = [p for p in network.parameters() if p.requires_grad == trained]
    others = [] if trained else list(network.buffers())
    return Sizes(sum(p.numel() for p in weights), sum(t.nbytes for t in [*weights, *others]))


def _quantized(network: nn.Module, sizes: Sizes, kind: Quantization) -> Sizes:
    """The sizes with frozen linear layers in fewer bits; other per-layer data, such as a scale per row, is left out."""
    layers = [module.weight for module in network.modules() if isinstance(module, nn.Linear)]
    frozen = [weight for weight in layers if not weight.requires_grad]
    saved = sum(weight.nbytes - weight.numel() * BYTES[kind] for weight in frozen)
    return Sizes(sizes.parameters, round(sizes.bytes - saved))


def _total(sizes: Iterable[Sizes]) -> Sizes:
    parts = list(sizes)
    return Sizes(sum(part.parameters for part in parts), sum(part.bytes for part in parts))


def _multiplied(network: nn.Module) -> int:
    """Parameters that every token is multiplied with: those of the linear layers."""
    return sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))
