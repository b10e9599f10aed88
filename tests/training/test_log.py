import json
import sys
from pathlib import Path

import pytest

from gdro.common.errors import UserError
from gdro.training.log import DriftAlarm, MetricsLog, read_metrics, require_trackers


def test_a_resumed_log_is_cut_at_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, resumed=None) as log:
        log.write(0, {"reward": 0.5}, under="validation")
        for step in (1, 2, 3):
            log.write(step, {"loss": step / 3})
    with open(path, "ab") as file:
        file.write(b'{"step": 4, "lo')  # killed while writing
    with MetricsLog(path, resumed=2) as log:
        log.write(3, {"loss": 9.0})
    assert read_metrics(path) == [
        {"step": 0, "validation": {"reward": 0.5}},
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 3, "loss": 9.0},
    ]
    with MetricsLog(path, resumed=None):
        pass
    assert read_metrics(path) == []


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, resumed=None) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": step / 4})
    whole = path.read_text()
    first, second, third = whole.splitlines(keepends=True)
    for text, message in (
        (f"{first}rubbish\n{third}", r":2 is damaged"),
        (first + second.replace("0.5", "0.6") + third, r":2 is damaged; expected a row as gdro wrote it"),
        (first + third, r":2 is of step 3, the row before of 1; expected the next"),
        (first + second, r"holds 2 rows up to step 3, not 3"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"metrics\.jsonl{message}| is damaged or missing: it {message}"):
            MetricsLog(path, resumed=3, rows=3)
        assert path.read_text() == text
    path.write_text(whole)
    with MetricsLog(path, resumed=3, rows=3) as log:
        assert log.rows == 3


def test_a_missing_tracker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_trackers([])
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"train\.report_to: .*tensorboard"):
        require_trackers(["tensorboard"])


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path / "metrics.jsonl", resumed=None, report_to=["tensorboard"]) as log:
        log.write(1, {"loss": 0.25, "alarm": False})
        log.write(1, {"reward": 0.5}, under="validation")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/alarm", "validation/reward"}
    assert events.Scalars("train/loss")[0].value == 0.25


def test_the_alarm_needs_a_persistent_rise(capsys: pytest.CaptureFixture[str]) -> None:
    alarm = DriftAlarm(0.02)
    assert not any(alarm.update(step, 0.3 * (-1) ** step, 0.3 + 0.3 * (-1) ** step) for step in range(60))
    assert not any(alarm.update(60 + step, 0.0, 0.3) for step in range(20))
    states = [alarm.update(80 + step, 0.02, 0.32) for step in range(20)]
    assert not states[0]
    assert states[-1]
    calm = [alarm.update(100 + step, -0.01, 0.29) for step in range(20)]
    assert calm[0]
    assert not calm[-1]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("ALARM step ")
    assert "recovered" in said[1]


def test_the_alarm_survives_a_checkpoint() -> None:
    whole, first = DriftAlarm(0.02), DriftAlarm(0.02)
    figures = [(0.001 * step, 0.3) for step in range(40)]
    for step, pair in enumerate(figures[:15]):
        first.update(step, *pair)
    memory = json.loads(json.dumps({"window": list(first.window), "on": first.on}))
    resumed = DriftAlarm(0.02, **memory)
    expected = [whole.update(step, *pair) for step, pair in enumerate(figures)]
    assert [resumed.update(step, *pair) for step, pair in enumerate(figures[15:], 15)] == expected[15:]


def test_the_verdict_is_told_what_the_checkpoint_remembers() -> None:
    """Error .32 against the reference's .30 in every step of the window: 6.7 % above, so it is on."""
    alarm = DriftAlarm(0.02)
    for step in range(30):
        alarm.update(step, 0.02, 0.32)
    memory = json.loads(json.dumps({"window": list(alarm.window), "on": alarm.on}))
    assert DriftAlarm.state(memory, 30) == {"step": 30, "on": True, "excess": pytest.approx(0.02 / 0.30)}
    assert DriftAlarm.state({"window": [], "on": False}, 30) is None  # an objective without a best image
