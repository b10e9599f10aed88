"""From a model's name to the model: `tiny`, a folder in diffusers' layout, or a Hub id."""

import importlib.util
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gdro.errors import UserError
from gdro.hub import digest, locate
from gdro.models.base import FlowModel
from gdro.models.quantisation import Quantisation, check_quantisation, hush
from gdro.reading import read_json

FAMILIES = {  # diffusers' pipeline: what makes a FlowModel of it
    "FluxPipeline": ("gdro.models.flux", "FluxModel"),
    "StableDiffusion3Pipeline": ("gdro.models.sd3", "StableDiffusion3Model"),
    "QwenImagePipeline": ("gdro.models.qwen_image", "QwenImageModel"),
    "ZImagePipeline": ("gdro.models.z_image", "ZImageModel"),
    "Flux2Pipeline": ("gdro.models.flux2", "Flux2Model"),
    "Flux2KleinPipeline": ("gdro.models.flux2", "Flux2KleinModel"),
}
EXPECTED = '"tiny", a folder with a model_index.json, or a Hub id such as black-forest-labs/FLUX.1-dev'


def load_model(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantisation: Quantisation | None = None,
    sharded: bool = False,
) -> FlowModel:
    """The model called `name`, its transformer on `device` in `dtype` (float32 or bfloat16), its weights quantised.

    `sharded`: the transformer is spread over the devices of all processes, which call this together.

    Text encoders and VAE are loaded when first used. On the device "meta" they and the transformer are outlines of the
    configurations, without weights. Raises UserError if it is missing, of an unknown class, or without safetensors
    weights.
    """
    source, commit = check_model(name)
    if quantisation is not None:
        check_quantisation(quantisation, device)
    # torch would take it first on Hopper, where its backward pass fails on the FLUX family's shapes; flash attention
    # takes over. It holds for the process: a model made on "meta" may be timed on a GPU later.
    torch.backends.cuda.enable_cudnn_sdp(False)
    hush()
    # These take seconds to import, which neither `--help` nor a misspelt name should cost.
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return family(name)(name, source, commit, device=device, dtype=dtype, quantisation=quantisation, sharded=sharded)


def check_model(name: str) -> tuple[str, str | None]:
    """(folder or Hub id, Hub commit if any) of a model that is there and of a known class; loads no weights.

    Raises UserError otherwise.
    """
    source, commit, index = _find(name)
    kind = str(index.get("_class_name"))
    if kind not in FAMILIES:
        raise UserError(f"model: {name} is a {kind}; expected one of {', '.join(FAMILIES)}")
    return source, commit


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile lacks what it compiles with."""
    from torch._inductor import cpp_builder, exc  # takes seconds

    if device.type != "cpu":
        found, needed = importlib.util.find_spec("triton") is not None, "triton"
    else:
        needed = "a C++ compiler (g++, or another that CXX names)"
        try:
            found = bool(cpp_builder.get_cpp_compiler())
        except exc.InvalidCxxCompiler:
            found = False
    if not found:
        raise UserError(f"compile is true, which needs {needed}; there is none: expected false")


def pipeline_class(name: str) -> str:
    """The name of diffusers' class of the model called `name`, e.g. FluxPipeline."""
    check_model(name)
    return str(_find(name)[2]["_class_name"])


def family(name: str) -> Any:
    """gdro's class for the model called `name`, e.g. FluxModel."""
    module, kind = FAMILIES[pipeline_class(name)]
    return getattr(import_module(module), kind)


def passes(name: str, guidance_scale: float) -> int:
    """Passes through the transformer for one velocity of the model called `name`: two with classifier-free guidance."""
    distilled = bool(_find(name)[2].get("is_distilled", False))
    return 1 + family(name).guides(guidance_scale, distilled=distilled)


def model_revision(name: str) -> str:
    """`FlowModel.revision` of the model called `name`, without loading it."""
    return revision_of(*check_model(name))


def revision_of(source: str, commit: str | None) -> str:
    """The Hub commit, or the digest of the transformer's weights in the folder `source`."""
    return commit or digest(sorted((Path(source) / "transformer").glob("*.safetensors")))


def _find(name: str) -> tuple[str, str | None, dict[str, object]]:
    """(folder or Hub id, Hub commit if any, model_index.json) of the model called `name`."""
    if name == "tiny":
        from gdro.tiny import MODEL_FOLDER

        found = locate(str(MODEL_FOLDER), "model_index.json", field="model", expected=EXPECTED)
    else:
        found = locate(name, "model_index.json", field="model", expected=EXPECTED)
    return found.name, found.commit, read_json(found.index, "a JSON object", f"model: {found.index}")
