"""Every component of every family: missing, partial or of another kind is one line before any work."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from small_pipelines import PARTS as PARTS_OF_TURNS
from small_pipelines import PIPELINES, TURNS

from gdro.common.errors import UserError
from gdro.models import check_model, load_model, model_revision, text_seen

CPU = torch.device("cpu")
NAMES = [*PIPELINES, "tiny"]
Folders = Callable[[str], Path]
INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
PARTS = {  # by the classes' own names, as a pipeline's folder names them
    "flux": {"tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"},
    "tiny": {"tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"},
    "sd3": {f"{kind}{i}" for kind in ("tokenizer", "text_encoder") for i in ("", "_2", "_3")},
    **{name: {"tokenizer", "text_encoder"} for name in ("qwen-image", "z-image", "flux2", "flux2-klein")},
}
CHAT = ("z-image", "flux2", "flux2-klein")
BPE = ("qwen-image", *CHAT)
VAE_FIELDS = {
    "qwen-image": ("latents_mean", "latents_std"),
    "flux2": ("batch_norm_eps",),
    "flux2-klein": ("batch_norm_eps",),
}


@dataclass(frozen=True)
class Damage:
    """What is done to a family's folder, and what must be said of it after `model: FOLDER: `."""

    name: str
    do: Callable[[Path], None]
    said: str


def remove(*files: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        for file in files:
            shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()

    return do


def write(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


def edit(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return do


def fields(file: str, **values: Any) -> Callable[[Path], None]:
    return edit(file, lambda content: content.update(values))


def fp16(part: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (path,) = (folder / part).glob("*.safetensors")
        path.rename(path.with_suffix(".fp16.safetensors"))

    return do


def split(part: str) -> Callable[[Path], None]:
    """The vocabulary in vocab.json and merges.txt, as CLIP's and Qwen's are published, the latter not there."""

    def do(folder: Path) -> None:
        content = json.loads((folder / part / "tokenizer.json").read_text())["model"]
        (folder / part / "vocab.json").write_text(json.dumps(content["vocab"]))
        (folder / part / "tokenizer.json").unlink()

    return do


def unmerged(part: str) -> Callable[[Path], None]:
    """A vocabulary with words that no merge makes."""

    def change(content: dict[str, Any]) -> None:
        vocab, merges = content["model"]["vocab"], content["model"]["merges"]
        del merges[len(merges) // 2 :]
        if not merges:
            for token in list(vocab)[10:20]:
                vocab[f"{token}word"] = vocab.pop(token)

    return edit(f"{part}/tokenizer.json", change)


def unknown(content: dict[str, Any]) -> None:
    """A vocabulary of the right size that knows no letter."""
    if content["model"]["type"] == "Unigram":
        pieces = content["model"]["vocab"]
        content["model"]["vocab"] = [
            p if p[0].startswith("<") else [chr(0x4E00 + i), p[1]] for i, p in enumerate(pieces)
        ]
    else:
        vocab = content["model"]["vocab"]
        content["model"]["vocab"] = {t if t.startswith("<") else chr(0x4E00 + i): i for t, i in vocab.items()}
        content["model"]["merges"] = []


def damages(name: str) -> Iterator[Damage]:
    for part in sorted({"scheduler", "transformer", "vae", *PARTS[name]}):
        for found in (None, [None, None]):
            yield Damage(
                f"{part}-{found}", fields(INDEX, **{part: found}), rf"{INDEX} has {part} (null|\[null, null\]); "
            )
        yield Damage(f"{part}-unnamed", edit(INDEX, lambda c, part=part: c.pop(part)), f"{INDEX} has {part} null; ")
    for part in sorted({"transformer", "vae", *PARTS[name]} - {p for p in PARTS[name] if p.startswith("tok")}):
        stem = "diffusion_pytorch_model" if part in ("transformer", "vae") else "model"
        weights = f"{part}/{stem}.safetensors"
        yield Damage(f"{part}-folder", remove(part), f"{part}/config.json not found; expected what the .* is made of")
        yield Damage(f"{part}-weights", remove(weights), f"{weights} not found; expected it, or ")
        yield Damage(f"{part}-fp16", fp16(part), rf"{weights} not found, only {stem}\.fp16\.safetensors \(variant fp16")
        key = "_class_name" if part in ("transformer", "vae") else "model_type"
        yield Damage(
            f"{part}-other", fields(f"{part}/config.json", **{key: "other"}), f'config.json has {key} "other"; '
        )
        nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        stored = fields(f"{part}/config.json", quantization_config=nf4)
        yield Damage(
            f"{part}-nf4", stored, f"{part}/config.json says .* stored with bitsandbytes, which is not installed"
        )
        deep = write(f"{part}/config.json", "[" * 100_000)
        yield Damage(f"{part}-json", deep, f"{part}/config.json is not JSON ")
    for field in VAE_FIELDS.get(name, ("scaling_factor", "shift_factor")):
        for value in (None, "0.3", float("nan")):
            null = fields("vae/config.json", **{field: value})
            yield Damage(f"vae-{field}-{value}", null, f"vae/config.json has {field} ")
    for part in sorted(p for p in PARTS[name] if p.startswith("tok")):
        file, settings = f"{part}/tokenizer.json", f"{part}/tokenizer_config.json"
        yield Damage(f"{part}-folder", remove(part), f"{settings} not found")
        yield Damage(f"{part}-settings", remove(settings), f"{settings} not found; expected what the .* is made of")
        yield Damage(f"{part}-vocabulary", remove(file), f"{file} not found; expected tokenizer.json, spiece.model")
        yield Damage(f"{part}-torn", write(file, "{"), f"{part} cannot be loaded ")
        yield Damage(f"{part}-unknown", edit(file, unknown), f"{part}: ")
        if part == "tokenizer" and name in ("flux", "tiny", "sd3"):
            yield Damage(
                f"{part}-longest", fields(settings, model_max_length=512), f"{part}: model_max_length is 512; "
            )
        if name in BPE or part == "tokenizer":
            yield Damage(f"{part}-merges", split(part), f"{part}/merges.txt not found; expected ")
            yield Damage(f"{part}-unmerged", unmerged(part), f"{part}: .* tokens, such as .*, have no merge")
    if name in CHAT:
        template = "tokenizer/chat_template.jinja"
        yield Damage("no-template", remove(template), "tokenizer cannot be loaded .*chat_template")
        yield Damage("template-of-nothing", write(template, ""), "the chat template leaves the prompt out")
        others = write(template, "<|im_star|>" + (TURNS if name != "flux2" else PARTS_OF_TURNS))
        yield Damage("template-of-others", others, r"<\|im_star\|> is not a token")
    yield Damage("scheduler-folder", remove("scheduler"), f"{SCHEDULER} not found")
    ddim = DDIMScheduler().save_pretrained
    yield Damage(
        "ddim",
        lambda folder: ddim(folder / "scheduler"),
        f"{SCHEDULER} is of a DDIMScheduler; expected a FlowMatchEulerDiscreteScheduler",
    )
    named = fields(INDEX, scheduler=["diffusers", "DDIMScheduler"])
    yield Damage("ddim-by-name", named, f"{INDEX} has a DDIMScheduler as scheduler; ")
    for field in ("shift", "num_train_timesteps"):
        without = edit(SCHEDULER, lambda c, field=field: c.pop(field))
        yield Damage(f"scheduler-{field}", without, f"{SCHEDULER} has {field} null; ")
    for field in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
        without = fields(SCHEDULER, use_dynamic_shifting=True, **{field: None})
        yield Damage(f"scheduler-{field}", without, f"{SCHEDULER} has {field} null; ")
    yield Damage("scheduler-zero", fields(SCHEDULER, shift=0), f"{SCHEDULER} has shift 0; expected a number above 0")
    yield Damage(
        "scheduler-strange", fields(SCHEDULER, beta_start=0.1), f"{SCHEDULER} has beta_start, which diffusers "
    )
    for field in ("stochastic_sampling", "invert_sigmas"):
        yield Damage(field, fields(SCHEDULER, **{field: True}), f"{SCHEDULER} has {field} true; ")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_whole_is_refused_before_anything_is_loaded(folders: Folders, name: str, tmp_path: Path):
    whole = folders(name)
    check_model(str(whole))
    accepted = []
    for i, damage in enumerate(damages(name)):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder, copy_function=shutil.copyfile)
        damage.do(folder)
        try:
            check_model(str(folder))
            accepted.append(damage.name)
        except UserError as error:
            said = str(error)
            assert "\n" not in said
            assert re.match(f"model: {folder}: .*{damage.said}", said), (damage.name, said)
        shutil.rmtree(folder)
    assert accepted == []


def test_a_vocabulary_in_two_files_is_the_same(folders: Folders, tmp_path: Path):
    """As FLUX.1's CLIP tokenizer is published."""
    folder = tmp_path / "two"
    shutil.copytree(folders("tiny"), folder, copy_function=shutil.copyfile)
    content = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    (folder / "tokenizer/vocab.json").write_text(json.dumps(content["vocab"]))
    merges = "".join(" ".join(pair) + "\n" for pair in content["merges"])
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n" + merges)
    (folder / "tokenizer/tokenizer.json").unlink()
    two, one = (load_model(str(f), device=CPU, dtype=torch.float32) for f in (folder, folders("tiny")))
    text = ['a red wall with a sign that says "OPEN"']
    assert torch.equal(
        two.encode_text(text, 24)["pooled_prompt_embeds"], one.encode_text(text, 24)["pooled_prompt_embeds"]
    )


def poison(folder: Path, part: str, value: float = float("nan")) -> str:
    """Put a number that is none into a tensor of component `part`; its name."""
    (path,) = (folder / part).glob("*.safetensors")
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = max(name for name, tensor in state.items() if tensor.ndim > 1)
    state[name].view(-1)[-1] = value
    save_file(state, path, metadata={"format": "pt"})
    return name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nan_in_weights_is_named_when_they_are_loaded(folders: Folders, name: str, tmp_path: Path):
    """Of text encoders that is when they are first used; transformer and VAE are loaded at once."""
    networks = ["transformer", "vae", *sorted(part for part in PARTS[name] if part.startswith("text"))]
    for part, value in zip(networks, (float("nan"), float("inf"), *[float("nan")] * 3), strict=False):
        folder = tmp_path / part
        shutil.copytree(folders(name), folder, copy_function=shutil.copyfile)
        tensor = poison(folder, part, value).split(".")[-2:]  # the language models' names have another beginning
        with pytest.raises(UserError, match=rf"^model: {folder}: {part}: .*{'.'.join(tensor)} holds NaN or infinity; "):
            load_model(str(folder), device=CPU, dtype=torch.bfloat16).encode_text(["a red wall"], 24)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_revision_is_of_every_file_that_is_used(folders: Folders, name: str, tmp_path: Path):
    """A digest that a rename and any byte changes, that an unused file does not, and that is the loaded model's."""
    folder = tmp_path / "model"
    shutil.copytree(folders(name), folder, copy_function=shutil.copyfile)
    before = model_revision(str(folder))
    assert re.fullmatch("sha256:[0-9a-f]{16}", before)
    assert (
        before
        == model_revision(str(folders(name)))
        == load_model(str(folder), device=CPU, dtype=torch.float32).revision
    )
    unused = {"text_encoder/generation_config.json", "pretraining.json"}
    files = [p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in unused]
    assert {path.parent.name for path in files} == {"model", "scheduler", "transformer", "vae", *PARTS[name]}
    for path in files:
        data = path.read_bytes()
        space = data.replace(b"{", b"{ ", 1) if path.suffix != ".jinja" else data + b" "
        path.write_bytes(space)  # the header of safetensors begins with a brace, too
        assert model_revision(str(folder)) != before, path
        path.write_bytes(data)
    for extra in (
        "README.md",
        "vae/README.md",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/model.fp16.safetensors",
    ):
        (folder / extra).write_text("x")
    assert model_revision(str(folder)) == before


def test_a_component_replaced_before_it_is_loaded_is_refused(folders: Folders, tmp_path: Path):
    """Its text encoders are loaded when first used, under a revision that was found at the start."""
    folder = tmp_path / "model"
    shutil.copytree(folders("flux"), folder, copy_function=shutil.copyfile)
    model = load_model(str(folder), device=CPU, dtype=torch.float32)
    poison(folder, "text_encoder_2", 0.0)
    with pytest.raises(UserError, match="the files of text_encoder_2 have changed since the start"):
        model.encode_text(["a red wall"], 24)
    with pytest.raises(UserError, match="the files of text_encoder_2 have changed since the start"):
        _ = model.revision


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_of_a_prompt_is_all_that_its_text_is_made_of(folders: Folders, name: str):
    """Prompts that are alike in it are alike to the model, and a prompt unlike in its last letter is not."""
    model = load_model(str(folders(name)), device=CPU, dtype=torch.float32)
    length = 20
    prompts = ["two dots", "abcdefg " * 8 + "the end", '"' + "x" * 60]
    short, words, quoted = text_seen(str(folders(name)), prompts, length)
    assert short is None
    assert text_seen(str(folders(name)), prompts, 200) == [None, None, None]
    assert text_seen(str(folders(name)), [], 200) == []
    for prompt, read in zip(prompts[1:], (words, quoted), strict=True):
        assert read is not None
        assert prompt.startswith(read)
        assert 5 < len(read) < len(prompt)
        other, unlike = read + "zzz" * 30, read[:-1] + ("q" if read[-1] != "q" else "p") + prompt[len(read) :]
        start = -length if name == "sd3" else 0  # before it are CLIP's tokens, of which there are 48
        first, second, third = model.encode_text([prompt, other, unlike], length)["prompt_embeds"][:, start:]
        assert torch.allclose(first, second, atol=1e-5)
        assert not torch.allclose(first, third, atol=1e-3)
