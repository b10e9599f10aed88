"""Loading a model by name: `tiny`, a folder in diffusers' layout, or a Hub id."""

import importlib.util
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gdro.common.device import torch_device
from gdro.common.errors import UserError
from gdro.common.hub import locate
from gdro.common.reading import read_json
from gdro.models.base import FlowModel
from gdro.models.quantization import Quantization, check_quantization, hush

FAMILIES = {  # diffusers' pipeline: the class that makes it a FlowModel
    "FluxPipeline": ("gdro.models.flux", "FluxModel"),
    "StableDiffusion3Pipeline": ("gdro.models.sd3", "StableDiffusion3Model"),
    "QwenImagePipeline": ("gdro.models.qwen_image", "QwenImageModel"),
    "ZImagePipeline": ("gdro.models.z_image", "ZImageModel"),
    "Flux2Pipeline": ("gdro.models.flux2", "Flux2Model"),
    "Flux2KleinPipeline": ("gdro.models.flux2", "Flux2KleinModel"),
}
TINY_FOLDER = Path(__file__).parents[1] / "tiny" / "model"  # of the model "tiny", which ships
EXPECTED = '"tiny", a folder with a model_index.json, or a Hub id such as black-forest-labs/FLUX.1-dev'


def load_model(
    name: str,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    sharded: bool = False,
) -> FlowModel:
    """The model called `name`, its transformer on `device` in `dtype` (float32 or bfloat16), optionally quantized.

    `name` is "tiny", a folder in diffusers' layout, or a Hub id. The device "auto" is cuda if available, else cpu.

    `sharded`: the transformer is spread over the devices of all processes, which must all call this.

    Text encoders and VAE are loaded on first use. On the device "meta" they and the transformer are outlines built from
    the configurations, without weights. Raises UserError if the model is missing, of an unknown class, or without
    safetensors weights.
    """
    device = torch_device(device) if isinstance(device, str) else device
    components = _components(name)
    if device.type == "meta":
        components.check_configurations()
    else:
        _check(components)
    if quantization is not None:
        check_quantization(quantization, device)
    # torch would take it first on Hopper, where its backward pass fails on the FLUX family's shapes; flash attention
    # takes over. This applies to the whole process: a model made on "meta" may be timed on a GPU later.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return components.family(components, device=device, dtype=dtype, quantization=quantization, sharded=sharded)


def check_model(name: str) -> None:
    """Raise UserError unless the model exists, is of a known class and has every component; loads no weights."""
    _check(_components(name))


def text_seen(name: str, prompts: Sequence[str], max_sequence_length: int) -> list[str | None]:
    """The part of each prompt that the model's text encoder reads at this length; None if all of it."""
    from gdro.models import tokenizers

    components = _components(name)
    tokenizer = tokenizers.load(components, components.family.reader)
    return tokenizers.text_seen(components.family, tokenizer, prompts, max_sequence_length)


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile lacks the compiler it needs."""
    from torch._inductor import cpp_builder, exc  # takes seconds

    if device.type != "cpu":
        found, needed = importlib.util.find_spec("triton") is not None, "triton"
    else:
        needed = "a C++ compiler (g++, or the one named by CXX)"
        try:
            found = bool(cpp_builder.get_cpp_compiler())
        except exc.InvalidCxxCompiler:
            found = False
    if not found:
        raise UserError(f"compile is true, which needs {needed}; none was found: expected false")


def pipeline_class(name: str) -> str:
    """The name of diffusers' class for the model called `name`, e.g. FluxPipeline."""
    kind = str(_find(name)[2].get("_class_name"))
    if kind not in FAMILIES:
        raise UserError(f"model: {name} is a {kind}; expected one of {', '.join(FAMILIES)}")
    return kind


def family(name: str) -> Any:
    """gdro's class for the model called `name`, e.g. FluxModel."""
    module, kind = FAMILIES[pipeline_class(name)]
    hush()
    # These take seconds to import; `--help` or a misspelled name should not wait for them.
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()  # they warn about every cut prompt; `checks.tell_cut` does once
    return getattr(import_module(module), kind)


def passes(name: str, guidance_scale: float) -> int:
    """Passes through the transformer for one velocity of the model called `name`: two with classifier-free guidance."""
    distilled = bool(_find(name)[2].get("is_distilled", False))
    return 1 + family(name).guides(guidance_scale, distilled=distilled)


def model_revision(name: str) -> str:
    """`FlowModel.revision` of the unquantized model called `name`, without loading it."""
    return _components(name).revision()


def _check(components: Any) -> None:
    from gdro.models import tokenizers

    components.check()
    tokenizers.check(components)


def _components(name: str) -> Any:
    (source, commit, _), kind = _find(name), family(name)
    from gdro.models.components import Components

    return Components(name, source, commit, kind)


def _find(name: str) -> tuple[str, str | None, dict[str, object]]:
    """(folder or Hub id, Hub commit if any, model_index.json) of the model called `name`."""
    if name == "tiny":
        found = locate(str(TINY_FOLDER), "model_index.json", field="model", expected=EXPECTED)
    else:
        found = locate(name, "model_index.json", field="model", expected=EXPECTED)
    return found.name, found.commit, read_json(found.index, "a JSON object", f"model: {found.index}")
