import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gdro.common.errors import UserError
from gdro.common.files import sweep
from gdro.training.checkpoint import (
    check_settings,
    find_checkpoint,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
    steps_saved,
)


def save(folder: Path, step: int, value: float = 0.0) -> Path:
    tensors = {"w": torch.full((2, 3), value)}
    settings = {"train.tau": 0.05}
    return save_checkpoint(
        folder, step, adapter=tensors, ema=tensors, optimizer=tensors, settings=settings, memory={"best": None}
    )


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save(tmp_path, 7, value=1 / 3))
    assert (checkpoint.step, checkpoint.settings, checkpoint.memory) == (7, {"train.tau": 0.05}, {"best": None})
    assert torch.equal(checkpoint.ema["w"], torch.full((2, 3), 1 / 3))
    assert {path.suffix for path in checkpoint.path.iterdir()} == {".safetensors", ".json"}


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 7, value=1.0)
    assert load_checkpoint(save(tmp_path, 7, value=2.0)).adapter["w"].unique().tolist() == [2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


def test_a_full_disk_leaves_the_old_checkpoints_and_nothing_else(tmp_path: Path, monkeypatch: Any) -> None:
    save(tmp_path, 7, value=1.0)
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "ema" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    for step in (7, 8):
        with pytest.raises(UserError, match=r"ema\.safetensors could not be written: No space left"):
            save(tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]
    assert load_checkpoint(tmp_path / "step-000007").adapter["w"].unique().tolist() == [1.0]


@pytest.mark.parametrize("name", ["adapter.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, 7) / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-2] if damage == "truncated" else b"\xff" + data[1:])
    with pytest.raises(UserError, match=f"train.resume_from_checkpoint: .*step-000007/{name} (is damaged|not found)"):
        find_checkpoint(tmp_path, "latest", 100)


def test_what_gdro_did_not_make_is_never_to_be_deleted(tmp_path: Path) -> None:
    """Somebody's LoRA, another trainer's checkpoint; of a damaged checkpoint outside of a run nothing is advised."""
    for name, file in (
        ("my-lora", "pytorch_lora_weights.safetensors"),
        ("checkpoint-500", "optimizer.safetensors"),
        ("step-000005", "adapter_model.safetensors"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"weights")
        with pytest.raises(
            UserError, match=rf"resume_from_checkpoint: .*{name} is not a gdro checkpoint; expected"
        ) as e:
            find_checkpoint(tmp_path / "checkpoints", str(tmp_path / name), 100)
        assert "delete" not in str(e.value)

    path = save(tmp_path / "run" / "checkpoints", 7)
    (path / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"ema.safetensors is damaged .*; expected a whole checkpoint$"):
        load_checkpoint(path)
    (tmp_path / "run" / ".config.yaml").write_text("")
    with pytest.raises(UserError, match=rf"expected a whole checkpoint: delete {path} and resume from an earlier one$"):
        load_checkpoint(path)


def test_which_checkpoint_is_resumed(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "latest", 100) is None
    assert find_checkpoint(tmp_path, None, 100) is None
    first, _ = save(tmp_path, 9), save(tmp_path, 10)
    (tmp_path / ".step-000011.tmp").mkdir()
    latest, chosen = find_checkpoint(tmp_path, "latest", 100), find_checkpoint(tmp_path, str(first), 100)
    assert latest is not None
    assert chosen is not None
    assert (latest.step, chosen.step) == (10, 9)
    with pytest.raises(UserError, match=r"resume_from_checkpoint: null, but .* holds step-000010"):
        find_checkpoint(tmp_path, None, 100)
    with pytest.raises(UserError, match=r"max_train_steps: 5, but .*step-000010 is past it"):
        find_checkpoint(tmp_path, "latest", 5)
    with pytest.raises(UserError, match=r"resume_from_checkpoint: elsewhere not found"):
        find_checkpoint(tmp_path, "elsewhere", 100)


def test_changed_settings_are_named_with_both_values(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save(tmp_path, 7))
    check_settings(checkpoint, {"train.tau": 0.05}, frozenset())
    check_settings(checkpoint, {"train.tau": 0.5}, frozenset({"train.tau"}))
    with pytest.raises(UserError, match=r"^train\.tau: 0\.5, but .*step-000007 was made with 0\.05"):
        check_settings(checkpoint, {"train.tau": 0.5}, frozenset())


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, 1, [1, 2, 3, 4]), (2, None, [3, 4]), (2, 1, [1, 4]), (1, 2, [2, 4]), (2, 4, [3, 4])],
)
def test_the_limit_never_deletes_the_best_or_the_latest(
    tmp_path: Path, limit: int | None, best: int | None, left: list[int]
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, limit=limit, needed={best})
    assert steps_saved(tmp_path) == left


def test_leftovers_of_a_kill_are_swept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".step-000002.tmp", ".step-000000.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter.safetensors").write_bytes(b"half")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("fused", [False, True])
def test_restored_adamw_goes_on_bit_for_bit(tmp_path: Path, fused: bool) -> None:
    def adamw(values: dict[str, torch.Tensor]) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
        parameters = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
        return parameters, torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.01, fused=fused)

    def go(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    parameters, optimizer = adamw({"b/x": torch.zeros(3, 5), "a": torch.ones(7)})
    go(parameters, optimizer, range(4))
    saved = optimizer_tensors(optimizer, list(parameters))
    path = save_checkpoint(tmp_path, 4, adapter=parameters, ema={}, optimizer=saved, settings={}, memory={})
    go(parameters, optimizer, range(4, 9))

    checkpoint = load_checkpoint(path)
    resumed, optimizer = adamw({name: checkpoint.adapter[name] for name in parameters})
    load_optimizer(optimizer, list(resumed), checkpoint.optimizer)
    go(resumed, optimizer, range(4, 9))
    assert all(torch.equal(resumed[name], parameters[name]) for name in parameters)


def test_state_is_plain_json(tmp_path: Path) -> None:
    assert json.loads((save(tmp_path, 3) / "state.json").read_text())["step"] == 3
