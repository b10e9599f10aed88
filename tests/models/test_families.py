"""Every family computes what its own pipeline in diffusers computes, and its adapter loads there."""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model
from pictures import noise_image
from safetensors.torch import load_file
from small_pipelines import small_flux2_klein
from torch import Tensor

from gdro import models
from gdro.common.errors import UserError
from gdro.models import load_model
from gdro.models.diffusers_model import DiffusersModel
from gdro.models.lora import resolve_targets, write_lora
from gdro.samplers.ode import generate
from gdro.stages.export import model_card
from gdro.training.config import RoundsConfig, TrainConfig

CPU = torch.device("cpu")
PROMPTS = ["a red wall", "two dots"]
EULER = "FlowMatchEulerDiscreteScheduler"
SIZES = [(32, 64), (48, 32)]
TEXT_LENGTH = 24
# Strength folded in or applied beside: the adapter moves latents by 2 to 5; rounding, by processor, by up to 8e-5.
ROUNDING = 5e-4
LORA = "pytorch_lora_weights.safetensors"


def patches(latents: Tensor, height: int, width: int) -> Tensor:
    """(n, tokens, 4 c) -> (n, c, rows, columns): a token is c squares of 2 x 2, in the order of rows."""
    n, tokens, channels = latents.shape
    rows = round((tokens * height / width) ** 0.5)
    x = latents.reshape(n, rows, tokens // rows, channels // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(n, channels // 4, 2 * rows, 2 * tokens // rows)


def grid(latents: Tensor, height: int, width: int) -> Tensor:
    """(n, tokens, channels) -> (n, channels, rows, columns), tokens in the order of rows."""
    rows = round((latents.shape[1] * height / width) ** 0.5)
    return latents.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)


def packed(latents: Tensor, height: int, width: int) -> Tensor:
    return latents


@dataclass(frozen=True)
class Family:
    """A row a family of `small_pipelines.PIPELINES`: how it differs from FLUX.1."""

    guidance: Mapping[float, int]  # passes through the network an image takes at some scales
    layout: Callable[[Tensor, int, int], Tensor] = packed  # of its latents
    start: Callable[[Tensor, int, int], Tensor] | None = None  # of the noise it takes, if another


FAMILIES = {
    "flux": Family({1.0: 1, 3.5: 1}),
    "sd3": Family({1.0: 1, 4.5: 2}, patches),
    "qwen-image": Family({1.0: 1, 4.0: 2}),
    "z-image": Family({0.0: 1, 4.0: 2}, patches),
    "flux2": Family({1.0: 1, 2.5: 1}, start=grid),
    "flux2-klein": Family({1.0: 1, 4.0: 2}, start=grid),
}
SCALES = [(name, scale) for name, family in FAMILIES.items() for scale in family.guidance]


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


def theirs(
    name: str, pipe: DiffusionPipeline, model: DiffusersModel, scale: float, height: int, width: int, **how: Any
) -> tuple[Tensor, Any]:
    """Latents in the pipeline's layout, and images, that it makes of the same noise."""
    family = FAMILIES[name]
    start = (family.start or family.layout)(noise(model, height, width), height, width)
    seen: dict[str, Tensor] = {}

    def keep(pipe: DiffusionPipeline, step: int, timestep: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.update(state)
        return {}

    given = {"num_inference_steps": 3, "max_sequence_length": TEXT_LENGTH, **model.call_arguments(scale), **how}
    if "negative_prompt" in given:
        given["negative_prompt"] = [given["negative_prompt"]] * len(PROMPTS)
    given |= {"height": height, "width": width, "latents": start, "callback_on_step_end": keep}
    images = pipe(prompt=list(PROMPTS), **given).images  # a list of its own: Z-Image overwrites what it is given
    return seen["latents"], images


def diffusers_loads(pipe: DiffusionPipeline, folder: Path) -> None:
    pipe.load_lora_weights(folder, weight_name=LORA)


def comfyui_merges(pipe: DiffusionPipeline, folder: Path) -> None:
    """ComfyUI's rule: a layer's strength is alpha / rank where there is an `.alpha`, else 1; no header is read."""
    file = load_file(folder / LORA)
    layers = {key.removesuffix(".lora_A.weight") for key in file if key.endswith(".lora_A.weight")}
    for layer in layers:
        down, up, alpha = (file.get(layer + end) for end in (".lora_A.weight", ".lora_B.weight", ".alpha"))
        strength = 1.0 if alpha is None else float(alpha) / len(down)
        pipe.transformer.get_submodule(layer.removeprefix("transformer.")).weight.data += strength * (up @ down)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_images_are_the_pipelines_own(folders: Callable[[str], Path], name: str, scale: float, height: int, width: int):
    layout, model = FAMILIES[name].layout, load(folders(name))
    latents = ours(model, scale, height, width)
    expected, pictures = theirs(name, plain(folders(name)), model, scale, height, width)
    assert torch.allclose(layout(latents, height, width), expected, atol=1e-4)
    assert (latents - noise(model, height, width)).abs().max() > 1e-2
    images = [np.asarray(image, np.int16) for image in model.decode(latents, height, width)]
    assert {image.shape for image in images} == {(height, width, 3)}
    assert np.abs(np.stack(images) - np.stack(pictures)).max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_and_text_matter_and_each_pass_is_counted(folders: Callable[[str], Path], name: str):
    """Otherwise the test above could not see a wrong scale or a lost prompt."""
    model = load(folders(name))
    x, t = noise(model, 32, 64), torch.tensor([0.3, 0.9])
    text, other = (model.encode_text(prompts, TEXT_LENGTH) for prompts in (PROMPTS, ["blue", "green"]))
    seen = []
    for scale, passes in FAMILIES[name].guidance.items():
        before = model.nfe
        seen.append(model.velocity(x, t, text, guidance_scale=scale, height=32, width=64))
        assert model.nfe - before == len(x) * passes
        assert models.passes(str(folders(name)), scale) == passes  # without loading it
        unlike = model.velocity(x, t, other, guidance_scale=scale, height=32, width=64)
        assert (seen[-1] - unlike).abs().max() > 1e-3
    assert (seen[0] - seen[1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_velocity_does_not_depend_on_its_batch(folders: Callable[[str], Path], name: str):
    """Captions of other lengths, other times and noises beside it change nothing."""
    model, how = load(folders(name)), {"guidance_scale": max(FAMILIES[name].guidance), "height": 24, "width": 40}
    x, t, text = noise(model, 24, 40), torch.tensor([0.3, 0.9]), model.encode_text(PROMPTS, TEXT_LENGTH)
    together = model.velocity(x, t, text, **how)
    for i, prompt in enumerate(PROMPTS):
        alone = model.velocity(x[i : i + 1], t[i : i + 1], model.encode_text([prompt], TEXT_LENGTH), **how)
        assert torch.allclose(alone[0], together[i], atol=1e-5)


@pytest.mark.slow
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
        theirs(name, pipe, model, 1.0, height, width, num_inference_steps=steps)
        scheduler = model.scheduler(EULER, steps, height, width)
        assert torch.equal(scheduler.timesteps, pipe.scheduler.timesteps)
        assert torch.equal(scheduler.sigmas, pipe.scheduler.sigmas)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_latents_of_images_are_the_vaes(folders: Callable[[str], Path], name: str):
    """Scaling cancels: decode(encode(image)) is the VAE's own reconstruction from the mode; scaled they have size 1."""
    model, vae = load(folders(name)), plain(folders(name)).vae
    images = [noise_image(64, 32, seed) for seed in range(2)]
    latents = model.encode_images(images)
    assert latents.shape == (2, *model.latent_shape(32, 64))
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    frames = pixels.unsqueeze(2) if "Qwen" in type(vae).__name__ else pixels
    decoded = vae.decode(vae.encode(frames).latent_dist.mode(), return_dict=False)[0].reshape(pixels.shape)
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).round().numpy()
    found = np.stack([np.asarray(image, np.int16) for image in model.decode(latents, 32, 64)])
    assert np.abs(found - expected).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all-linear"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapter_loads_in_plain_diffusers_and_back(
    folders: Callable[[str], Path], name: str, targets: str, tmp_path: Path
):
    """alpha != rank, so that a reader who missed it would be found out."""
    scale, (height, width) = max(FAMILIES[name].guidance), SIZES[0]
    layout, model = FAMILIES[name].layout, load(folders(name))
    base = ours(model, scale, height, width)
    model.add_adapter(rank=4, alpha=10, targets=targets, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapter().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned = ours(model, scale, height, width)
    assert (tuned - base).abs().max() > 1e-2

    write_lora(tmp_path, model.adapter(), {"r": 4, "lora_alpha": 10}, {})
    for load_into in (diffusers_loads, comfyui_merges) if targets == "all-linear" else (diffusers_loads,):
        pipe = plain(folders(name))
        load_into(pipe, tmp_path)
        expected, _ = theirs(name, pipe, model, scale, height, width)
        assert torch.allclose(layout(tuned, height, width), expected, atol=ROUNDING)

    again = load(folders(name))
    again.load_adapter(tmp_path)
    assert torch.allclose(ours(again, scale, height, width), tuned, atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_by_peft_is_as_strong_here(folders: Callable[[str], Path], name: str, rslora: bool, tmp_path: Path):
    """peft keeps alpha in adapter_config.json, here other ones for some layers, and merges them itself."""
    scale, (height, width) = max(FAMILIES[name].guidance), SIZES[0]
    model, pipe = load(folders(name)), plain(folders(name))
    config = LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["to_q", "to_v", "to_out.0"],
        rank_pattern={"to_v": 2},
        alpha_pattern={"to_q": 3},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        by_peft = get_peft_model(pipe.transformer, config)
    by_peft.save_pretrained(tmp_path)
    pipe.transformer = by_peft.merge_and_unload()
    expected, _ = theirs(name, pipe, model, scale, height, width)
    base = ours(model, scale, height, width)
    model.load_adapter(tmp_path)
    tuned = ours(model, scale, height, width)
    assert torch.allclose(FAMILIES[name].layout(tuned, height, width), expected, atol=1e-4)
    assert (tuned - base).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_are_the_layers_of_every_block(folders: Callable[[str], Path], name: str):
    """All but what modulates by time."""
    model = load(folders(name))
    modules = dict(model.transformer.named_modules())
    blocks = tuple(f"{n}." for n, m in modules.items() if type(m).__name__ in model.transformer._no_split_modules)
    inside = {n for n, m in modules.items() if isinstance(m, torch.nn.Linear) and n.startswith(blocks)}
    expected = {n for n in inside if not re.search(r"norm|_mod\.|modulation", n)}
    layers = {}
    for preset in ("attention", "attention+ff"):
        model.add_adapter(rank=1, alpha=1, targets=preset, seed=0)
        layers[preset] = {key.split(".lora_")[0] for key in model.adapter()}
    assert layers["attention+ff"] == expected
    assert layers["attention"] == {n for n in expected if re.search(r"\.attn2?\.|\.attention\.", n)} < expected


def test_a_preset_that_matches_nothing_is_refused(folders: Callable[[str], Path]):
    with pytest.raises(UserError, match="target_modules: 'attention' matches no linear layer of the transformer"):
        resolve_targets(load(folders("sd3")).transformer, "attention", load(folders("z-image")).lora_presets)


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
    unread = f"transformer_blocks.{len(getattr(model.transformer, 'transformer_blocks', [])) - 1}."
    assert all(
        layer.startswith(unread) and any(name in layer for name in ("add_", "_context", "txt_")) for layer in still
    )


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert name.removesuffix("-klein") in yaml.safe_load(card.split("---")[1])["tags"]
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path))
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["image"].size == (64, 32)
    assert all(f"{argument}={value!r}," in code for argument, value in model.call_arguments(scale).items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_padding_is_not_read(folders: Callable[[str], Path], name: str):
    """A prompt's velocity does not depend on the length its text is padded to."""
    model = load(folders(name))
    text, longer = (model.encode_text(PROMPTS, length) for length in (TEXT_LENGTH, 2 * TEXT_LENGTH))
    assert text["prompt_embeds"].shape[:2] == text["prompt_embeds_mask"].shape == (2, TEXT_LENGTH)
    first, second = text["prompt_embeds_mask"].sum(1).tolist()
    assert first - second == len(PROMPTS[0]) - len(PROMPTS[1]) > 0
    x, t, how = noise(model, 32, 64), torch.tensor([0.3, 0.9]), {"guidance_scale": 4.0, "height": 32, "width": 64}
    assert torch.allclose(model.velocity(x, t, longer, **how), model.velocity(x, t, text, **how), atol=1e-5)


@torch.no_grad()
def test_qwen_images_guidance_keeps_the_velocitys_length(folders: Callable[[str], Path]):
    model = load(folders("qwen-image"))
    x, t, text = noise(model, 32, 64), torch.tensor([0.3, 0.9]), model.encode_text(PROMPTS, TEXT_LENGTH)
    plainly, guided = (model.velocity(x, t, text, guidance_scale=s, height=32, width=64) for s in (1.0, 4.0))
    assert torch.allclose(guided.norm(dim=-1), plainly.norm(dim=-1), rtol=1e-4)


@torch.no_grad()
def test_a_distilled_model_is_not_guided(tmp_path: Path):
    """Its pipeline ignores the scale, so one pass serves any, and nothing is encoded for a second."""
    with torch.random.fork_rng():
        small_flux2_klein(is_distilled=True).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert set(model.encode_text(PROMPTS, TEXT_LENGTH)) == {"prompt_embeds"}
    expected, _ = theirs("flux2-klein", plain(tmp_path), model, 4.0, 32, 64)
    assert torch.allclose(ours(model, 4.0, 32, 64), expected, atol=1e-4)
    assert model.nfe == 3 * len(PROMPTS)
