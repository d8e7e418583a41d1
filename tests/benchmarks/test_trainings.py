"""Trainings as processes: what is kept of those that end, fail and are stopped, and their order."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import trainings
from benchmarks.trainings import Training

# Stands for an example: `epochs` epochs, each after a wait, then what `end` says.
PROGRAM = """
import json, pathlib, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
log = pathlib.Path(given["--log"])
epochs = []
for epoch in range(int(given["--epochs"])):
    time.sleep(float(given["--wait"]))
    epochs.append({"epoch": epoch + 1})
    file = pathlib.Path(given["--json"])
    content = {"environment": {}, "runs": [{"epochs": epochs}]}
    file.with_suffix(".new").write_text(json.dumps(content))
    file.with_suffix(".new").rename(file)
    with log.open("a") as written:
        written.write(f"{given['--name']} {epoch + 1}\\n")
if "--end" in given:
    sys.exit(given["--end"])
"""


Made = tuple[Callable[..., Training], Path]


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Return what makes a training, and the file in which every epoch is a line."""
    (tmp_path / "stand_in.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"

    def make(name: str, epochs: int, wait: float = 0.0, kind: str = "", end: str = "") -> Training:
        arguments = ["--name", name, "--epochs", str(epochs), "--wait", str(wait)]
        arguments += ["--log", str(log), *(["--end", end] if end else [])]
        return Training(name, tuple(arguments), kind, "stand_in")

    return make, log


def test_what_ends_fails_and_is_stopped_is_kept(training: Made) -> None:
    make, _ = training
    runs: trainings.Runs = {"before": {"finished": True}}
    epochs_of_long: list[int] = []

    def note(runs: trainings.Runs) -> None:
        epochs_of_long.append(len(runs.get("long", {}).get("epochs", ())))

    todo = [make("before", 1), make("ends", 2), make("fails", 1, end="no memory")]
    todo += [make("long", 100, wait=0.2)]
    trainings.run(todo, runs, note, at_once=3, seconds=4)
    assert runs["before"] == {"finished": True}
    ends, fails, long = runs["ends"], runs["fails"], runs["long"]
    assert (ends["finished"], ends["failed"], len(ends["epochs"])) == (True, "", 2)
    assert not fails["finished"] and "no memory" in fails["failed"] and len(fails["epochs"]) == 1
    assert (long["finished"], long["failed"]) == (False, "")
    assert 1 <= len(long["epochs"]) < 100
    # Every epoch is noted when it is over: whoever ends the benchmark loses none.
    assert {1, 2} <= set(epochs_of_long)
    json.dumps(runs)


def test_others_of_a_kind_wait_for_the_first_epoch_of_the_first(training: Made) -> None:
    make, log = training
    todo = [make("first", 2, wait=0.5, kind="a"), make("second", 1, kind="a"), make("other", 1)]
    trainings.run(todo, {}, lambda _: None, at_once=3)
    lines = log.read_text().splitlines()
    assert lines.index("other 1") < lines.index("second 1")
    assert lines.index("first 1") < lines.index("second 1") < lines.index("first 2")


def test_nothing_is_left_running_when_it_is_interrupted(training: Made) -> None:
    make, log = training

    def interrupt(_: trainings.Runs) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainings.run([make("short", 1), make("long", 100, 0.1)], {}, interrupt, at_once=2)
    before = log.read_text()
    time.sleep(0.5)
    assert log.read_text() == before
