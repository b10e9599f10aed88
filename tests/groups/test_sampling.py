"""Groups do not depend on batch size, order or interruption, and a store is never mixed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.common.rng import torch_rng
from gdro.groups.sampling import Generation, check_round_ids, sample_groups
from gdro.groups.store import GroupStore, GroupWriter
from gdro.models.flux import FluxModel
from gdro.samplers.ode import generate

SETTINGS = Generation(
    images_per_prompt=3,
    num_inference_steps=2,
    max_sequence_length=24,
    height=32,
    width=64,
    batch_size=4,
    prompts_per_shard=2,
)
PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(["a red wall", "two dots", "a blue sign", "two dots", "end"])]


def pixels(store: GroupStore, group: str) -> np.ndarray:
    return np.stack([np.asarray(image, np.int16) for image in store.images(group)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_group_is_the_integrated_noise_of_its_id(flux: FluxModel, tmp_path: Path):
    """x_0 = ODE(randn(seed, "noise", group, index)), decoded; everything to make it again is stored."""
    sample_groups(SETTINGS, flux, PROMPTS, tmp_path, seed=7)
    store = GroupStore(tmp_path)
    assert store.group_ids == [prompt.id for prompt in PROMPTS]
    assert store.prompt("p3") == PROMPTS[3]
    text = flux.encode_text(["two dots"] * 3, 24)
    for name, value in store.text("p3").items():
        assert torch.allclose(value, text[name][:1], atol=1e-5)
    noise = torch.stack([torch.randn(32, 64, generator=torch_rng(7, "noise", "p3", i)) for i in range(3)])
    scheduler = flux.scheduler(SETTINGS.scheduler, 2, 32, 64)
    latents = generate(flux, noise, text, scheduler, guidance_scale=3.5, height=32, width=64)
    assert torch.allclose(store.latents("p3"), latents, atol=1e-4)
    expected = np.stack([np.asarray(image, np.int16) for image in flux.decode(latents, 32, 64)])
    assert np.abs(pixels(store, "p3") - expected).max() <= 1
    assert np.abs(pixels(store, "p3") - pixels(store, "p1")).max() > 1, "one text, two groups, two noises"
    assert store.settings == {
        "guidance_scale": 3.5,
        "max_sequence_length": 24,
        "generator": flux.name,
        "revision": flux.revision,
    }


def test_batch_size_and_order_change_only_rounding(flux: FluxModel, tmp_path: Path):
    sample_groups(SETTINGS, flux, PROMPTS, tmp_path / "a", seed=7)
    other = SETTINGS.model_copy(update={"batch_size": 5, "prompts_per_shard": 3})
    sample_groups(other, flux, PROMPTS[::-1], tmp_path / "b", seed=7)
    a, b = GroupStore(tmp_path / "a"), GroupStore(tmp_path / "b")
    for prompt in PROMPTS:
        assert torch.allclose(a.latents(prompt.id), b.latents(prompt.id), atol=1e-4)
        assert np.abs(pixels(a, prompt.id) - pixels(b, prompt.id)).max() <= 1


def test_an_interrupted_job_ends_with_the_same_bits(
    flux: FluxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    sample_groups(SETTINGS, flux, PROMPTS, tmp_path / "whole", seed=7)
    write = GroupWriter.write_shard

    def stop_at_second(writer: GroupWriter, i: int, *args) -> None:
        if i == 1:
            raise KeyboardInterrupt
        write(writer, i, *args)

    monkeypatch.setattr(GroupWriter, "write_shard", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        sample_groups(SETTINGS, flux, PROMPTS, tmp_path / "stopped", seed=7)
    monkeypatch.undo()
    capsys.readouterr()
    sample_groups(SETTINGS, flux, PROMPTS, tmp_path / "stopped", seed=7)
    assert "6/15 img done earlier" in capsys.readouterr().err
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_prompts_may_be_appended(flux: FluxModel, tmp_path: Path):
    sample_groups(SETTINGS, flux, PROMPTS[:3], tmp_path, seed=7)
    before = files(tmp_path)
    sample_groups(SETTINGS, flux, PROMPTS, tmp_path, seed=7)
    store = GroupStore(tmp_path)
    assert store.group_ids == [prompt.id for prompt in PROMPTS]
    after = files(tmp_path)
    assert all(after[name] == data for name, data in before.items() if name.endswith((".parquet", ".safetensors")))


def test_a_store_begun_otherwise_is_refused(flux: FluxModel, tmp_path: Path):
    sample_groups(SETTINGS, flux, PROMPTS[:2], tmp_path, seed=7)
    sample_groups(SETTINGS.model_copy(update={"batch_size": 1}), flux, PROMPTS[:2], tmp_path, seed=7)

    def refusal(message: str, settings: Generation = SETTINGS, prompts: list[Prompt] = PROMPTS[:2], seed: int = 7):
        with pytest.raises(UserError) as error:
            sample_groups(settings, flux, prompts, tmp_path, seed=seed)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    for field, value in (("num_inference_steps", 3), ("guidance_scale", 2.0), ("images_per_prompt", 4)):
        old = getattr(SETTINGS, field)
        refusal(
            f"sample.{field}: {tmp_path} was sampled with {old}, now {value}",
            SETTINGS.model_copy(update={field: value}),
        )
    refusal(f"seed: {tmp_path} was sampled with 7, now 8", seed=8)
    refusal("begun with 2 prompts, now there are 1", prompts=PROMPTS[:1])
    refusal('begun with other prompts from "p1" on', prompts=PROMPTS[1:3])
    refusal('two prompts with the id "p0"', prompts=[PROMPTS[0], PROMPTS[0]])
    refusal("no prompts given", prompts=[])
    refusal("height: 33 does not fit", SETTINGS.model_copy(update={"height": 33}))
    flux.add_adapter(rank=2, alpha=2, targets="attention", seed=0)
    refusal("fingerprint: ")
    with flux.adapter_disabled():
        sample_groups(SETTINGS, flux, PROMPTS[:2], tmp_path, seed=7)


def test_a_store_without_a_group_may_be_begun_otherwise(
    flux: FluxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GroupWriter, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        sample_groups(SETTINGS, flux, PROMPTS, tmp_path, seed=7)
    monkeypatch.undo()
    (tmp_path / ".groups-00000.parquet.tmp-1").write_bytes(b"half")
    sample_groups(SETTINGS.model_copy(update={"num_inference_steps": 1}), flux, PROMPTS[2:], tmp_path, seed=8)
    assert GroupStore(tmp_path).group_ids == [prompt.id for prompt in PROMPTS[2:]]
    assert not list(tmp_path.glob(".*")), "what the killed writer left is swept up"


def test_rounds_and_purposes_draw_other_noise(flux: FluxModel, tmp_path: Path):
    for name, how in (("a", {}), ("b", {"round": 1}), ("c", {"purpose": "evaluation"})):
        sample_groups(SETTINGS, flux, PROMPTS[:1], tmp_path / name, seed=7, **how)
    stores = [GroupStore(tmp_path / name) for name in "abc"]
    assert [store.group_ids for store in stores] == [["p0"], ["p0@1"], ["p0"]]
    images = [store.images(store.group_ids[0])[0].tobytes() for store in stores]
    assert len(set(images)) == 3


def test_ids_that_two_rounds_could_share_are_refused():
    def check(*ids: str) -> None:
        check_round_ids([Prompt(i, "a wall") for i in ids], "sample.prompts")

    check("a", "b@1", "a@b", "@1", "a@")
    with pytest.raises(UserError, match=r'sample.prompts has the ids "a" and "a@1", .* is called in round 1'):
        check("a", "a@1")
    with pytest.raises(UserError, match='"a@1" and "a@1@12"'):
        check("a@1@12", "a@1", "b")


@pytest.mark.parametrize("sampler", ["ode", "flow_grpo"])
def test_nan_is_named_by_what_it_is_in_and_its_image(flux: FluxModel, tmp_path: Path, sampler: str):
    """Not finite: a prompt's embeddings, the velocities of an image, its pixels; no file is written of any."""
    steps = Generation(**SETTINGS.model_dump() | {"sampler": sampler, "noise_level": None})

    def refusal() -> str:
        with pytest.raises(UserError) as error:
            sample_groups(steps, flux, PROMPTS, tmp_path, seed=7)
        assert not list(tmp_path.glob("*.parquet"))
        return str(error.value)

    flux.decode(torch.zeros(1, 32, 64), 32, 64)
    bias = flux.networks()["vae"].decoder.conv_out.bias
    bias[0] = torch.inf
    assert f'model: {flux.name}: the VAE\'s pixels hold NaN or infinity for image "p0/0"; expected' in refusal()
    bias[0] = 0

    network = flux.transformer.forward

    def second_row(*args: Any, **kwargs: Any) -> Any:
        out = network(*args, **kwargs)[0]
        out[1] = torch.nan
        return (out,)

    flux.transformer.forward = second_row
    assert 'the velocities of call 1 of 2 hold NaN or infinity for image "p0/1"; expected' in refusal()
    flux.transformer.forward = network

    encoder = flux._text_pipeline.text_encoder_2.get_input_embeddings()
    letter = flux._text_pipeline.tokenizer_2("w").input_ids[1]  # of "wall" in the first prompt, not in the second
    encoder.weight[letter] = torch.nan
    assert 'the prompt_embeds of the text encoders hold NaN or infinity for prompt "p0"; expected' in refusal()
