"""Lines of files of prompts."""

from pathlib import Path

from gdro.common.prompts import Prompt, read_prompts, write_prompts


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    """JSON strings may hold U+2028, U+0085 and others that str.splitlines splits at."""
    prompts = [Prompt("a", "one\u2028line\x85of text", {"note": "\x0b\x1c"}), Prompt("b", "two")]
    write_prompts(tmp_path / "p.jsonl", prompts)
    assert read_prompts(tmp_path / "p.jsonl") == prompts
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n\r\ntwo\u2028\r\nthree\u2028four".encode())
    assert [(p.id, p.text) for p in read_prompts(tmp_path / "p.txt")] == [
        ("000001", "one"),
        ("000003", "two"),
        ("000004", "three\u2028four"),
    ]
