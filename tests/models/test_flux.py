"""FluxModel computes what FluxPipeline computes, and its adapter is the only thing that can change it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from pictures import differ, noise_image
from safetensors.torch import load_file, save_file

from gdro.common.errors import UserError
from gdro.models import load_model
from gdro.models.flux import FluxModel

CPU = torch.device("cpu")
SIZE = {"height": 32, "width": 64}
HOW = {"guidance_scale": 3.5, **SIZE}


@pytest.fixture
def inputs(flux: FluxModel) -> dict:
    """x_t, t and text of two images."""
    x_t = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    return {"x_t": x_t, "t": torch.tensor([0.3, 0.9]), "text": flux.encode_text(["a red wall", "two dots"], 24)}


def perturb(model: FluxModel) -> None:
    """Move every LoRA weight, so that the policy differs from the reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapter().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def copy_without(source: Path, target: Path, *parts: str) -> Path:
    shutil.copytree(source, target, ignore=lambda folder, names: [n for n in names if n in parts])
    return target


def copy_weights(path: Path) -> dict[str, torch.Tensor]:
    """load_file maps the file into memory, so a file about to be overwritten is copied out."""
    return {name: value.clone() for name, value in load_file(path).items()}


def test_velocity_is_the_transformer_called_as_the_pipeline_calls_it(flux_folder: Path, flux: FluxModel, inputs: dict):
    pipe = FluxPipeline.from_pretrained(flux_folder)
    with torch.no_grad():
        embeds, pooled, text_ids = pipe.encode_prompt(["a red wall", "two dots"], max_sequence_length=24)
        expected = pipe.transformer(
            hidden_states=inputs["x_t"],
            timestep=inputs["t"],
            guidance=torch.tensor([3.5, 3.5]),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=pipe._prepare_latent_image_ids(2, 4, 8, "cpu", torch.float32),
        ).sample
        assert torch.allclose(flux.velocity(**inputs, **HOW), expected, atol=1e-5)


def test_guidance_and_text_matter(flux: FluxModel, inputs: dict):
    """The fixture's transformer is guidance-embedded, so a wrong guidance could not go unnoticed."""
    with torch.no_grad():
        first = flux.velocity(**inputs, **HOW)
        assert not torch.allclose(first, flux.velocity(**inputs, **{**HOW, "guidance_scale": 1.0}), atol=1e-4)
        other = inputs | {"text": flux.encode_text(["blue", "green"], 24)}
        assert not torch.allclose(first, flux.velocity(**other, **HOW), atol=1e-4)


def test_text_has_the_length_asked_for(flux: FluxModel):
    text = flux.encode_text(["a red wall", "two dots"], 17)
    assert text["prompt_embeds"].shape == (2, 17, 32)
    assert text["pooled_prompt_embeds"].shape == (2, 32)


def test_latents_are_on_the_grid_of_tokens(flux: FluxModel):
    assert flux.latent_shape(32, 64) == (32, 64)
    with pytest.raises(UserError, match="height: 30 does not fit the model's grid; expected a multiple of 8"):
        flux.latent_shape(30, 64)
    with pytest.raises(UserError, match="width: 100 "):
        flux.latent_shape(32, 100)


def test_images_and_latents_are_the_pipelines(flux_folder: Path, flux: FluxModel):
    """z = pack((mode of the posterior - shift) scale), and decode is its inverse followed by the VAE's decoder."""
    pipe = FluxPipeline.from_pretrained(flux_folder)
    images = [noise_image(64, 32, seed) for seed in range(3)]
    latents = flux.encode_images(images)
    assert latents.shape == (3, 32, 64)
    assert latents.dtype == torch.float32
    unpacked = pipe._unpack_latents(latents, 32, 64, pipe.vae_scale_factor)
    with torch.no_grad():
        mode = pipe.vae.encode(pipe.image_processor.preprocess(images, 32, 64)).latent_dist.mode()
        assert torch.allclose(unpacked / 0.5 + 0.25, mode, atol=1e-5)
        expected = pipe.image_processor.postprocess(pipe.vae.decode(unpacked / 0.5 + 0.25).sample)
    assert differ(flux.decode(latents, 32, 64), expected) <= 1
    with pytest.raises(UserError, match="64x24 pixels; expected 64x32 like the first"):
        flux.encode_images([images[0], images[1].resize((64, 24))])


def test_a_new_adapter_changes_nothing_and_is_a_function_of_the_seed(flux: FluxModel, inputs: dict):
    """B = 0, so the policy starts as the reference: every d - d_ref is 0 and the first loss is ln k!."""
    reference = flux.velocity(**inputs, **HOW)
    flux.add_adapter(rank=4, alpha=8, targets="attention+ff", seed=5)
    assert torch.equal(flux.velocity(**inputs, **HOW), reference)
    first = {name: p.detach().clone() for name, p in flux.adapter().items()}
    torch.manual_seed(123)
    flux.add_adapter(rank=4, alpha=8, targets="attention+ff", seed=5)
    again = flux.adapter()
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)
    flux.add_adapter(rank=4, alpha=8, targets="attention+ff", seed=6)
    assert not torch.equal(*[d["transformer_blocks.0.attn.to_q.lora_A.weight"] for d in (flux.adapter(), first)])


def test_only_the_adapter_is_trainable(flux: FluxModel, inputs: dict):
    flux.add_adapter(rank=4, alpha=8, targets="attention", seed=0)
    flux.add_adapter(rank=4, alpha=8, targets="attention+ff", seed=0)
    trainable = {id(p) for p in flux.transformer.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in flux.adapter().values()}
    perturb(flux)
    with flux.adapter_disabled():
        pass
    flux.velocity(**inputs, **HOW).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flux.adapter().values())


def test_presets_name_the_layers_of_every_block(flux: FluxModel):
    flux.add_adapter(rank=2, alpha=2, targets="attention", seed=0)
    attention = {name.split(".lora_")[0] for name in flux.adapter()}
    assert len(attention) == 8 + 2 * 3
    assert all(".attn." in name for name in attention)
    flux.add_adapter(rank=2, alpha=2, targets="attention+ff", seed=0)
    both = {name.split(".lora_")[0] for name in flux.adapter()}
    assert both - attention == {
        *(f"transformer_blocks.0.{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")),
        *(f"single_transformer_blocks.{i}.{layer}" for i in (0, 1) for layer in ("proj_mlp", "proj_out")),
    }
    flux.add_adapter(rank=2, alpha=2, targets="all-linear", seed=0)
    everything = {name.split(".lora_")[0] for name in flux.adapter()}
    assert everything > both | {"x_embedder", "proj_out"}
    flux.add_adapter(rank=2, alpha=2, targets=["to_q", "ff.net.2"], seed=0)
    assert len(flux.adapter()) == 2 * (3 + 1)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("atention", 'not a preset; did you mean "attention"?'),
        (["to_q", "to_qq"], "'to_qq' matches no linear layer"),
        ([], "the list is empty"),
    ],
)
def test_targets_that_match_nothing_are_refused(flux: FluxModel, targets: str | list[str], message: str):
    with pytest.raises(UserError, match=r"train\.target_modules") as error:
        flux.add_adapter(rank=2, alpha=2, targets=targets, seed=0)
    assert message in str(error.value)


@torch.no_grad()
def test_disabled_adapter_is_the_reference_and_comes_back(flux: FluxModel, inputs: dict):
    reference = flux.velocity(**inputs, **HOW)
    flux.add_adapter(rank=4, alpha=8, targets="attention+ff", seed=0)
    perturb(flux)
    policy = flux.velocity(**inputs, **HOW)
    assert not torch.allclose(policy, reference, atol=1e-3)
    with flux.adapter_disabled():
        assert torch.equal(flux.velocity(**inputs, **HOW), reference)
        with flux.adapter_disabled():
            assert torch.equal(flux.velocity(**inputs, **HOW), reference)
        assert torch.equal(flux.velocity(**inputs, **HOW), reference)
    assert torch.equal(flux.velocity(**inputs, **HOW), policy)
    with pytest.raises(RuntimeError, match="stop"), flux.adapter_disabled():
        raise RuntimeError("stop")
    assert torch.equal(flux.velocity(**inputs, **HOW), policy)
    assert all(p.requires_grad for p in flux.adapter().values())


def test_weights_name_what_the_velocity_is_made_of(flux: FluxModel):
    assert flux.fingerprint == flux.revision
    flux.add_adapter(rank=4, alpha=8, targets="attention", seed=0)
    before = flux.fingerprint
    perturb(flux)
    assert len({flux.revision, before, flux.fingerprint}) == 3
    with flux.adapter_disabled():
        assert flux.fingerprint == flux.revision


def test_nan_in_an_adapter_is_named(flux: FluxModel):
    flux.add_adapter(rank=4, alpha=8, targets="attention", seed=0)
    state = {name: value.detach().clone() for name, value in flux.adapter().items()}
    name = "transformer_blocks.0.attn.to_q.lora_A.weight"
    state[name][0, 0] = torch.nan
    before = flux.fingerprint
    with pytest.raises(UserError, match=rf"^adapter: {name} holds NaN or infinity; expected finite weights$"):
        flux.load_adapter_state(state)
    assert flux.fingerprint == before


@torch.no_grad()
def test_bfloat16_base_keeps_a_float32_adapter(flux_folder: Path, flux: FluxModel, inputs: dict):
    model = load_model(str(flux_folder), device=CPU, dtype=torch.bfloat16)
    reference = model.velocity(**inputs, **HOW)
    model.add_adapter(rank=4, alpha=8, targets="attention+ff", seed=0)
    assert {p.dtype for p in model.adapter().values()} == {torch.float32}
    assert model.transformer.x_embedder.weight.dtype == torch.bfloat16
    assert reference.dtype == torch.float32
    assert (reference - flux.velocity(**inputs, **HOW)).square().mean().sqrt() < 0.05
    perturb(model)
    assert not torch.allclose(model.velocity(**inputs, **HOW), reference, atol=1e-3)
    with model.adapter_disabled():
        assert torch.equal(model.velocity(**inputs, **HOW), reference)
    assert model.encode_text(["a"], 8)["prompt_embeds"].dtype == torch.bfloat16
    assert model.decode(inputs["x_t"], 32, 64)[0].size == (64, 32)


def test_missing_models_are_refused_in_one_line(flux_folder: Path, tmp_path: Path):
    def refusal(name: str | Path) -> str:
        with pytest.raises(UserError) as error:
            load_model(str(name), device=CPU, dtype=torch.float32)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert 'nowhere not found; expected "tiny", a folder' in refusal(tmp_path / "nowhere")
    assert "nor on the Hub" in refusal("nobody/nothing-at-all")
    (tmp_path / "empty").mkdir()
    assert "has no model_index.json" in refusal(tmp_path / "empty")

    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert "is a StableDiffusionPipeline; expected one of FluxPipeline, " in refusal(other)
    (other / "model_index.json").write_text("{")
    assert "is not JSON" in refusal(other)

    unweighted = copy_without(flux_folder, tmp_path / "unweighted")
    path = unweighted / "transformer" / "diffusion_pytorch_model.safetensors"
    state = copy_weights(path)
    state.pop("proj_out.bias")
    save_file(state, path, metadata={"format": "pt"})
    assert "transformer lacks 1 weights (proj_out.bias, ...)" in refusal(unweighted)
    path.write_bytes(path.read_bytes()[:1000])
    assert "transformer cannot be loaded" in refusal(unweighted)
    path.unlink()
    assert "transformer/diffusion_pytorch_model.safetensors not found; " in refusal(unweighted)
