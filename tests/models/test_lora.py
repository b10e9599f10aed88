"""The file of an adapter: of what form it is, its strength is read, and what does not fit is refused."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.models import load_model
from gdro.models.flux import FluxModel
from gdro.models.lora import write_lora

FILE = "pytorch_lora_weights.safetensors"
SHAPE = {"r": 4, "lora_alpha": 10}
HOW = {"guidance_scale": 3.5, "height": 32, "width": 64}


@pytest.fixture
def tuned(flux: FluxModel) -> FluxModel:
    flux.add_adapter(rank=4, alpha=10, targets="attention+ff", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flux.adapter().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return flux


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def velocity(model: FluxModel) -> torch.Tensor:
    x_t = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.velocity(x_t, torch.tensor([0.5]), model.encode_text(["a red wall"], 24), **HOW)


def test_adapter_comes_back_as_strong_as_it_was(tuned: FluxModel, flux_folder: Path, tmp_path: Path):
    """The strength, 10 / 4, is in the file's matrices."""
    write_lora(tmp_path, tuned.adapter(), SHAPE, {"step": 3})
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o666 & ~umask()
    with safe_open(tmp_path / FILE, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["gdro"]["step"] == 3
    assert header["transformer.lora_alpha"] == header["transformer.r"] == 4
    other = load_model(str(flux_folder), device=torch.device("cpu"), dtype=torch.float32)
    other.load_adapter(tmp_path)
    assert other.adapter().keys() == tuned.adapter().keys()
    assert torch.allclose(velocity(other), velocity(tuned), atol=1e-5)
    write_lora(tmp_path / "again", other.adapter(), {"r": 4, "lora_alpha": 4}, {"step": 3})
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()


def test_a_power_of_two_is_exact(tuned: FluxModel, flux_folder: Path, tmp_path: Path):
    """The usual alpha = 2 rank costs no rounding."""
    tuned.add_adapter(rank=4, alpha=8, targets="attention", seed=0)
    with torch.no_grad():
        for parameter in tuned.adapter().values():
            parameter.add_(0.1)
    write_lora(tmp_path, tuned.adapter(), {"r": 4, "lora_alpha": 8}, {})
    other = load_model(str(flux_folder), device=torch.device("cpu"), dtype=torch.float32)
    other.load_adapter(tmp_path)
    assert torch.equal(velocity(other), velocity(tuned))


def config(folder: Path, **fields: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 10, **fields}))


def with_alpha(state: Mapping[str, torch.Tensor], *, down: str = "lora_A", up: str = "lora_B") -> dict[str, Any]:
    """The state as kohya and others keep it: 10 in a tensor beside each pair."""
    alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(10.0) for name in state if "lora_A" in name}
    return {name.replace("lora_A", down).replace("lora_B", up): value for name, value in state.items()} | alphas


def prefixed(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def save_state(folder: Path, state: Mapping[str, torch.Tensor], name: str = FILE, **header: str) -> None:
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name, metadata=header or None)


Save = Callable[[Path, dict[str, torch.Tensor]], None]


def peft(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_state(folder, prefixed(state, "base_model.model."), "adapter_model.safetensors")
    config(folder)


def peft_renamed(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_state(folder, prefixed(state, "base_model.model.transformer."))
    config(folder)


def diffusers_model(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """`transformer.save_lora_adapter`."""
    save_state(folder, state, lora_adapter_metadata=json.dumps({"r": 4, "lora_alpha": 10}))


FORMS: dict[str, Save] = {
    "peft": peft,
    "peft, renamed": peft_renamed,
    "diffusers' model": diffusers_model,
    "alpha": lambda folder, state: save_state(folder, with_alpha(prefixed(state, "transformer."))),
    "down and up": lambda folder, state: save_state(folder, with_alpha(state, down="lora_down", up="lora_up")),
    "comfyui": lambda folder, state: save_state(folder, with_alpha(prefixed(state, "diffusion_model."))),
    "header of patterns": lambda folder, state: save_state(
        folder,
        prefixed(state, "transformer."),
        lora_adapter_metadata=json.dumps(
            {"transformer.r": 8, "transformer.lora_alpha": 2.5, "transformer.use_rslora": True}
            | {"transformer.rank_pattern": {"to_q": 4, ".*": 4}, "transformer.alpha_pattern": {".*": 5}}
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_strength_is_read_wherever_it_is_kept(tuned: FluxModel, flux_folder: Path, tmp_path: Path, form: str):
    FORMS[form](tmp_path, {name: value.detach().clone() for name, value in tuned.adapter().items()})
    other = load_model(str(flux_folder), device=torch.device("cpu"), dtype=torch.float32)
    other.load_adapter(tmp_path)
    assert torch.allclose(velocity(other), velocity(tuned), atol=1e-5)
    weights = other.fingerprint
    other.load_adapter(tmp_path)  # in place of the first
    assert other.fingerprint == weights


def test_layers_may_differ_in_rank(tuned: FluxModel, flux_folder: Path, tmp_path: Path):
    """Without any alpha, each layer's strength is 1, whatever its rank."""
    state = {name: value.detach().clone() for name, value in tuned.adapter().items()}
    odd = "transformer_blocks.0.attn.to_q"
    for name in (f"{odd}.lora_A.weight", f"{odd}.lora_B.weight"):
        state[name] = torch.cat([state[name], torch.zeros_like(state[name])], dim=int("_B" in name))
    tuned.add_adapter(rank=4, alpha=4, targets="attention+ff", seed=0)
    tuned.load_adapter_state({name: value[:4] if "_A" in name else value[:, :4] for name, value in state.items()})
    save_state(tmp_path, prefixed(state, "transformer."))
    other = load_model(str(flux_folder), device=torch.device("cpu"), dtype=torch.float32)
    other.load_adapter(tmp_path)
    assert torch.allclose(velocity(other), velocity(tuned), atol=1e-5)


def test_an_adapter_by_diffusers_own_trainers_is_read(tuned: FluxModel, flux_folder: Path, tmp_path: Path):
    """FluxPipeline.save_lora_weights is what diffusers' training scripts call; without metadata alpha = rank."""
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=dict(tuned.adapter()))
    pipe = FluxPipeline.from_pretrained(flux_folder)
    pipe.load_lora_weights(tmp_path, weight_name=FILE)
    tuned.load_adapter(tmp_path)
    ours = dict(tuned.transformer.named_modules())
    theirs = dict(pipe.transformer.named_modules())
    name = "transformer_blocks.0.attn.to_q"
    assert ours[name].scaling["default"] == theirs[name].scaling["default_0"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (None, "is peft's, which keeps its strength in adapter_config.json"),
        ({"use_dora": True}, "says use_dora: True; expected plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4, which changes the base"),
        ({"peft_type": "LOHA"}, "peft_type: LOHA; expected LORA"),
        ({"r": 8}, "of rank 4 .*it says rank 8"),
        ({"lora_alpha": "much"}, "makes no sense for .* 'much'"),
        ({"lora_alpha": 0}, "alpha / rank is 0 in .*adapter_config.json; expected one positive number"),
        ({"lora_alpha": float("nan")}, "alpha / rank is nan in"),
        ({"alpha_pattern": {"(": 3}}, "makes no sense for"),
    ],
)
def test_a_strength_that_is_not_said_is_refused(
    tuned: FluxModel, tmp_path: Path, fields: dict[str, Any] | None, told: str
):
    peft(tmp_path, {name: value.detach().clone() for name, value in tuned.adapter().items()})
    (tmp_path / "adapter_config.json").unlink()
    if fields is not None:
        config(tmp_path, **fields)
    with pytest.raises(UserError, match=told) as error:
        tuned.load_adapter(tmp_path)
    assert "\n" not in str(error.value)


def test_two_strengths_are_refused(tuned: FluxModel, tmp_path: Path):
    state = {name: value.detach().clone() for name, value in tuned.adapter().items()}
    header = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})
    save_state(tmp_path, with_alpha(prefixed(state, "transformer.")), lora_adapter_metadata=header)
    with pytest.raises(UserError, match=r"alpha / rank is 2\.5 in transformer\..*\.alpha, 1 in the header of"):
        tuned.load_adapter(tmp_path)
    save_state(tmp_path, prefixed(state, "transformer."), ss_network_alpha="1", ss_network_dim="4")
    with pytest.raises(UserError, match=r"trained with alpha 1 and rank 4, but holds no \.alpha tensors"):
        tuned.load_adapter(tmp_path)


def test_kohyas_names_are_read_or_refused(tuned: FluxModel, tmp_path: Path):
    """diffusers' converter splits fused layers; some of them at FLUX.1's true width only, which it asserts."""
    layer, up = "lora_unet_double_blocks_0_img_attn_qkv", torch.randn(96, 4)
    pair = {f"{layer}.lora_down.weight": torch.ones(4, 32), f"{layer}.lora_up.weight": up}
    save_state(tmp_path, pair | {f"{layer}.alpha": torch.tensor(2.0)})
    tuned.load_adapter(tmp_path)
    key = "transformer_blocks.0.attn.to_k"
    found = tuned.adapter()[f"{key}.lora_B.weight"] @ tuned.adapter()[f"{key}.lora_A.weight"]
    assert torch.allclose(found, 0.5 * up[32:64] @ torch.ones(4, 32), atol=1e-5)

    narrow = {name.replace("double_blocks_0_img_attn_qkv", "single_blocks_0_linear1"): x for name, x in pair.items()}
    save_state(tmp_path, narrow)
    with pytest.raises(UserError, match="does not fit the model") as error:
        tuned.load_adapter(tmp_path)
    assert "\n" not in str(error.value)


def test_state_is_copied_in_place(tuned: FluxModel):
    """The optimizer holds the parameters, so loading EMA weights must not replace them."""
    parameters = tuned.adapter()
    tuned.load_adapter_state({name: torch.zeros_like(p) for name, p in parameters.items()})
    assert all(tuned.adapter()[name] is p and not p.any() for name, p in parameters.items())
    with pytest.raises(UserError, match=r"proj_out\.lora_B\.weight is in only one"):
        tuned.load_adapter_state({**parameters, "proj_out.lora_B.weight": torch.zeros(64, 4)})
    with pytest.raises(UserError, match=r"has shape \(2, 2\); expected \(4, 32\)"):
        tuned.load_adapter_state({**parameters, "transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 2)})


def test_adapters_that_do_not_fit_are_refused(tuned: FluxModel, tmp_path: Path):
    with pytest.raises(UserError, match="not found; expected a folder holding pytorch_lora_weights"):
        tuned.load_adapter(tmp_path / "nowhere")

    tuned.add_adapter(rank=4, alpha=10, targets="attention", seed=0)
    write_lora(tmp_path, tuned.adapter(), SHAPE, {})
    good = load_file(tmp_path / FILE)
    wrong = {
        "damaged": None,
        "text_encoder.x.lora_A": {**good, "text_encoder.x.lora_A.weight": torch.zeros(4, 4)},
        "does not fit the model": {
            name.replace("transformer_blocks.0", "transformer_blocks.7"): value for name, value in good.items()
        },
        "not DoRA": {**good, "transformer.x.dora_scale": torch.zeros(4)},
        "no tensor": {},
        "not DoRA, LoKr": {**good, "transformer.x.lokr_w1": torch.zeros(4)},
        "without the other matrix": {name: value for name, value in good.items() if "to_q.lora_B" not in name},
        "without the matrices it scales": {**good, "transformer.x.alpha": torch.tensor(1.0)},
        "values that are not finite": {name: value / 0 for name, value in good.items()},
        r"to_q.lora_A.weight is \(4, 16\), expected \(4, 32\)": {
            name: value[:, :16] if "to_q.lora_A" in name else value for name, value in good.items()
        },
    }
    for message, state in wrong.items():
        folder = tmp_path / fingerprint(message)
        folder.mkdir()
        if state is None:
            (folder / FILE).write_bytes(b"\0" * 40)
        else:
            save_file(
                {key: value.contiguous() for key, value in state.items()}, folder / FILE, metadata={"format": "pt"}
            )
        with pytest.raises(UserError, match=message) as error:
            tuned.load_adapter(folder)
        assert "\n" not in str(error.value)
