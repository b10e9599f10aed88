"""What a kill leaves is never taken for a whole, and goes away."""

import shutil
from pathlib import Path

import pytest

from gdro.files import discard, sweep


def test_a_folder_half_deleted_is_gone_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "base"
    remove = shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "a").unlink()
            raise KeyboardInterrupt
        remove(path, ignore_errors)

    for again in (discard, lambda _: sweep(tmp_path)):
        folder.mkdir()
        for name in "ab":
            (folder / name).write_text("")
        monkeypatch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            discard(folder)
        monkeypatch.undo()
        assert not folder.exists()
        assert list(tmp_path.iterdir())
        again(folder)
        assert not list(tmp_path.iterdir())


def test_sweeping_leaves_what_is_whole(tmp_path: Path) -> None:
    for name in (".a.parquet.tmp-12", "a.parquet", ".hidden"):
        (tmp_path / name).write_text("")
    (tmp_path / ".step-000001.tmp").mkdir()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.parquet", ".hidden"}
