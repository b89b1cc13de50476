from __future__ import annotations

import copy
import functools
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from optcpu.compare import Comparison, Row, _notes_on_noise, compare
from optcpu.errors import WorkerError
from tests.optcpu.measure.conftest import LIMITS

X = torch.randn(32, 64)
Y = torch.randint(0, 10, (32,))
pytestmark = pytest.mark.usefixtures("known_limits")

QUICK: dict[str, Any] = {"rounds": 2, "round_seconds": 0.02, "progress": False}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class Stale(nn.Module):
    """In BF16 it computes with the weights of its first pass for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return self.linear(x)  # type: ignore[no-any-return]
        weight = self.linear.weight
        if self.kept is None:
            self.kept = weight.detach().clone()
        return x @ (self.kept + weight - weight.detach()).T + self.linear.bias


@pytest.fixture(scope="module")
def measured(known_limits: None) -> Comparison:
    torch.manual_seed(0)
    return compare(
        mlp(),
        [(X, Y), (X + 1, Y)],
        steps=20,
        optimizer=sgd,
        variants=["eager-bf16", "eager-bf16-tuned"],
        name="small",
        **QUICK,
    )


class TestFigures:
    def test_every_variant_has_them(self, measured: Comparison) -> None:
        names = [row.variant for row in measured.rows]
        assert names == ["eager-fp32", "eager-bf16", "eager-bf16-tuned"]
        for row in measured.rows:
            assert row.failed is None
            assert row.learned
            assert len(row.rounds_ms) == 2
            assert row.step_ms is not None
            assert row.units_per_second == pytest.approx(32e3 / row.step_ms)
            assert len(row.losses) == 20
            assert row.peak_memory_mb is not None
            assert row.memory_growth_mb is not None
            assert 0 < row.memory_growth_mb < row.peak_memory_mb

    def test_speedups_are_relative_to_their_bases(self, measured: Comparison) -> None:
        assert measured["eager-fp32"].speedup_vs_eager == 1.0
        assert measured[measured.best_stock].speedup_vs_best_stock == 1.0

    def test_errors_are_those_of_bf16(self, measured: Comparison) -> None:
        row = measured["eager-bf16"]
        for error in (row.output_error, row.gradient_error, row.worst_gradient_error):
            assert error is not None
            assert 1e-4 < error < 0.2
        assert row.worst_gradient in {"0.weight", "0.bias", "2.weight", "2.bias"}
        assert measured["eager-fp32"].gradient_error == 0.0

    def test_all_start_from_the_same_state(self, measured: Comparison) -> None:
        firsts = [row.losses[0] for row in measured.rows]
        assert firsts[1] == firsts[2]
        assert firsts[1] == pytest.approx(firsts[0], rel=1e-2)

    def test_it_is_told_that_these_rounds_are_short(self, measured: Comparison) -> None:
        assert any("too few or too short" in note for note in measured.notes)
        assert "small" in str(measured)


def test_losses_are_those_of_a_plain_loop() -> None:
    model, batches = mlp(), [(X, Y), (X + 1, Y)]
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4, fused=True)
    expected = []
    for step in range(3):
        optimizer.zero_grad()
        total = 0.0
        for x, y in (batches[(2 * step) % 2], batches[(2 * step + 1) % 2]):
            loss = nn.functional.cross_entropy(twin(x), y)
            (loss / 2).backward()
            total += loss.item() / 2
        optimizer.step()
        expected.append(total)
    found = compare(model, batches, steps=3, accumulation_steps=2, variants=["eager-fp32"], **QUICK)
    assert found.rows[0].losses == pytest.approx(expected, rel=1e-5)
    row = found.rows[0]
    assert row.step_ms is not None
    assert row.units_per_second == pytest.approx(64e3 / row.step_ms)


def test_nothing_of_the_callers_is_changed() -> None:
    model = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10), nn.Dropout(0.5)).eval()
    model(X).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradient = model[0].weight.grad
    assert gradient is not None
    kept, random_state = gradient.clone(), torch.get_rng_state()
    found = compare(model, (X, Y), steps=2, variants=["eager-fp32"], **QUICK)
    assert not any(module.training for module in model.modules())
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, kept)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert any("dropout off" in note for note in found.notes)


@pytest.mark.slow
def test_speed_without_learning_is_flagged() -> None:
    found = compare(Stale(), (X, Y), steps=60, optimizer=sgd, variants=["eager-bf16"], **QUICK)
    row = found["eager-bf16"]
    assert not row.learned
    assert "did not learn as eager-fp32 did: its loss went from" in row.notes[0]
    assert found.best_stock == "eager-fp32"


def test_batches_of_other_shapes_and_keywords() -> None:
    class Named(nn.Linear):
        def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    batches = [({"x": X}, Y), ({"x": X[:8]}, Y[:8])]
    found = compare(Named(64, 10), batches, steps=4, unit="rows", variants=["eager-fp32"], **QUICK)
    assert any("2 different shapes" in note for note in found.notes)
    row = found.rows[0]
    assert row.step_ms is not None
    assert row.units_per_second == pytest.approx(20e3 / row.step_ms)
    assert "rows/s" in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"rounds": 1.5}, "rounds must be a whole number"),
        ({"accumulation_steps": -1}, "accumulation_steps must be"),
        ({"units_per_batch": 0}, "units_per_batch must be"),
        ({"threads": 0}, "threads must be"),
        ({"round_seconds": 0.0}, "round_seconds must be positive"),
        ({"round_seconds": "1"}, "round_seconds must be positive and finite.* not '1'"),
        ({"precision": "fp16"}, "precision must be 'auto', 'bf16' or 'fp32', not 'fp16'"),
        ({"cold": "no"}, "cold must be True or False, not 'no'"),
        ({"variants": ["optcpus"]}, "Did you mean 'optcpu'"),
    ],
)
def test_options_are_checked_before_anything_starts(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ValueError, match=message):
        compare(mlp(), (X, Y), **options)


def test_a_bad_batch_is_met_before_any_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ValueError, match=r"model\(float32\[32, 65\]\) failed"):
        compare(mlp(), (torch.randn(32, 65), Y), progress=False)


@pytest.mark.parametrize("position", [0, 1])
def test_a_wrong_class_is_met_before_any_worker_starts(
    position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    batches = [(X, Y), (X, Y)]
    batches[position] = (X, torch.full_like(Y, 10))
    model = nn.Sequential(mlp(), nn.Dropout(0.5))
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"has class 10, but the output has 10 classes, 0 to 9"):
        compare(model, batches, progress=False)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_rounds_that_differ_much_are_told() -> None:
    steady = Row("eager-fp32", "stock", step_ms=10.0, step_ms_spread=(9.0, 12.0))
    failed = Row("ipex", "peer", failed="RuntimeError: no")
    busy = Row("optcpu", "optcpu", step_ms=10.0, step_ms_spread=(9.0, 27.0))
    assert _notes_on_noise([steady, failed]) == []
    assert "Rounds of optcpu differ by a factor of 3.0" in _notes_on_noise([steady, busy])[0]


class FailsInWorkers(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if os.getpid() != int(os.environ["OPTCPU_TEST_HOME"]):
            raise RuntimeError("only at home")
        return super().forward(x)


def test_a_reference_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTCPU_TEST_HOME", str(os.getpid()))
    with pytest.raises(WorkerError, match="eager-fp32 failed: RuntimeError: only at home"):
        compare(FailsInWorkers(64, 10), (X, Y), variants=["eager-fp32"], **QUICK)


SCRIPT = """
    import torch
    from torch import nn
    from optcpu.compare import compare

    if __name__ != "__main__":
        raise SystemExit("the script was run again")
    import time as json, torch as sys  # names that the worker itself uses
    SCALE = 2.0

    def scaled(x):
        return SCALE * x

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            return torch.relu(scaled(self.linear(x)))

    comparison = compare(
        nn.Sequential(Block(), nn.Linear(16, 3)),
        (torch.randn(8, 16), torch.randint(0, 3, (8,))),
        loss=lambda output, batch: scaled(nn.functional.cross_entropy(output, batch[1])),
        steps=STEPS, rounds=1, round_seconds=0.01, variants=VARIANTS,
    )
    print([row.failed for row in comparison.rows], [row.notes for row in comparison.rows])
"""


def script(folder: Path, variants: list[str], steps: int = 2) -> list[str]:
    source = textwrap.dedent(SCRIPT)
    source = source.replace("VARIANTS", repr(variants)).replace("STEPS", str(steps))
    (folder / "script.py").write_text(source)
    return [sys.executable, str(folder / "script.py")]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder)}


def test_the_ideal_step_is_that_of_the_model(measured: Comparison) -> None:
    """Two products backward for the second layer, one for the first; SGD has no state."""
    ideal = measured.ideal
    first, second = 2 * 32 * 64 * 128, 2 * 32 * 128 * 10
    assert ideal.flops == measured.accumulation_steps * (2 * first + 3 * second)
    assert ideal.peak == LIMITS.peak(ideal.dtype)
    assert ideal.update_bytes == {"fp32": 4, "bf16": 2}[ideal.dtype] * 3 * measured.parameters
    row = measured["eager-fp32"]
    assert row.step_ms is not None
    assert row.of_ideal == pytest.approx(ideal.step_ms / row.step_ms)


@pytest.mark.slow
def test_a_step_of_optcpu_is_broken_down(measured: Comparison) -> None:
    comparison = compare(mlp(), (X, Y), variants=["optcpu"], steps=4, optimizer=sgd, **QUICK)
    found = comparison.breakdown
    assert found is not None
    assert found.variant == "optcpu"
    shares = {share.kind: share for share in found.shares}
    assert {"products", "update", "generated", "python"} <= shares.keys()
    assert shares["products"].ideal_ms == pytest.approx(comparison.ideal.product_ms)
    assert shares["update"].ideal_ms == pytest.approx(comparison.ideal.update_ms)
    assert sum(piece.calls for piece in shares["products"].pieces) == 5, (
        "two forward, three backward"
    )
    assert "a step of optcpu, profiled" in str(comparison)
    assert measured.breakdown is None, "nothing of optcpu ran there"


@pytest.mark.slow
def test_a_script_needs_no_guard_and_shows_progress_as_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        script(tmp_path, ["eager-fp32"]),
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        check=True,
    )
    assert done.stdout == "[None] [[]]\n"
    lines = [line.removeprefix("optcpu compare: ") for line in done.stderr.splitlines()]
    before, after = ["checking the model", "measuring this machine"], "measuring this machine again"
    # What a process does at the moment is told where it takes long, as on a busy machine.
    steps = [line for line in lines if not line.startswith("eager-fp32: ")]
    assert steps == [*before, "eager-fp32", "warm-up", "round 1/1", after]


@pytest.mark.slow
def test_what_a_script_defines_can_be_compiled(tmp_path: Path) -> None:
    done = subprocess.run(
        script(tmp_path, ["compiled-fp32", "optcpu"]),
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        check=True,
    )
    assert done.stdout == "[None, None, None] [[], [], []]\n"


def test_an_interrupt_ends_every_worker_and_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        script(tmp_path, ["eager-bf16"], steps=10**7),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
        # A shell's background jobs, CI's among them, ignore the signal, and so would their children.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        workers: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while not workers and time.monotonic() < deadline:
            time.sleep(0.1)
            workers = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert workers
    assert "KeyboardInterrupt" in told
    assert not any(worker.is_running() for worker in workers)
    assert list(tmp_path.glob("optcpu-compare-*")) == []


def test_the_folder_is_in_the_systems_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError):
        compare(mlp(), (X, Y), variants=["eager-fp32"], **QUICK)
