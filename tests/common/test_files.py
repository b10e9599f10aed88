"""What a kill leaves is never taken for a whole, and goes away."""

import shutil
from pathlib import Path

import pytest

from gdro.common.files import discard, remake, sweep
from gdro.runner.directory import alone


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


def test_a_run_directory_is_swept_when_it_is_taken(tmp_path: Path) -> None:
    """Of what kills left in it and in its own folders, and of nothing that others put there."""
    left = [
        ".config.yaml.tmp-12",
        "prompts/.train.jsonl.tmp-3",
        "adapter/raw/.pytorch_lora_weights.safetensors.tmp-7",
        "rewards/.ocr.parquet.tmp-9",
        "rewards/.ocr/.groups-00000.parquet.tmp-9",
        "rounds/0001/groups/.groups-00000.parquet.tmp-4",
        ".validation.deleted/step-000003/x",
    ]
    kept = [".lock", "rewards/.ocr/groups-00000.parquet", ".notes.tmp", ".photos.deleted/a", "photos/.a.png.tmp-1"]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    with alone(tmp_path):
        found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == set(kept)


def test_deleting_is_advised_only_where_gdro_left_its_mark(tmp_path: Path) -> None:
    from gdro.groups.importing import BEGUN
    from gdro.groups.sampling import STARTED
    from gdro.runner.config import KEPT

    path = tmp_path / "rounds" / "0001" / "groups" / "groups-00000.parquet"
    path.parent.mkdir(parents=True)
    assert remake(path, "go on") == ""
    for mark in (path.with_name(STARTED), path.with_name(BEGUN), tmp_path / KEPT):
        mark.write_text("")
        assert remake(path, "go on") == f": delete {path} and go on"
        mark.unlink()


def test_sweeping_leaves_what_is_whole(tmp_path: Path) -> None:
    for name in (".a.parquet.tmp-12", "a.parquet", ".hidden"):
        (tmp_path / name).write_text("")
    (tmp_path / ".step-000001.tmp").mkdir()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.parquet", ".hidden"}
