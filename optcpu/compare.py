"""``compare``: a model's training step as every variant runs it, side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from optcpu.cpu import capabilities
from optcpu.measure.batches import (
    Batch,
    Loss,
    call_model,
    check_targets,
    default_loss,
    signature,
    units_in,
)
from optcpu.measure.breakdown import Kind, breakdown, kind_of_operator
from optcpu.measure.judge import rows_of
from optcpu.measure.machine import describe_machine
from optcpu.measure.options import check_options
from optcpu.measure.payload import Payload, Trial, checked_payload, try_out
from optcpu.measure.progress import Reporter
from optcpu.measure.result import Comparison, Row
from optcpu.measure.roofline import measure_limits
from optcpu.measure.rounds import Team
from optcpu.measure.training import Settings
from optcpu.measure.variants import (
    OptimizerFactory,
    Variant,
    default_other_variants,
    default_stock_variants,
    named_variants,
    tuned_twins,
)
from optcpu.measure.work import ideal_step
from optcpu.memory import hand_back_freed_memory
from optcpu.pipeline import resolve_precision
from optcpu.random_state import random_state_kept

__all__ = ["Comparison", "Row", "compare"]

_SEED = 0
_PHASES_BESIDE_WORKERS_AND_ROUNDS = 5  # the checks before, the warm-up, the limits twice, a profile
_PROFILED_S = 0.5
_RELIABLE_ROUNDS, _RELIABLE_ROUND_S = 5, 0.8
_STEADY = 1.5  # how much longer the slowest round of a variant may take than its fastest


def compare(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    steps: int = 50,
    variants: Sequence[str] | None = None,
    rounds: int = 5,
    round_seconds: float = 1.0,
    accumulation_steps: int = 1,
    precision: str = "auto",
    unit: str = "samples",
    units_per_batch: int | None = None,
    threads: int | None = None,
    cold: bool = True,
    progress: bool | None = None,
    name: str | None = None,
) -> Comparison:
    """Measure a model's training step as eager PyTorch, ``torch.compile`` and optcpu run it.

    Each variant runs in a process of its own and starts from the same weights, batches and seeds.
    One after the other they compile, take a first step whose output, loss and gradients are
    compared with eager FP32's, and train for ``steps`` steps. Then they are timed in turn, round by
    round (A B C, B C A, ...), while the others sleep; the ratios quoted are medians over the rounds
    of the ratio within a round. A step is forward, loss, backward and update.

    The model is measured in training mode, as a training loop puts it. Nothing of the caller's is
    changed: not the model, its gradients or mode, nor any random generator. Models and functions
    that are defined in a script or a notebook work as they are, without an
    ``if __name__ == "__main__"`` guard.

    Args:
        model: any module with FP32 parameters on the CPU. A compiled one is measured as the plain
            module inside it.
        batch: one batch: a tensor (``model(x)``), a tuple ``(*inputs, target)``
            (``model(*inputs)``; ``({"name": value, ...}, target)`` passes keywords), or a dict
            (``model(**batch)``). Several batches, cycled through: a **list** of those, such as
            ``list(loader)``. One batch of a ``DataLoader`` is itself a list: pass ``tuple(batch)``.
        loss: ``loss(output, batch)``, a scalar tensor; ``batch`` is whole, its target included.
            Default: the output's own ``.loss`` if it has one (Hugging Face models with labels);
            else cross entropy of the output, or of its ``.logits``, for an integer target (logits
            ``(B, C)``, ``(B, T, V)`` or ``(B, C, H, W)``), mean squared error for a float target.
            It is computed where the output is, under autocast in the BF16 variants.
        optimizer: makes the optimizer from the parameters. Default:
            ``AdamW(parameters, lr=1e-4, fused=True)``.
        steps: optimizer steps of the learning check, at least 1.
        variants: names, of: ``eager-fp32``, ``eager-bf16`` (autocast), ``compiled-fp32``,
            ``compiled-bf16`` (stock ``torch.compile``); each of them with ``-tuned`` (freed memory
            stays in the process); ``optcpu`` (``optcpu.optimize(model)``, the optimizer as given),
            ``optcpu+optimizer`` (``optcpu.optimize(model, optimizer)``), ``optcpu+native`` and
            ``optcpu+ipex`` (the same with that ``layout``, where both can be had); ``ipex`` (as its
            documentation trains), ``ipex-tuned``, ``ipex-compiled-tuned`` (with its backend for
            ``torch.compile``), and ``zentorch``, with tuned memory, too; ``jax`` (the exported model, its
            whole step compiled by JAX), which takes part only where it is named.
            ``eager-fp32`` always runs, as the reference. Default: the four stock ones, the tuned
            counterpart of the fastest of them (and of any that is close to it), those of optcpu, and
            those of IPEX and zentorch where they are installed and fit. On processors without
            AVX512_BF16 and AMX the stock BF16 variants are left out of the default.
        rounds: turns that each variant gets; below 5 the medians are rough, and it is said so.
        round_seconds: length of a turn, s; short turns mislead, and it is said so.
        accumulation_steps: batches whose gradients are averaged in one optimizer step.
        precision: of optcpu and the peers: ``"auto"`` (BF16 where the processor has it),
            ``"bf16"`` or ``"fp32"``.
        unit: what is counted per second, for the table: ``"tokens"``, say.
        units_per_batch: how many of them are in a batch. Default: the first dimension.
        threads: threads to compute with. Default: as many as here (``torch.get_num_threads()``).
        cold: compile with an empty cache, so that compile times are those of a first run.
            ``False`` uses the caller's Inductor cache.
        progress: ``False`` shows nothing while it runs. Default: a bar, or lines where stderr is
            not a terminal.
        name: title of the table. Default: the class of the model.

    Returns:
        The figures; ``print`` shows them as a table. A variant that fails has the reason in its
        row, and the others go on.

    Raises:
        TypeError: for a model that is not a module, or a batch of another form.
        ValueError: for a model, batch, loss or option that cannot be measured; before any process
            is started.
        OptcpuError: if the model cannot be pickled.
        WorkerError: if the reference, eager FP32, fails in its process.
    """
    check_options(
        steps=steps,
        rounds=rounds,
        round_seconds=round_seconds,
        accumulation_steps=accumulation_steps,
        precision=precision,
        unit=unit,
        units_per_batch=units_per_batch,
        threads=threads,
        cold=cold,
        progress=progress,
        name=name,
        variants=variants,
    )
    payload = checked_payload(model, batch, loss, optimizer)
    cpu = capabilities()
    asked = None if variants is None else named_variants(variants)
    with Reporter(progress, total=0) as reporter, Team(reporter, cold) as team:
        reporter.phase("checking the model")
        payload.save(team.payload_file)
        # The trial runs on what was read back, which is what the workers will see.
        job = Payload.load(team.payload_file)
        trial = try_out(job, _SEED)
        _check_targets(job)
        del job
        # What the trial needed is better used by the workers.
        hand_back_freed_memory()
        settings = Settings(
            steps=steps,
            accumulation_steps=accumulation_steps,
            precision=precision,
            seed=_SEED,
            threads=threads or torch.get_num_threads(),
            dropout_off=trial.random,
        )
        team.write(settings)
        reporter.phase("measuring this machine")
        limits = measure_limits(settings.threads)
        left_out = _prepare(team, reporter, asked, cpu.bf16, rounds)
        team.take_turns(rounds, round_seconds, payload.batches, accumulation_steps)
        own = _fastest_of_optcpu(team)
        costs = None
        if own is not None:
            costs = team.profile(own, _PROFILED_S, payload.batches, accumulation_steps)
        reporter.phase("measuring this machine again")
        limits = limits.merged(measure_limits(settings.threads))
        measured = list(team.measured.values())
        scarce = team.memory_was_scarce

    batches = payload.batches
    units = [units_per_batch or units_in(one) for one in batches]
    units_per_step = accumulation_steps * sum(units) / len(units)
    chosen = resolve_precision(precision)
    dtype = chosen if chosen in limits.gemm else "fp32"
    ideal = ideal_step(trial.work, limits, dtype, batches=units_per_step / units[0])
    flops: dict[Kind, float] = {}
    for operator, count in trial.work.flops_by_operator.items():
        kind = kind_of_operator(operator)
        flops[kind] = flops.get(kind, 0.0) + count * units_per_step / units[0]
    rows, best = rows_of(
        measured,
        passes=len(batches) // math.gcd(len(batches), accumulation_steps),
        units_per_step=units_per_step,
        ideal_ms=ideal.step_ms,
    )
    return Comparison(
        name=name or type(payload.model).__name__,
        rows=rows,
        best_stock=best,
        machine=describe_machine(cpu, settings.threads),
        unit=unit,
        steps=steps,
        accumulation_steps=accumulation_steps,
        parameters=trial.work.values_updated,
        ideal=ideal,
        limits=limits,
        notes=[
            *left_out,
            *_notes(rows[0], trial),
            *_notes_on_timing(batches, rounds, round_seconds, scarce),
            *_notes_on_noise(rows),
        ],
        breakdown=None if own is None or costs is None else breakdown(own, costs, ideal, flops),
    )


def _fastest_of_optcpu(team: Team) -> str | None:
    times = {
        name: statistics.median(measured.rounds_s)
        for name, measured in team.measured.items()
        if measured.variant.kind == "optcpu" and measured.failed is None
    }
    return min(times, key=lambda name: times[name], default=None)


def _check_targets(job: Payload) -> None:
    """The trial meets one batch of each shape; a wrong class in another would end every worker."""
    if job.loss is default_loss and len(job.batches) > 1:
        with random_state_kept(), torch.no_grad():
            check_targets(call_model(job.model, job.batches[0]), job.batches)


def _prepare(
    team: Team,
    reporter: Reporter,
    asked: list[Variant] | None,
    bf16_hardware: bool,
    rounds: int,
) -> list[str]:
    """Have every variant compile and learn. Returns what is to be said about those left out."""

    def expect(workers: int) -> None:
        reporter.set_total(workers + rounds + _PHASES_BESIDE_WORKERS_AND_ROUNDS)

    if asked is not None:
        expect(len(asked))
        team.prepare(asked)
        return []
    stock = default_stock_variants(bf16_hardware)
    others, left_out = default_other_variants()
    expect(len(stock) + 1 + len(others))
    team.prepare(stock)
    # Only now is it known which of them are worth tuning.
    tuned = tuned_twins(
        {
            name: measured.preparation["step_seconds"]
            for name, measured in team.measured.items()
            if measured.preparation is not None
        }
    )
    expect(len(stock) + len(tuned) + len(others))
    team.prepare([*tuned, *others])
    return left_out


def _notes(reference: Row, trial: Trial) -> list[str]:
    notes = []
    if trial.random_without_dropout:
        notes.append(
            "The model is random even with dropout off: the errors include that randomness."
        )
    elif trial.random:
        notes.append(
            "The model is random in training mode: the errors are those of a first step with "
            "dropout off (batch norms still in training mode); learning and timing have it on."
        )
    assert reference.first_loss is not None
    assert reference.final_loss is not None
    if not reference.final_loss < reference.first_loss:
        notes.append(
            "eager-fp32's own loss did not fall, so the learning check only tells whether the "
            "others went the same way: take more steps, or another learning rate."
        )
    return notes


def _notes_on_timing(
    batches: Sequence[Batch], rounds: int, round_seconds: float, memory_was_scarce: bool
) -> list[str]:
    notes = []
    if rounds < _RELIABLE_ROUNDS or round_seconds < _RELIABLE_ROUND_S:
        notes.append(
            f"Rounds: {rounds} of {round_seconds:g} s, too few or too short for reliable ratios; "
            f"at least {_RELIABLE_ROUNDS} of about 1 s are needed."
        )
    shapes = len({signature(batch) for batch in batches})
    if shapes > 1:
        notes.append(f"The batches have {shapes} different shapes; times are means over them.")
    if memory_was_scarce:
        notes.append(
            "Memory was scarce, so tuned variants gave theirs back between turns; compare fewer "
            "variants at a time to be sure."
        )
    return notes


def _notes_on_noise(rows: Sequence[Row]) -> list[str]:
    unsteady = {
        row.variant: row.step_ms_spread[1] / row.step_ms_spread[0]
        for row in rows
        if row.step_ms_spread is not None
        and row.step_ms_spread[1] > _STEADY * row.step_ms_spread[0]
    }
    if not unsteady:
        return []
    worst = max(unsteady, key=lambda name: unsteady[name])
    return [
        f"Rounds of {worst} differ by a factor of {unsteady[worst]:.1f}: something else was using "
        "the processor, or the turns were too short. Measure again before relying on this."
    ]
