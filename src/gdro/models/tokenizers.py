"""Checks that tokenizers are those the model was trained with, and how much of a prompt reaches its text encoder."""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import transformers

from gdro.models.components import Components, is_tokenizer

_WHOLE = ("tokenizer.json", "spiece.model", "tokenizer.model")  # each contains a vocabulary
_PAIR = ("vocab.json", "merges.txt")  # or both of these
_LEAST = 0.9  # of the text encoder's vocabulary; published models pad theirs by up to 0.3 %
_PLAIN = "a photo of a red wall with two dots"
_MARK = "\ue000"  # stands for a prompt in its family's template
_SPECIAL = re.compile(r"<\|\w+\|>|\[/?[A-Z_]+\]")  # such as <|im_start|> and [INST]
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def check(components: Components) -> None:
    """Raise UserError unless every tokenizer of the model is complete and matches its text encoder."""
    for part, kind in components.kinds.items():
        if is_tokenizer(kind):
            load(components, part)


def load(components: Components, part: str) -> Any:
    """Tokenizer `part` of a model; UserError naming its file if it is incomplete or not its text encoder's."""
    components.path(f"{part}/tokenizer_config.json")
    if not any(components.has(f"{part}/{file}") for file in _WHOLE):
        found = [file for file in _PAIR if components.has(f"{part}/{file}")]
        if len(found) < len(_PAIR):
            missing = next((file for file in _PAIR if found and file not in found), _WHOLE[0])
            raise components.error(
                f"{part}/{missing} not found; expected {', '.join(_WHOLE)}, or {' and '.join(_PAIR)}"
            )
    return _load(components, part, components.stamp(part))


@lru_cache(maxsize=16)
def _load(components: Components, part: str, stamp: Any) -> Any:
    """Read and checked once per process, while its files are unchanged since `stamp`."""
    where = {"pretrained_model_name_or_path": components.source, "revision": components.commit}
    encoder = part.replace("tokenizer", "text_encoder")
    with components.refusing(part):
        tokenizer = components.kinds[part].from_pretrained(**where, subfolder=part)
    with components.refusing(encoder):
        config = components.kinds[encoder].config_class.from_pretrained(**where, subfolder=encoder).get_text_config()
    with components.refusing(part):
        for wrong in _faults(components.family, tokenizer, config):
            raise components.error(f"{part}: {wrong}")
    return tokenizer


def _faults(family: Any, tokenizer: Any, config: Any) -> Iterable[str]:
    """Signs that a tokenizer was built from too few files or from another model's."""
    size = len(tokenizer)
    if not _LEAST * config.vocab_size <= size <= config.vocab_size:
        yield f"the vocabulary has {size} tokens; expected nearly the {config.vocab_size} of its text encoder"
    lost = _unreachable(tokenizer)
    if lost:
        yield f"{len(lost)} of {size} tokens, such as {json.dumps(lost[0])}, have no merge; expected all of merges.txt"
    if tokenizer.pad_token_id is None:
        yield "there is no padding token; expected tokenizer_config.json to name it"
    ids = tokenizer(_PLAIN, add_special_tokens=False).input_ids
    if len(ids) < 2 or 2 * sum(i == tokenizer.unk_token_id for i in ids) > len(ids):
        yield f"{json.dumps(_PLAIN)} has no words in the vocabulary; expected that of the model"
    if issubclass(type(tokenizer), transformers.CLIPTokenizer):
        longest, places = tokenizer.model_max_length, config.max_position_embeddings
        if longest > places:
            yield f"model_max_length is {longest}; expected tokenizer_config.json to say at most {places}"
        return
    template = family.written(tokenizer, _MARK)
    if template.count(_MARK) != 1:
        yield "the chat template leaves the prompt out; expected the model's own"
    for special in _SPECIAL.findall(template):
        if len(tokenizer(special, add_special_tokens=False).input_ids) != 1:
            yield f"{special} is not a token; expected tokenizer_config.json to add it"
    before = tokenizer(template.partition(_MARK)[0], add_special_tokens=False).input_ids
    if family.dropped() not in (0, len(before)):
        yield f"the template's {family.dropped()} first tokens are {len(before)}; expected the model's tokenizer"


def _unreachable(tokenizer: Any) -> list[str]:
    """Tokens longer than a character that no byte-pair merge makes; empty if there are few, or for other tokenizers."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE" or model.get("ignore_merges"):
        return []
    end = model.get("end_of_word_suffix") or ""
    made = {"".join(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    lost = [
        token
        for token in model["vocab"]
        if len(token.removesuffix(end)) > 1 and token not in made and token not in added and not _BYTE.fullmatch(token)
    ]
    return lost if len(lost) > len(model["vocab"]) / 100 else []


def text_seen(family: Any, tokenizer: Any, prompts: Sequence[str], max_sequence_length: int) -> list[str | None]:
    """The part of each prompt that its text encoder reads at this length; None if all of it."""
    if not prompts:  # tokenizers do not accept that
        return []
    before, after = (len(side) for side in family.written(tokenizer, _MARK).split(_MARK))
    written = [family.written(tokenizer, prompt) for prompt in prompts]
    how = {"add_special_tokens": family.special_tokens, "return_offsets_mapping": True}
    whole = tokenizer(written, **how).offset_mapping
    kept = tokenizer(written, **how, truncation=True, max_length=family.dropped() + max_sequence_length).offset_mapping
    found: list[str | None] = []
    for text, spans, read in zip(written, whole, kept, strict=True):
        last = len(text) - after
        start, end = (min(last, _reach(tokens)) for tokens in (read, spans))
        found.append(None if start == end else text[before:start])
    return found


def _reach(spans: Sequence[tuple[int, int]]) -> int:
    """The end of the last character that a token covers."""
    return max((end for _, end in spans), default=0)
