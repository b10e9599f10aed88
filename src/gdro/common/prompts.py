"""Prompt records: a text, an id, and any fields a task or reward needs (GenEval's keys, the tiny scene)."""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdro.common.errors import UserError
from gdro.common.files import write_bytes
from gdro.common.reading import parse_json, read_lines
from gdro.common.validation import show


@dataclass(frozen=True)
class Prompt:
    """One prompt. `id` identifies it everywhere; two prompts may share a text but never an id."""

    id: str
    text: str
    fields: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"id": self.id, "prompt": self.text, **self.fields}, ensure_ascii=False)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts in a `.txt` (one per line, blank lines skipped) or `.jsonl` (`prompt`, optional `id`, any other keys).

    A prompt without an id gets its line number (`000001`). Raises UserError naming file and line.
    """
    path = Path(path)
    lines = read_lines(path, "a .txt or .jsonl file", f"prompts: {path}")
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prompts: {path} ends in {path.suffix!r}; expected .txt (one prompt per line) or .jsonl")
    prompts = []
    for number, line in lines:
        where = f"{path}:{number}"
        plain = path.suffix == ".txt"
        prompts.append(Prompt(f"{number:06d}", line.strip()) if plain else _parse_jsonl(line, where, number))
    if not prompts:
        raise UserError(f"prompts: {path} holds no prompts; expected at least one line")
    check_unique_ids(prompts, str(path))
    return prompts


def _parse_jsonl(line: str, where: str, number: int) -> Prompt:
    row = parse_json(line, f"prompts: {where}", "a JSON object")
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise UserError(f'prompts: {where} has no text in "prompt"; expected an object with a non-empty "prompt"')
    identity = row.pop("id", f"{number:06d}")
    if not isinstance(identity, str | int) or isinstance(identity, bool) or str(identity) == "":
        raise UserError(f'prompts: {where} has "id" {show(identity)}; expected a string')
    return Prompt(str(identity), row.pop("prompt"), row)


def same_text(text: str) -> str:
    """A form shared by texts that differ only in case, spacing or the encoding of accents.

    To a model they are one prompt: after training on one, none of them is held out, and together they count as one.
    """
    return unicodedata.normalize("NFC", " ".join(text.split()).casefold())


def check_unique_ids(prompts: Iterable[Prompt], where: str) -> None:
    """Raise UserError, naming `where`, if two prompts share an id."""
    seen: dict[str, str] = {}
    for prompt in prompts:
        if prompt.id in seen:
            raise UserError(f'prompts: {where} has two prompts with the id "{prompt.id}"; expected each id once')
        seen[prompt.id] = prompt.text


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write the prompts as .jsonl, atomically."""
    write_bytes(path, prompt_lines(prompts))


def prompt_lines(prompts: Sequence[Prompt]) -> bytes:
    """The contents of a .jsonl file with the prompts."""
    return "".join(p.to_json() + "\n" for p in prompts).encode()
