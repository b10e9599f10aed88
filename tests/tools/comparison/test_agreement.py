"""Runs that were made with another model, reward or judge are told of, not mixed."""

from pathlib import Path

import pytest

from gdro.common.errors import UserError
from gdro.common.sealed import write_record
from gdro.models import model_revision
from gdro.models.base import FlowModel
from gdro.runner.config import save_config, validate
from gdro.tools.comparison.agreement import MADE_WITH, check_agreement, made_with, recorded


def test_the_same_name_must_mean_the_same_everywhere() -> None:
    check_agreement([("a", {"model tiny": "1", "judge x": "1"}), ("b", {"model tiny": "1", "judge y": "2"})])
    records = [("a", {"judge x": "1"}), ("b", {"judge x": "1"}), ("c", {"judge x": "2"})]
    with pytest.raises(UserError, match="judge x is 1 in a and 1 more, but 2 in c; expected one version"):
        check_agreement(records)


def test_a_run_is_made_with_what_its_configuration_names(tmp_path: Path, flux: FlowModel, flux_folder: Path) -> None:
    data = {"model": str(flux_folder), "sample": {"prompts": "a"}, "evaluate": {"prompts": "b", "judge": None}}
    config = validate(data)
    assert model_revision(str(flux_folder)) == flux.revision
    known: dict[str, str] = {}
    versions = made_with(config, known)
    assert versions[f"model {flux_folder}"] == flux.revision
    assert set(versions) == {f"model {flux_folder}", "reward ocr"}
    assert known == versions

    assert recorded(tmp_path) == []
    write_record(tmp_path / MADE_WITH, versions)
    evaluation = {"revision": "other", "reward_version": versions["reward ocr"], "judge_version": None}
    write_record(tmp_path / "evaluation.json", evaluation)
    save_config(config, tmp_path)
    assert recorded(tmp_path)[0] == versions
    with pytest.raises(UserError, match=f"model {flux_folder} is"):
        check_agreement(("run", one) for one in recorded(tmp_path))
