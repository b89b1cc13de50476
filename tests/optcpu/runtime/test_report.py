"""What is told of each step, and how long the run will still take."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training import Losses, logged_rows, small_data, small_trainer

from optcpu.runtime.clock import Clock
from optcpu.runtime.finish import Finisher
from optcpu.runtime.plan import Plan
from optcpu.runtime.report import Reporter


def _reporter(
    steps_made: int,
    *,
    validates: bool = False,
    processes: int = 1,
    improved: int = 0,
    **given: Any,
) -> Reporter:
    """Of a run of 40 steps of 2 s, four to an epoch; a validation takes 3 s, a checkpoint 5.

    Four validations have been, ``improved`` of which were the best so far.
    """
    options = small_trainer(**given).options
    clock = Clock()
    for phase, seconds in (("step", 2.0), ("validation", 3.0), ("checkpoint", 5.0)):
        clock.add(phase, seconds)
    clock.counts["validation"] = 4
    plan = Plan.of(16, options.accumulation_steps, options.epochs, options.steps)
    position = SimpleNamespace(step=steps_made, epoch=steps_made // 4, improved=improved)
    world = SimpleNamespace(size=processes)
    run: Any = SimpleNamespace(plan=plan, position=position, clock=clock, world=world)
    nobody: Any = None
    return Reporter(run, options, nobody, None, validates=validates, trainer=None)


def test_time_left_counts_the_validations_of_all_epochs() -> None:
    """Of a run that is counted in steps, four to an epoch."""
    for made, epochs in ((0, 10), (32, 2), (39, 1)):
        seconds = _reporter(made, steps=40, validates=True)._seconds_left()
        assert seconds == (40 - made) * 2 + epochs * 3


@pytest.mark.parametrize(
    ("given", "saves"),
    [
        ({"steps": 40}, 10),  # a tenth of the run between them
        ({"steps": 40, "checkpoints": {"every_steps": 3}}, 14),
        ({"epochs": 10}, 10),
    ],
)
def test_time_left_counts_checkpoints(given: dict[str, Any], saves: int, tmp_path: Any) -> None:
    checkpoints = {"folder": str(tmp_path), **given.pop("checkpoints", {})}
    seconds = _reporter(0, checkpoints=checkpoints, **given)._seconds_left()
    assert seconds == 40 * 2 + saves * 5


@pytest.mark.parametrize(("improved", "saves"), [(0, 2), (1, 5), (4, 20)])
def test_time_left_counts_the_best_checkpoints_as_they_came(
    improved: int, saves: int, tmp_path: Any
) -> None:
    given: dict[str, Any] = {"steps": 40, "validate_every": 2, "validation_data": small_data()}
    given["checkpoints"] = {"folder": str(tmp_path), "every_steps": 20, "best": "loss"}
    reporter = _reporter(0, validates=True, improved=improved, **given)
    assert reporter._seconds_left() == 40 * 2 + 20 * 3 + saves * 5


@pytest.mark.parametrize("given", [{"steps": 40, "validate_every": 3}, {"epochs": 10}])
def test_behind_the_last_step_its_validation_and_checkpoint_are_left(
    given: dict[str, Any], tmp_path: Any
) -> None:
    checkpoints = {"folder": str(tmp_path), "every_steps": 7}
    given = {"validation_data": small_data(), "checkpoints": checkpoints, **given}
    assert _reporter(40, validates=True, **given)._seconds_left() == 3 + 5


@pytest.mark.parametrize(
    ("local_steps", "meetings"),
    [
        (None, 40),
        (4, 10),
        (16, 3),
    ],
)
def test_time_left_counts_what_waits_for_a_meeting_once(
    local_steps: int | None, meetings: int
) -> None:
    """Of two processes, with a validation due after every step."""
    given: dict[str, Any] = {"steps": 40, "validate_every": 1, "validation_data": small_data()}
    if local_steps is not None:
        given["local_steps"] = local_steps
    seconds = _reporter(0, validates=True, processes=2, **given)._seconds_left()
    assert seconds == 40 * 2 + meetings * 3


def test_the_end_of_a_run_has_a_row(tmp_path: Path) -> None:
    losses = Losses()
    log = {"folder": tmp_path, "every_steps": 3}
    small_trainer(epochs=2, log=log, max_grad_norm=1.0, callbacks=[losses]).train()
    end = logged_rows(tmp_path)[-1]
    assert end.keys() == {"step", "epoch", "phase", "loss", "lr", "grad_norm"}
    assert (end["step"], end["phase"]) == (4, "train")
    assert end["loss"] == pytest.approx(losses.losses[3])


@pytest.mark.parametrize("every_steps", [2, 3, 10])
def test_a_run_that_is_made_longer_has_the_rows_of_a_long_one(
    tmp_path: Path, every_steps: int
) -> None:
    def train(name: str, epochs: int) -> None:
        log = {"folder": tmp_path / name / "log", "every_steps": every_steps}
        checkpoints = tmp_path / name / "checkpoints"
        small_trainer(epochs=epochs, log=log, checkpoints=checkpoints).train()

    train("long", 5)
    for epochs in (1, 2, 2, 5, 5):  # an ended one that is started again tells nothing twice
        train("longer", epochs)
        steps = [row["step"] for row in logged_rows(tmp_path / "longer" / "log")]
        assert steps == sorted({*range(every_steps, 2 * epochs + 1, every_steps), 2 * epochs})
    assert logged_rows(tmp_path / "longer" / "log") == logged_rows(tmp_path / "long" / "log")


def test_the_last_row_has_its_rate_where_a_kill_came_between_the_last_step_and_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Finisher) -> None:
        raise KeyboardInterrupt

    settings = {"log": tmp_path / "log", "checkpoints": tmp_path / "checkpoints"}
    trainer = small_trainer(**settings)
    with monkeypatch.context() as patch:
        patch.setattr(Finisher, "end", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    small_trainer(**settings).train()
    *_, last = (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(last)
    assert row["step"] == 4
    assert row["samples_per_second"] > 0
