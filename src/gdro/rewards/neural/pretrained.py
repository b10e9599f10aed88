"""Loading transformers' models for a reward, with errors that name the configuration field."""

from typing import Any, Literal

from gdro.common.errors import UserError
from gdro.common.hub import Source, locate
from gdro.common.reading import cause, read_json

Device = Literal["auto", "cpu", "cuda"]


def find(name: str, revision: str | None, *, field: str, expected: str) -> tuple[Source, dict[str, Any]]:
    """(the model's place, its config.json), its weights downloaded if on the Hub. UserError if it is not found."""
    source = locate(name, "config.json", field=field, expected=expected, revision=revision)
    locate(name, "model.safetensors", field=field, expected=f"{expected}, in safetensors", revision=source.commit)
    return source, read_json(source.index, "a JSON object", f"{field}: {source.index}")


def load(kind: Any, source: Source, *, field: str, **options: Any) -> Any:
    """`kind.from_pretrained`; UserError if it fails, because the user's files are at fault."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        return kind.from_pretrained(source.name, revision=source.commit, **options)
    except Exception as error:
        raise UserError(
            f"{field}: {source.name} does not load as {kind.__name__} ({type(error).__name__}: {cause(error)})"
        ) from error


def image_processor(source: Source, *, field: str) -> Any:
    """The model's PIL-based image processor, which gives the same pixels with or without torchvision."""
    import transformers

    return load(transformers.AutoImageProcessor, source, field=field, use_fast=False)


def network(kind: Any, source: Source, *, field: str, device: Device) -> Any:
    """The model in float32, for inference, on the device. UserError if the file lacks any of its weights."""
    import torch

    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    model, info = load(kind, source, field=field, **options)
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:  # transformers would continue with random ones
        of = f"weights of a {type(model).__name__} ({missing[0]}, ...)"
        raise UserError(f"{field}: {source.name} lacks {len(missing)} {of}; expected a whole model.safetensors")
    return model.eval().to(torch_device(device))


def torch_device(device: Device) -> str:
    """cpu or cuda; UserError if cuda is requested but unavailable."""
    import torch

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError('device: "cuda" is not available here; expected "auto" or "cpu"')
    return "cuda" if there and device != "cpu" else "cpu"
