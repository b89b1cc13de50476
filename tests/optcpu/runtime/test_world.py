"""Several processes that train together, started by torchrun."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training import small_trainer

import optcpu
from optcpu.errors import OptcpuError
from optcpu.optim.formats import Format
from optcpu.optim.storing import store_weights
from optcpu.runtime.world import World

HERE = Path(__file__).parent

SCRIPT = """
import json, os, sys
import torch
sys.path.insert(0, os.environ["TRAINING"])
from training import Losses, small_data, small_model, small_trainer

class Dying(Losses):
    def on_step_end(self, trainer, metrics):
        super().on_step_end(trainer, metrics)
        dies = os.environ["DIES"] in ("all", os.environ.get("RANK"))
        if dies and len(self.losses) == 3:
            os.kill(os.getpid(), 9)
        if len(self.losses) == int(os.environ.get("STOPS", 0)):
            trainer.stop()

if "HASTE" in os.environ:
    from optcpu.runtime import loop
    loop._PATIENCE_S = 0.0
torch.set_num_threads(1)
torch.manual_seed(int(os.environ.get("RANK", 0)) if "APART" in os.environ else 0)
given = json.loads(sys.argv[1])
losses = Dying()
data = small_data(64)
if "UNEVEN" in os.environ:
    samples = data

    class Uneven(torch.utils.data.IterableDataset):
        def __iter__(self):
            rank = int(os.environ.get("RANK", 0))
            return iter([samples[i] for i in range(rank, 29 - rank, 2)])

    data = Uneven()
if "ENDS" in os.environ:
    samples = data

    class Ends(torch.utils.data.Dataset):  # as where a signal to the group ends the loading processes, too
        fetches = 0

        def __len__(self):
            return len(samples)

        def __getitem__(self, index):
            self.fetches += 1
            if os.environ.get("RANK") == "1" and self.fetches == int(os.environ["ENDS"]):
                os.kill(os.getpid(), 15)
                raise RuntimeError("DataLoader worker exited unexpectedly")
            return samples[index]

    sampler = torch.utils.data.DistributedSampler(Ends(), 2, int(os.environ["RANK"]))
    data = torch.utils.data.DataLoader(Ends(), batch_size=4, sampler=sampler)
if "SIGNALS" in os.environ:
    samples = data

    class Signals(torch.utils.data.Dataset):  # the n-th fetch of one process is when it is told to end
        fetches = 0

        def __len__(self):
            return len(samples)

        def __getitem__(self, index):
            self.fetches += 1
            if os.environ.get("RANK") == "1" and self.fetches == int(os.environ["SIGNALS"]):
                os.kill(os.getpid(), 15)
            return samples[index]

    data = Signals()
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

class Steep(torch.nn.Module):  # a gradient that is no number, where the loss is one
    calls = 0

    def forward(self, x):
        self.calls += 1
        steep = os.environ.get("RANK") == "1" and self.calls == 3
        return x + (x * 0).sum().sqrt() if steep else x

if "STEEP" in os.environ:
    model.append(Steep())

class Centred(torch.nn.Module):  # with running statistics, of the samples of one process
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.3)
        return x - self.mean

if "CENTRED" in os.environ:
    model.append(Centred())
if "VALIDATES" in os.environ:
    given["validation_data"] = small_data(20, seed=2)
trainer = small_trainer(model, data, callbacks=[losses], threads=1, **given)
result = trainer.train()
if "TWICE" in os.environ:
    given["epochs"] += 1
    result = small_trainer(model, data, callbacks=[losses], threads=1, **given).train()
weights = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
out = {"losses": losses.losses, "weights": weights, "bytes": trainer._world.bytes_sent,
       "steps": result.steps, "samples": result.samples, "metrics": result.metrics,
       "trained": [p.requires_grad for p in model.parameters()]}
with open(f"{sys.argv[2]}-{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump(out, file)
"""


def _run(
    tmp_path: Path, processes: int, name: str = "out", dies: int | str | None = None, **given: Any
) -> tuple[list[dict[str, Any]], str]:
    """What each process gives, and what they printed."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else [])]
    done = subprocess.run(
        [*command, str(script), json.dumps(given), str(tmp_path / name)],
        env={**os.environ, "TRAINING": str(HERE), "DIES": str(dies), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if dies is None:
        assert done.returncode == 0, done.stderr
    results = [tmp_path / f"{name}-{rank}.json" for rank in range(processes)]
    return [json.loads(path.read_text()) for path in results if path.exists()], done.stderr


def test_one_process_needs_nothing() -> None:
    world = World()
    assert world.sum_numbers(1.0, 2.0) == (1.0, 2.0)
    assert world.gather({"a": 1}) == [{"a": 1}]
    tensor = torch.ones(2)
    world.average([tensor])
    assert tensor.tolist() == [1, 1]
    assert world.bytes_sent == 0


def test_a_lost_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(tensor: torch.Tensor) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4242\nand more")

    monkeypatch.setattr(torch.distributed, "all_reduce", lost)
    told = r"process 0 of 2 cannot .* \(Connection closed by peer .*4242\).* from the newest checkpoint"
    with pytest.raises(OptcpuError, match=told):
        World(0, 2).sum_numbers(1.0)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients are FP32 anyway")
@pytest.mark.parametrize("mine", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("theirs", [torch.bfloat16, torch.float32])
def test_gradients_have_the_same_dtype_in_all_processes(
    mine: torch.dtype | None, theirs: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would differ by rounding, and in what they send at a time."""
    model = torch.nn.Linear(3, 2, bias=False)
    store_weights(model, model.parameters(), Format.SPLIT)
    if mine is not None:
        model.weight.grad = torch.ones(2, 3, dtype=mine)
    other = [torch.tensor([[1.0, theirs == torch.float32]]), torch.ones(6)]

    def all_reduce(tensor: torch.Tensor) -> None:
        tensor += other.pop(0)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    World(0, 2).sum_gradients(model.parameters())
    assert model.weight.grad.dtype == (torch.float32 if mine == torch.float32 else theirs)
    assert model.weight.grad.tolist() == [[1.0 if mine is None else 2.0] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_no_gradient_loses_bits_or_parts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    numbers = torch.tensor([1 + 2**-40, 2.0, 3.0], dtype=torch.float64).to(dtype)
    numbers = numbers * (1 + 2j) if dtype.is_complex else numbers
    parameter.grad = numbers.clone()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    World(0, 2).sum_gradients([parameter])
    assert torch.equal(parameter.grad, 2 * numbers)


def test_weights_of_every_kind_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for integers, which are not trained."""
    count = torch.nn.Parameter(torch.tensor([2**24 + 1]), requires_grad=False)
    weights = [torch.tensor([1 + 2**-40], dtype=torch.float64), torch.tensor([1 + 2j])]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(4))
    World(0, 2).average([count, *weights])
    assert count.tolist() == [2**24 + 1]
    assert weights[0].tolist() == [2 + 2**-39]
    assert weights[1].tolist() == [2 + 4j]


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint32, torch.float8_e4m3fn, torch.bool])
def test_buffers_of_every_dtype_are_shared(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broadcast(tensor: torch.Tensor, src: int) -> None:
        assert tensor.dtype == torch.uint8  # which can be sent
        tensor.copy_(torch.ones(3, 2).to(dtype).t().contiguous().view(torch.uint8).reshape(-1))

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    buffer = torch.zeros(3, 2).to(dtype).t()
    World(1, 2).share_from_first([buffer, torch.empty(0)])
    assert (buffer.to(torch.float32) == 1).all()


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_global_batch(tmp_path: Path) -> None:
    given: dict[str, Any] = {"epochs": 3, "optimizer": "sgd", "validation_data": None}
    (alone,), _ = _run(tmp_path, 1, "one", batch_size=8, accumulation_steps=3, **given)
    both, _ = _run(tmp_path, 2, "two", batch_size=4, accumulation_steps=3, **given)
    assert both[0]["losses"] == both[1]["losses"]
    assert both[0]["weights"] == both[1]["weights"]
    assert both[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert both[0]["weights"] == pytest.approx(alone["weights"], rel=1e-4, abs=1e-6)
    compressed, _ = _run(
        tmp_path, 2, "bf16", batch_size=4, accumulation_steps=3, compress_gradients=True, **given
    )
    assert compressed[0]["bytes"] * 2 == both[0]["bytes"]
    assert compressed[0]["losses"] == pytest.approx(alone["losses"], rel=0.02)


@pytest.mark.slow
def test_a_lost_process_ends_the_job_and_the_checkpoint_goes_on_with_one(tmp_path: Path) -> None:
    given: dict[str, Any] = {"epochs": 3, "optimizer": "sgd", "accumulation_steps": 1}
    (alone,), _ = _run(tmp_path, 1, "one", batch_size=8, **given)
    checkpoints = {"folder": str(tmp_path / "checkpoints"), "every_steps": 2}
    results, _ = _run(tmp_path, 2, "two", dies=1, batch_size=4, checkpoints=checkpoints, **given)
    assert results == []
    (resumed,), _ = _run(tmp_path, 1, "on", batch_size=8, checkpoints=checkpoints, **given)
    assert resumed["steps"] == alone["steps"]
    assert resumed["losses"] == pytest.approx(alone["losses"][-len(resumed["losses"]) :], rel=1e-4)
    assert resumed["weights"] == pytest.approx(alone["weights"], rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_what_one_process_learnt_alone_is_no_checkpoint(tmp_path: Path) -> None:
    """Where each makes steps by itself, the regular one has what all have."""
    given: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 4,
        "accumulation_steps": 1,
        "local_steps": 2,
    }
    runs = {}
    for name, dies in (("whole", None), ("on", 1), ("on", None)):
        checkpoints = {"folder": str(tmp_path / name), "every_steps": 2}
        runs[name], _ = _run(tmp_path, 2, name, dies=dies, checkpoints=checkpoints, **given)
    assert runs["on"][0]["weights"] == runs["whole"][0]["weights"]


@pytest.mark.slow
def test_an_epoch_ends_for_all_where_one_has_no_data_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 15 and 14 samples in batches of 7 there are three and two."""
    monkeypatch.setenv("UNEVEN", "1")
    given: dict[str, Any] = {"epochs": 2, "accumulation_steps": 1}
    checkpoints = {"folder": str(tmp_path / "checkpoints"), "every_steps": 3}
    both, _ = _run(tmp_path, 2, "out", batch_size=7, checkpoints=checkpoints, **given)
    assert [one["steps"] for one in both] == [4, 4]
    assert both[0]["weights"] == both[1]["weights"]


@pytest.mark.slow
def test_all_processes_freeze_the_same_at_the_same_step(tmp_path: Path) -> None:
    given: dict[str, Any] = {"epochs": 3, "optimizer": "sgd", "accumulation_steps": 1}
    freezing = {"window": 3, "patience": 1, "percentile": 100.0}
    usual, _ = _run(tmp_path, 2, "usual", batch_size=4, **given)
    (alone,), _ = _run(tmp_path, 1, "one", batch_size=8, freezing=freezing, **given)
    both, _ = _run(tmp_path, 2, "two", batch_size=4, freezing=freezing, **given)
    assert both[0]["trained"] == both[1]["trained"] == [False, False, True, True]
    assert both[0]["weights"] == both[1]["weights"]
    assert both[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert both[0]["weights"] == pytest.approx(alone["weights"], rel=1e-4, abs=1e-6)
    assert both[0]["bytes"] < usual[0]["bytes"]


LEAVES = """
import atexit
import torch.distributed as dist

atexit.register(lambda: print("joined" if dist.is_initialized() else "left"))
from optcpu.runtime.world import World

World.join().sum_numbers(1.0)
if {leaves_itself}:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("leaves_itself", [False, True])
def test_a_process_leaves_the_others_before_python_ends(leaves_itself: bool) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", LEAVES.format(leaves_itself=leaves_itself)],
        env={**os.environ, **ranks},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


@pytest.mark.slow
def test_processes_that_were_made_apart_begin_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lookahead's slow weights are what the weights were when it was made."""
    monkeypatch.setenv("APART", "1")
    lookahead = {"name": "adamw", "lr": 0.05, "lookahead": {"k": 2}}
    both, _ = _run(tmp_path, 2, lr=None, optimizer=lookahead, epochs=2, batch_size=4)
    assert both[0]["weights"] == both[1]["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("dying", ["all", 1])
def test_each_process_goes_on_with_what_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool, dying: str | int
) -> None:
    """Running statistics and, where each makes steps by itself, the moments of its gradients.

    Also where one alone has died: what it knew is in the regular checkpoint, and in no later one.
    """
    given: dict[str, Any] = {"epochs": 3, "batch_size": 4, "accumulation_steps": 1}
    if local:
        given["local_steps"] = 2
    else:
        monkeypatch.setenv("CENTRED", "1")
    runs = {}
    for name, dies in (("whole", None), ("on", dying), ("on", None)):
        checkpoints = {"folder": str(tmp_path / name), "every_steps": 2}
        results, _ = _run(tmp_path, 2, name, dies=dies, checkpoints=checkpoints, **given)
        runs[name] = results
    assert runs["on"][0]["weights"] == runs["whole"][0]["weights"]
    assert len(runs["on"][0]["losses"]) < len(runs["whole"][0]["losses"])


@pytest.mark.slow
def test_local_sgd_sends_less_and_learns_as_much(tmp_path: Path) -> None:
    given: dict[str, Any] = {"epochs": 20, "batch_size": 2, "accumulation_steps": 1, "lr": 0.02}
    each, _ = _run(tmp_path, 2, "each", **given)
    lookahead = {"name": "adamw", "lr": 0.02, "lookahead": {"k": 20, "alpha": 0.8}}
    given.pop("lr")
    local, _ = _run(tmp_path, 2, "local", lr=None, optimizer=lookahead, local_steps=20, **given)
    assert local[0]["weights"] == local[1]["weights"]
    assert local[0]["samples"] == each[0]["samples"]
    assert each[0]["bytes"] >= 15 * local[0]["bytes"]
    assert sum(local[0]["losses"][-16:]) / 16 < 0.5
    assert sum(each[0]["losses"][-16:]) / 16 < 0.5


@pytest.mark.slow
def test_validations_and_checkpoints_wait_until_all_processes_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They send nothing and change nothing in what is trained; a run that is stopped owes them still."""
    given: dict[str, Any] = {"epochs": 4, "batch_size": 4, "accumulation_steps": 1}
    given["local_steps"] = 5  # epochs have 8 steps
    plain, _ = _run(tmp_path, 2, "plain", **given)
    monkeypatch.setenv("VALIDATES", "1")
    runs = {}
    for name, stop in (("whole", None), ("on", 9), ("on", None)):
        if stop is None:
            monkeypatch.delenv("STOPS", raising=False)
        else:
            monkeypatch.setenv("STOPS", str(stop))
        settings: dict[str, Any] = {
            "checkpoints": {"folder": str(tmp_path / name), "every_steps": 4}
        }
        settings["log"] = {"folder": str(tmp_path / f"{name}-log")}
        runs[name], _ = _run(tmp_path, 2, name, **settings, **given)
    assert runs["whole"][0]["weights"] == plain[0]["weights"] == runs["on"][0]["weights"]
    assert runs["whole"][0]["bytes"] == plain[0]["bytes"]
    for name in ("whole", "on"):
        rows = (tmp_path / f"{name}-log" / "metrics.jsonl").read_text().splitlines()
        phases = [row for row in map(json.loads, rows) if row["phase"] == "validation"]
        assert [row["step"] for row in phases] == [10, 20, 25, 32]  # due at 8, 16, 24, 32
    assert sorted(path.name for path in (tmp_path / "whole").glob("step-*"))[-1] == "step-00000032"


def test_local_steps_alone_in_the_world_change_nothing() -> None:
    with_, without = small_trainer(local_steps=2), small_trainer()
    with_.train()
    without.train()
    for one, other in zip(with_.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_lookahead_of_another_number_of_steps_is_refused() -> None:
    model = torch.nn.Linear(6, 3)
    optimizer = optcpu.Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=5)
    with pytest.raises(ValueError, match=r"local_steps is 4, and k of the Lookahead is 5"):
        small_trainer(model, optimizer=optimizer, lr=None, local_steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [4, 5])
@pytest.mark.parametrize("lookahead", [False, True])
def test_a_stop_waits_until_all_processes_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: int, lookahead: bool
) -> None:
    """Else their weights would be averaged where they are not without the stop."""
    given: dict[str, Any] = {"epochs": 3, "batch_size": 4, "accumulation_steps": 1}
    given["local_steps"] = 3
    if lookahead:
        given |= {"lr": None, "optimizer": {"lr": 0.05, "lookahead": {"k": 3}}}
    runs = {}
    for name, stop in (("whole", None), ("on", stops), ("on", None)):
        if stop is not None:
            monkeypatch.setenv("STOPS", str(stop))
        else:
            monkeypatch.delenv("STOPS", raising=False)
        checkpoints = {"folder": str(tmp_path / name), "every_steps": 100}
        runs[name, stop], _ = _run(tmp_path, 2, name, checkpoints=checkpoints, **given)
    assert runs["on", stops][0]["steps"] == 6
    assert runs["on", None][0]["weights"] == runs["whole", None][0]["weights"]


@pytest.mark.slow
def test_a_stop_does_not_wait_until_somebody_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"steps": 40, "batch_size": 4, "accumulation_steps": 1}
    given |= {"local_steps": 30, "progress": True}
    given["checkpoints"] = {"folder": str(tmp_path / "runs"), "every_steps": 100}
    monkeypatch.setenv("HASTE", "1")
    monkeypatch.setenv("STOPS", "4")
    stopped, told = _run(tmp_path, 2, **given)
    assert [one["steps"] for one in stopped] == [4, 4]
    assert stopped[0]["weights"] == stopped[1]["weights"]
    assert "the processes meet out of turn" in told
    monkeypatch.delenv("STOPS")
    ended, _ = _run(tmp_path, 2, **given)
    assert [one["steps"] for one in ended] == [40, 40]


@pytest.mark.slow
def test_another_run_finds_the_last_checkpoint_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process writes it, and the others may be the first to look for it."""
    monkeypatch.setenv("TWICE", "1")
    given: dict[str, Any] = {"epochs": 2, "batch_size": 4, "accumulation_steps": 1}
    both, _ = _run(tmp_path, 2, checkpoints={"folder": str(tmp_path / "runs")}, **given)
    assert [one["steps"] for one in both] == [24, 24]


@pytest.mark.slow
def test_a_run_that_ends_between_meetings_ends_with_one(tmp_path: Path) -> None:
    given: dict[str, Any] = {"steps": 7, "batch_size": 4, "accumulation_steps": 1}
    both, _ = _run(tmp_path, 2, local_steps=3, **given)
    assert [one["steps"] for one in both] == [7, 7]
    assert both[0]["weights"] == both[1]["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("on_nan", ["skip", "rollback"])
def test_a_gradient_that_is_no_number_in_one_process_is_one_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_nan: str
) -> None:
    monkeypatch.setenv("STEEP", "1")
    given: dict[str, Any] = {"epochs": 2, "batch_size": 4, "accumulation_steps": 1}
    checkpoints = {"folder": str(tmp_path / "checkpoints"), "every_steps": 2}
    both, _ = _run(tmp_path, 2, local_steps=2, on_nan=on_nan, checkpoints=checkpoints, **given)
    assert [one["steps"] for one in both] == [16, 16]
    assert both[0]["weights"] == both[1]["weights"]
    assert all(map(math.isfinite, both[0]["weights"]))


@pytest.mark.slow
@pytest.mark.parametrize(("fetch", "local"), [(9, None), (17, None), (17, 3)])
def test_a_signal_to_all_that_ends_loading_processes_as_well_is_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetch: int, local: int | None
) -> None:
    given: dict[str, Any] = {"epochs": 2, "accumulation_steps": 1, "optimizer": "sgd"}
    given["local_steps"] = local
    if local is None:
        monkeypatch.setenv("CENTRED", "1")
    runs = {}
    for name, ends in (("whole", 0), ("on", fetch), ("on", 0)):
        monkeypatch.setenv("ENDS", str(ends))
        checkpoints = {"folder": str(tmp_path / name), "every_steps": 100}
        runs[name, ends], _ = _run(tmp_path, 2, name, checkpoints=checkpoints, **given)
    steps = (fetch - 1) // 4 if local is None else 6  # when they meet
    assert [one["steps"] for one in runs["on", fetch]] == [steps, steps]
    assert runs["on", 0][0]["weights"] == runs["whole", 0][0]["weights"]


@pytest.mark.slow
@pytest.mark.parametrize(("fetch", "local", "steps"), [(21, None, 1), (21, 2, 2), (37, 2, 2)])
def test_a_signal_while_a_step_is_drawn_does_not_wait_for_its_other_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetch: int, local: int | None, steps: int
) -> None:
    given: dict[str, Any] = {"epochs": 2, "batch_size": 2, "accumulation_steps": 8}
    given["local_steps"] = local
    runs = {}
    for name, signals in (("whole", 0), ("on", fetch), ("on", 0)):
        monkeypatch.setenv("SIGNALS", str(signals))
        checkpoints = {"folder": str(tmp_path / name), "every_steps": 100}
        runs[name, signals], _ = _run(tmp_path, 2, name, checkpoints=checkpoints, **given)
    assert [one["steps"] for one in runs["on", fetch]] == [steps, steps]
    assert runs["on", 0][0]["weights"] == runs["whole", 0][0]["weights"]
