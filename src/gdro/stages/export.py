"""Export the adapter (EMA and raw) in the format that plain diffusers reads, with a model card."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel

from gdro.common.errors import UserError
from gdro.common.files import atomic_path, write_bytes
from gdro.common.progress import interval
from gdro.common.sealed import find_record
from gdro.common.yaml import dump_yaml
from gdro.groups.store import GroupStore
from gdro.models.loading import family as family_of
from gdro.models.lora import write_lora
from gdro.training.checkpoint import Checkpoint, checkpoint_path, load_checkpoint, steps_saved

GALLERY = 4
LICENSES = {"tiny": "apache-2.0", "black-forest-labs/FLUX.1-schnell": "apache-2.0"}


def export(config: BaseModel, run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write `pytorch_lora_weights.safetensors` (EMA), `raw/pytorch_lora_weights.safetensors` and README.md to `out`.

    `config` is the `gdro.RunConfig` of the run in the folder `run_dir`. `out` is returned; it defaults to
    `run_dir`/adapter. The weights are those of the checkpoint with the best corrected score, or the last one if none
    was validated or train.export is "last". Raises UserError if the run has no checkpoint or a damaged one.
    """
    run_dir = Path(run_dir)
    out = run_dir / "adapter" if out is None else Path(out)
    settings = config.model_dump(mode="json")
    train = settings["train"]
    checkpoint = chosen(run_dir / "checkpoints", train["export"])
    lora = {"r": train["rank"], "lora_alpha": train["lora_alpha"]}
    about = {"model": settings["model"], "objective": train["objective"]["name"], "step": checkpoint.step}
    write_lora(out, checkpoint.ema, lora, about | {"weights": "ema"})
    write_lora(out / "raw", checkpoint.adapter, lora, about | {"weights": "raw"})
    card = model_card(
        settings,
        checkpoint.step,
        find_record(run_dir / "summary.json"),
        _gallery(run_dir, out / "images"),
    )
    write_bytes(out / "README.md", card.encode())
    return out


def chosen(checkpoints: Path, which: str) -> Checkpoint:
    """The checkpoint to export: the "best" or the "last"."""
    saved = steps_saved(checkpoints)
    if not saved:
        raise UserError(f"{checkpoints} holds no checkpoints; expected step-*/ written by `gdro train`")
    last = load_checkpoint(checkpoint_path(checkpoints, saved[-1]))
    best = last.memory["best"] if which == "best" else None
    return last if best is None else load_checkpoint(checkpoint_path(checkpoints, best["step"]))


def _gallery(run_dir: Path, folder: Path) -> list[tuple[str, str]]:
    """(prompt, file name) of image pairs, base left and tuned right, from the same noise; [] before evaluation."""
    if not (run_dir / "evaluation.json").exists():
        return []
    base, tuned = (GroupStore(run_dir / "evaluation" / name) for name in ("base", "tuned"))
    pairs = []
    for i, group in enumerate(base.group_ids[:GALLERY]):
        left, right = base.images(group)[0], tuned.images(group)[0]
        width, height = left.size
        pair = Image.new("RGB", (2 * width + 4, height), "white")
        pair.paste(left, (0, 0))
        pair.paste(right, (width + 4, 0))
        zoom = max(1, 512 // pair.width)
        pair = pair.resize((zoom * pair.width, zoom * pair.height), Image.Resampling.NEAREST)
        with atomic_path(folder / f"pair-{i}.png") as tmp:
            pair.save(tmp, format="PNG")
        pairs.append((base.prompt(group).text, f"pair-{i}.png"))
    return pairs


def model_card(
    config: Mapping[str, Any], step: int, summary: Mapping[str, Any] | None, gallery: Sequence[tuple[str, str]]
) -> str:
    """README.md of the adapter in the Hub's format: front matter, results if evaluated, gallery, usage."""
    model, train, family = config["model"], config["train"], family_of(config["model"])
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) is not None
    head: dict[str, Any] = {"base_model": model} if on_hub else {}
    head |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": LICENSES.get(model, "other"),
        "tags": ["text-to-image", "diffusers", "lora", _tag(family), "gdro"],
    }
    objective = dict(train["objective"])
    name = objective.pop("name")
    shown = {"k": train["k"], **objective, "learning_rate": train["learning_rate"], "rank": train["rank"]}
    settings = ", ".join(f"{field} {value}" for field, value in shown.items() if value is not None)
    rounds = (
        "offline"
        if config["rounds"]["train_steps"] is None
        else f"in rounds of {config['rounds']['train_steps']} steps"
    )
    parts = [
        f"---\n{dump_yaml(head)}---",
        f"# LoRA for {_plain(model)}, post-trained with gdro",
        f"Trained {rounds} on scored groups of its own images ({name}; {settings}), {step} steps. "
        f"Reward: {_code(str(config['score']['reward']))}.",
    ]
    if model not in LICENSES:
        parts.append("The license of the base model applies.")
    if summary is not None:
        parts += ["## Held-out prompts", _figures(summary)]
    if gallery:
        lines = [f"![{_plain(prompt)}](images/{name})\n\n*{_plain(prompt)}*" for prompt, name in gallery]
        parts += ["## Base (left) and tuned (right), same noise", "\n\n".join(lines)]
    parts += ["## Use", _usage(config, family)]
    return "\n\n".join(parts) + "\n"


def _figures(summary: Mapping[str, Any]) -> str:
    rows = ["| | base | tuned | gain | 95 % interval |", "|---|---|---|---|---|"]
    for name in ("reward", "corrected"):
        s = summary[name]
        if s["base"] is None:  # no judge
            continue
        rows.append(
            f"| {name} | {s['base']:.4f} | {s['tuned']:.4f} | {s['gain']:+.4f} | {interval(s['ci95'], digits=4)} |"
        )
    for axis, base in summary["judge"]["base"].items():
        tuned = summary["judge"]["tuned"][axis]
        if base is not None:
            rows.append(f"| {axis} (1-5) | {base:.3f} | {tuned:.3f} | {tuned - base:+.3f} | |")
    return "\n".join([summary["verdict"]["headline"], "", *rows])


def _tag(family: type) -> str:
    """The family's Hub tag, from its module's name, e.g. qwen-image."""
    return family.__module__.rpartition(".")[2].replace("_", "-")


def _usage(config: Mapping[str, Any], family: Any) -> str:
    model, sample = config["model"], config["sample"]
    guidance = [f"    {name}={value!r},\n" for name, value in family.call_arguments(sample["guidance_scale"]).items()]
    source = "str(gdro.models.loading.TINY_FOLDER)" if model == "tiny" else repr(model)
    imports = "import gdro.tiny\nimport torch" if model == "tiny" else "import torch"
    return f"""```python
{imports}
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({source}, torch_dtype=torch.{"float32" if model == "tiny" else "bfloat16"})
pipe.load_lora_weights("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")
image = pipe(
    prompt="your prompt",
    num_inference_steps={config["evaluate"]["num_inference_steps"]},
{"".join(guidance)}    max_sequence_length={sample["max_sequence_length"]},
    height={sample["height"]},
    width={sample["width"]},
).images[0]
```

The file in this folder holds the moving average (EMA) of the weights; `raw/` holds the chosen
checkpoint's own weights without EMA."""


def _plain(text: str) -> str:
    """A user's text as one line of literal Markdown: no heading, no HTML, no emphasis."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _code(text: str) -> str:
    """The text as one line of code, in a fence longer than any in the text."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if fence == "`" else f"{fence} {line} {fence}"
