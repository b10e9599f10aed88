"""A judge's answer after its thoughts: removal of thoughts and reading of numbers, shared by all parsers of replies.

Pure functions of the text; None means unreadable, which is a missing score and never a guess.
"""

import re

NUMBER = r"(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)"
"""A plain decimal, as in 3, 3.5, 5. and .5: no sign, exponent, decimal comma or leading zero."""
_THOUGHT = r"think|thinks|thinking|thoughts?|reasoning|reflection|scratchpad"  # the answer comes after it
_NOTE = r"analysis|reasons?|explanation|rationale|critique"  # the answer is outside it
_MARK = re.compile(
    rf"[<◁]\|?\s?(?P<close>/|end_of_)?\s?(?:begin_of_|seed:)?(?:(?P<thought>{_THOUGHT})|(?P<note>{_NOTE}))\b"
    r"[^<>◁▷]*[>▷]|\[(?P<close_bracket>/)?think\]",
    re.IGNORECASE,
)
_DRESS = " \t*_`\"'$()[]"  # around a number
_SCALE = re.compile(rf"[\s(]*(?:/|out\s+of\b)\s*({NUMBER})")
_GOES_ON = re.compile(  # if this follows, the text before it is not a complete number
    r"[\w/:^+]|\s*%|[\s*_]{0,9}(?:[-–—~,.;|/+]|to\b|or\b|and\b)?[\s*_]{0,9}\.?[0-9]"
)


def answer(reply: str) -> str | None:
    """The reply without thoughts and notes, or the contents of its last `<answer>`; None if one of them never ends.

    Thoughts (`<think>`, `<thinking>`, `[THINK]`, ...) are removed with everything before their end, because some
    servers omit the opening tag. Notes (`<analysis>`, ...) are removed alone.
    """
    marks = [mark for mark in _MARK.finditer(reply) if not mark[0].endswith("/>")]
    thoughts = [mark for mark in marks if not mark["note"]]
    ends = [mark.end() for mark in thoughts if mark["close"] or mark["close_bracket"]]
    place = max(ends, default=0)
    if any(mark.start() >= place for mark in thoughts):
        return None
    kept: list[str] = []
    begun: str | None = None
    for mark in marks:
        if mark.start() < place or not mark["note"]:
            continue
        name = mark["note"].lower()
        if begun is None and not mark["close"]:
            kept.append(reply[place : mark.start()])
            begun = name
        elif begun is None:  # a note without its opening tag
            kept.clear()
            place = mark.end()
        elif mark["close"] and name == begun:
            begun, place = None, mark.end()
    if begun is not None:
        return None
    said = re.sub(r"<\|(?:begin|end)_of_box\|>", "", "".join([*kept, reply[place:]]))
    pieces = re.split(r"<(/?)answer>", said, flags=re.IGNORECASE)  # text, "" or "/", text, ...
    closed = [i for i in range(1, len(pieces) - 2, 2) if not pieces[i] and pieces[i + 2]]
    return pieces[closed[-1] + 1] if closed else said


def labeled(label: str, said: str, low: float, high: float) -> float | None:
    """The number after the last `label:` (a regular expression), on its line or alone on the next.

    `3.5/5` and `3.5 out of 5` are 3.5 if `high` is 5. None if there is no such line, if it has no number or more than
    one (`4-5`, `4,5`), uses another scale, or has a value outside [low, high].
    """
    lines = list(re.finditer(rf"(?<![\w-]){label}[\s*_`]*[:：]", said, re.IGNORECASE))
    if not lines:
        return None
    first, *others = said[lines[-1].end() :].splitlines() or [""]
    alone = not first.strip(_DRESS)
    line = first if not alone else next((other for other in others if other.strip()), "")
    found = re.match(NUMBER, line := line.lstrip(_DRESS))
    if found is None:
        return None
    rest = line[found.end() :].lstrip("*_`\"'$)]")
    if scale := _SCALE.match(rest):
        if float(scale[1]) != high:
            return None
        rest = rest[scale.end() :].lstrip(_DRESS)
    if _GOES_ON.match(rest) or (alone and rest.strip(_DRESS + ".")):
        return None
    value = float(found[0])
    return value if low <= value <= high else None


def listed(text: str) -> list[float] | None:
    """Numbers (or True and False) separated by commas, with or without brackets or a trailing comma; None otherwise."""
    inside = text.strip(" \t\r\n*_`")
    if (inside[:1], inside[-1:]) in {("[", "]"), ("(", ")")}:
        inside = inside[1:-1]
    items = [item.strip() for item in inside.split(",")]
    if len(items) > 1 and not items[-1]:
        items.pop()
    truth = {"True": 1.0, "False": 0.0}
    if not all(item in truth or re.fullmatch(NUMBER, item) for item in items):
        return None
    return [truth[item] if item in truth else float(item) for item in items]
