"""Every family computes what its own pipeline in diffusers computes, and its adapter loads there."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import small_flux
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from small_pipelines import small_qwen_image, small_sd3
from torch import Tensor

from gdro.errors import UserError
from gdro.models import load_model
from gdro.models.diffusers_model import DiffusersModel
from gdro.models.lora import write_lora
from gdro.samplers.ode import generate
from gdro.stages.export import model_card
from gdro.training.config import RoundsConfig, TrainConfig

CPU = torch.device("cpu")
PROMPTS = ["a red wall", "two dots"]
EULER = "FlowMatchEulerDiscreteScheduler"
SIZES = [(32, 64), (48, 32)]
TEXT_LENGTH = 24


def patches(latents: Tensor, height: int, width: int) -> Tensor:
    """(n, tokens, 4 c) -> (n, c, rows, columns): a token is c squares of 2 x 2, in the order of rows."""
    n, tokens, channels = latents.shape
    rows = round((tokens * height / width) ** 0.5)
    x = latents.reshape(n, rows, tokens // rows, channels // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(n, channels // 4, 2 * rows, 2 * tokens // rows)


@dataclass(frozen=True)
class Family:
    """A row a family: how its pipeline is built, and how it differs from FLUX.1's."""

    make: Callable[[], DiffusionPipeline]
    guidance: Mapping[float, int]  # passes through the network an image takes at some scales
    layout: Callable[[Tensor, int, int], Tensor] = lambda latents, height, width: latents  # as the pipeline takes them


FAMILIES = {
    "flux": Family(small_flux, {1.0: 1, 3.5: 1}),
    "sd3": Family(small_sd3, {1.0: 1, 4.5: 2}, patches),
    "qwen-image": Family(small_qwen_image, {1.0: 1, 4.0: 2}),
}
SCALES = [(name, scale) for name, family in FAMILIES.items() for scale in family.guidance]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's pipeline, as diffusers writes it. Do not write into it."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                FAMILIES[name].make().save_pretrained(root / name)
        return root / name

    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> DiffusersModel:
    return load_model(str(folder), device=CPU, dtype=dtype)  # type: ignore[return-value]


def plain(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(model: DiffusersModel, height: int, width: int, n: int = len(PROMPTS)) -> Tensor:
    return torch.randn(n, *model.latent_shape(height, width), generator=torch.Generator().manual_seed(0))


def ours(model: DiffusersModel, scale: float, height: int, width: int, steps: int = 3) -> Tensor:
    """Packed latents of the two prompts."""
    text, scheduler = model.encode_text(PROMPTS, TEXT_LENGTH), model.scheduler(EULER, steps, height, width)
    x = noise(model, height, width)
    return generate(model, x, text, scheduler, guidance_scale=scale, height=height, width=width)


def theirs(pipe: DiffusionPipeline, model: DiffusersModel, x: Tensor, scale: float, **how: Any) -> Any:
    """What the pipeline makes of the same noise."""
    given = {"num_inference_steps": 3, "max_sequence_length": TEXT_LENGTH, **model.call_arguments(scale), **how}
    if "negative_prompt" in given:
        given["negative_prompt"] = [given["negative_prompt"]] * len(PROMPTS)
    return pipe(PROMPTS, latents=x, **given).images


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_images_are_the_pipelines_own(folders: Callable[[str], Path], name: str, scale: float, height: int, width: int):
    layout, model, pipe = FAMILIES[name].layout, load(folders(name)), plain(folders(name))
    x = layout(noise(model, height, width), height, width)
    latents = ours(model, scale, height, width)
    size = {"height": height, "width": width}
    expected = theirs(pipe, model, x, scale, output_type="latent", **size)
    assert torch.allclose(layout(latents, height, width), expected, atol=1e-4)
    assert not torch.allclose(expected, x, atol=1e-2)
    images = [np.asarray(image, np.int16) for image in model.decode(latents, height, width)]
    assert {image.shape for image in images} == {(height, width, 3)}
    assert np.abs(np.stack(images) - np.stack(theirs(pipe, model, x, scale, **size))).max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_and_text_matter_and_each_pass_is_counted(folders: Callable[[str], Path], name: str):
    """Otherwise the test above could not see a wrong scale or a lost prompt."""
    model = load(folders(name))
    x, t = noise(model, 32, 64), torch.tensor([0.3, 0.9])
    text, other = (model.encode_text(prompts, TEXT_LENGTH) for prompts in (PROMPTS, ["blue", "green"]))
    seen = []
    for scale, passes in FAMILIES[name].guidance.items():
        before = model.evaluations
        seen.append(model.velocity(x, t, text, guidance_scale=scale, height=32, width=64))
        assert model.evaluations - before == len(x) * passes
        unlike = model.velocity(x, t, other, guidance_scale=scale, height=32, width=64)
        assert (seen[-1] - unlike).abs().max() > 1e-3
    assert (seen[0] - seen[1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_schedule_is_the_pipelines_own(folders: Callable[[str], Path], name: str, dynamic: bool, tmp_path: Path):
    shutil.copytree(folders(name), tmp_path / name)
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic).save_pretrained(
        tmp_path / name / "scheduler"
    )
    model, pipe = load(tmp_path / name), plain(tmp_path / name)
    for steps, height, width in ((1, 32, 32), (5, 32, 64)):
        x = FAMILIES[name].layout(noise(model, height, width), height, width)
        theirs(pipe, model, x, 1.0, output_type="latent", height=height, width=width, num_inference_steps=steps)
        scheduler = model.scheduler(EULER, steps, height, width)
        assert torch.equal(scheduler.timesteps, pipe.scheduler.timesteps)
        assert torch.equal(scheduler.sigmas, pipe.scheduler.sigmas)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_latents_of_images_are_the_vaes(folders: Callable[[str], Path], name: str):
    """Scaling cancels: decode(encode(image)) is the VAE's own reconstruction from the mode; scaled they have size 1."""
    model, vae = load(folders(name)), plain(folders(name)).vae
    images = [Image.effect_noise((64, 32), 60).convert("RGB") for _ in range(2)]
    latents = model.encode_images(images)
    assert latents.shape == (2, *model.latent_shape(32, 64))
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    frames = pixels.unsqueeze(2) if "Qwen" in type(vae).__name__ else pixels
    decoded = vae.decode(vae.encode(frames).latent_dist.mode(), return_dict=False)[0].reshape(pixels.shape)
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).round().numpy()
    found = np.stack([np.asarray(image, np.int16) for image in model.decode(latents, 32, 64)])
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all-linear"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapter_loads_in_plain_diffusers_and_back(
    folders: Callable[[str], Path], name: str, targets: str, tmp_path: Path
):
    """alpha != rank, so that a reader who missed it would be found out."""
    scale, (height, width) = max(FAMILIES[name].guidance), SIZES[0]
    layout, model, pipe = FAMILIES[name].layout, load(folders(name)), plain(folders(name))
    base = ours(model, scale, height, width)
    model.add_adapter(rank=4, alpha=10, targets=targets, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapter().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned = ours(model, scale, height, width)
    assert (tuned - base).abs().max() > 1e-2

    write_lora(tmp_path, model.adapter(), {"r": 4, "lora_alpha": 10}, {})
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    x = layout(noise(model, height, width), height, width)
    expected = theirs(pipe, model, x, scale, output_type="latent", height=height, width=width)
    assert torch.allclose(layout(tuned, height, width), expected, atol=1e-4)

    again = load(folders(name))
    again.load_adapter(tmp_path)
    assert again.weights == model.weights
    assert torch.equal(ours(again, scale, height, width), tuned)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_the_adapter_under_guidance(folders: Callable[[str], Path], name: str):
    """Where the last block's text stream ends unread, layers are without effect; every other one learns."""
    model = load(folders(name))
    model.add_adapter(rank=2, alpha=2, targets="attention+ff", seed=0)
    with torch.no_grad():
        for parameter in model.adapter().values():
            parameter.add_(0.1)
    text = model.encode_text(PROMPTS, TEXT_LENGTH)
    how: dict[str, Any] = {"guidance_scale": max(FAMILIES[name].guidance), "height": 32, "width": 64}
    model.velocity(noise(model, 32, 64), torch.tensor([0.3, 0.9]), text, **how).square().sum().backward()
    still = {layer for layer, p in model.adapter().items() if p.grad is None or not p.grad.any()}
    assert len(still) < len(model.adapter()) / 3
    last = max(int(layer.split(".")[1]) for layer in model.adapter() if layer.startswith("transformer_blocks."))
    unread = f"transformer_blocks.{last}."
    assert all(
        layer.startswith(unread) and any(name in layer for name in ("add_", "_context", "txt_")) for layer in still
    )


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_near(folders: Callable[[str], Path], name: str):
    scale = max(FAMILIES[name].guidance)
    exact = ours(load(folders(name)), scale, 32, 64)
    rough = ours(load(folders(name), torch.bfloat16), scale, 32, 64)
    assert rough.dtype == torch.float32
    assert (rough - exact).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_off_the_grid_are_refused(folders: Callable[[str], Path], name: str):
    with pytest.raises(UserError, match="width: 60 does not fit the model's grid; expected a multiple of 8"):
        load(folders(name)).latent_shape(32, 60)


def test_sd3_has_positions_up_to_a_size(folders: Callable[[str], Path]):
    model = load(folders("sd3"))
    assert model.latent_shape(128, 128) == (256, 64)
    with pytest.raises(UserError, match="height: 136 is beyond the model's positions; expected at most 128"):
        model.latent_shape(136, 32)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_use_a_model_card_tells_runs(folders: Callable[[str], Path], name: str, tmp_path: Path):
    model = load(folders(name))
    model.add_adapter(rank=4, alpha=10, targets="attention", seed=0)
    write_lora(tmp_path, model.adapter(), {"r": 4, "lora_alpha": 10}, {})
    scale = max(FAMILIES[name].guidance)
    config = {
        "model": model.name,
        "sample": {"guidance_scale": scale, "max_sequence_length": TEXT_LENGTH, "height": 32, "width": 64},
        "score": {"reward": "ocr"},
        "train": TrainConfig().model_dump(),
        "rounds": RoundsConfig().model_dump(),
        "evaluate": {"num_inference_steps": 2},
    }
    card = model_card(config, 100, None, [])
    assert name in yaml.safe_load(card.split("---")[1])["tags"]
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path))
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["image"].size == (64, 32)
    assert all(f"{argument}={value!r}," in code for argument, value in model.call_arguments(scale).items())


@torch.no_grad()
def test_qwen_image_reads_no_padding(folders: Callable[[str], Path]):
    """A prompt's velocity depends neither on the length its text is padded to nor on the prompts beside it."""
    model = load(folders("qwen-image"))
    text = model.encode_text(PROMPTS, TEXT_LENGTH)
    assert text["prompt_embeds"].shape[:2] == text["prompt_embeds_mask"].shape == (2, TEXT_LENGTH)
    assert text["prompt_embeds_mask"].sum(1).tolist() == [len(prompt) + 5 for prompt in PROMPTS]  # the template's end
    x, t, how = noise(model, 32, 64), torch.tensor([0.3, 0.9]), {"guidance_scale": 4.0, "height": 32, "width": 64}
    both = model.velocity(x, t, text, **how)
    longer = model.velocity(x, t, model.encode_text(PROMPTS, 2 * TEXT_LENGTH), **how)
    alone = [model.velocity(x[i : i + 1], t[i : i + 1], model.encode_text([PROMPTS[i]], 17), **how) for i in (0, 1)]
    assert torch.allclose(longer, both, atol=1e-5)
    assert torch.allclose(torch.cat(alone), both, atol=1e-5)


@torch.no_grad()
def test_qwen_images_guidance_keeps_the_velocitys_length(folders: Callable[[str], Path]):
    model = load(folders("qwen-image"))
    x, t, text = noise(model, 32, 64), torch.tensor([0.3, 0.9]), model.encode_text(PROMPTS, TEXT_LENGTH)
    plainly, guided = (model.velocity(x, t, text, guidance_scale=s, height=32, width=64) for s in (1.0, 4.0))
    assert torch.allclose(guided.norm(dim=-1), plainly.norm(dim=-1), rtol=1e-4)
