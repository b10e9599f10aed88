"""Prompts included in gdro, by name: `gdro:TASK:SPLIT[:COUNT]`, e.g. `gdro:ocr:train`, and the tiny world's.

benchmarks/prompt_sets.py made the former. COUNT takes that many from the start, which are representative of the set.
"""

from pathlib import Path

from gdro.common.errors import UserError, did_you_mean
from gdro.common.prompts import Prompt, read_prompts

FOLDER = Path(__file__).parents[1] / "recipes" / "prompts"
ENDINGS = {"ocr": "txt", "geneval": "jsonl"}
SPLITS = ("train", "validation", "test")


def is_named(spec: str) -> bool:
    """Whether `spec` names prompts included in gdro rather than a file."""
    return spec.startswith(("gdro:", "tiny:"))


def load_prompts(spec: str | Path, field: str = "prompts") -> list[Prompt]:
    """Prompts from a .txt or .jsonl file, or included in gdro, by name; UserError names `field`."""
    try:
        return named_prompts(str(spec)) if is_named(str(spec)) else read_prompts(spec)
    except UserError as error:
        raise UserError(f"{field}: {str(error).removeprefix('prompts: ')}") from None


def named_prompts(spec: str) -> list[Prompt]:
    """The prompts for a name, the same on every call; UserError names the part of it that is wrong."""
    if not spec.startswith("gdro:"):
        from gdro.tiny.prompts import tiny_prompts

        return tiny_prompts(spec)
    parts = spec.split(":")
    if len(parts) not in (3, 4):
        raise UserError(f'prompts: "{spec}" is not a name; expected gdro:TASK:SPLIT[:COUNT], e.g. gdro:ocr:train')
    _, task, split, *rest = parts
    if task not in ENDINGS:
        raise UserError(f'prompts: "{spec}" names the task "{task}"{did_you_mean(task, ENDINGS)}')
    if split not in SPLITS:
        raise UserError(f'prompts: "{spec}" names the split "{split}"{did_you_mean(split, SPLITS)}')
    prompts = read_prompts(FOLDER / f"{task}_{split}.{ENDINGS[task]}")
    if not rest:
        return prompts
    most = str(len(prompts))
    if not (rest[0].isascii() and rest[0].isdecimal() and len(rest[0]) <= len(most) and 1 <= int(rest[0]) <= int(most)):
        raise UserError(f'prompts: "{spec}" asks for "{rest[0]}" prompts; expected 1 to {most}')
    return prompts[: int(rest[0])]
