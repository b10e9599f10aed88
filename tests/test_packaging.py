"""What is distributed: the wheel holds the package's data, the source distribution what the tests read."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[1]
FOLDERS = ("src/gdro", "tests", "benchmarks", "docs", "configs")
FILES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"),
    *("pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", "constraints-lowest.txt"),
)
BUILD = "import setuptools.build_meta as build; print(build.build_sdist('dist')); print(build.build_wheel('dist'))"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_left_out(tmp_path: Path) -> None:
    """Built from a copy, which then also holds what building leaves."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / "copy")
    there, package = files(tmp_path / "copy"), files(tmp_path / "copy" / "src")
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path / "copy", check=True, capture_output=True)
    (source,), (wheel,) = ((tmp_path / "copy" / "dist").glob(ending) for ending in ("*.tar.gz", "*.whl"))
    with tarfile.open(source) as archive:
        assert there <= {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        assert package == {name for name in archive.namelist() if ".dist-info/" not in name}
