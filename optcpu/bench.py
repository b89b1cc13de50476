"""The suite: models of all kinds, each compared with whatever else could train it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from optcpu.compare import compare
from optcpu.cpu import capabilities
from optcpu.errors import OptcpuError
from optcpu.factories import nearest
from optcpu.measure.machine import describe_machine
from optcpu.measure.suite import Entry, Suite
from optcpu.workloads import workload

__all__ = ["SUITE", "Case", "Suite", "cases_named", "run_suite"]


@dataclass(frozen=True)
class Case:
    """A workload as the suite trains it.

    Attributes:
        name: of the case.
        workload: that is trained; see :func:`optcpu.workloads.workload`.
        steps: optimizer steps of the learning check; fewer where one takes seconds.
        accumulation_steps: batches per optimizer step.
    """

    name: str
    workload: str
    steps: int
    accumulation_steps: int = 1


SUITE = (
    Case("mlp", "mlp", steps=32),
    Case("mlp-accumulation-8", "mlp", steps=8, accumulation_steps=8),
    Case("gpt2-small", "gpt2-small", steps=16),
    Case("encoder-accumulation-4", "encoder", steps=4, accumulation_steps=4),
    Case("small-cnn", "small-cnn", steps=32),
    Case("digits-cnn", "digits-cnn", steps=50),
    Case("resnet18", "resnet18", steps=32),
    Case("vit-tiny", "vit-tiny", steps=32),
    Case("lstm", "lstm", steps=32),
)


def cases_named(names: Sequence[str]) -> list[Case]:
    """The cases of :data:`SUITE` that have these names, in the order of the suite.

    Raises:
        ValueError: there is none for one of them.
    """
    known = [case.name for case in SUITE]
    for name in names:
        if name not in known:
            raise ValueError(
                f"the suite has no workload {name!r}{nearest(name, known)}; it has {', '.join(known)}"
            )
    return [case for case in SUITE if case.name in names]


def run_suite(
    cases: Sequence[Case] = SUITE,
    *,
    variants: Sequence[str] | None = None,
    rounds: int = 5,
    round_seconds: float = 1.0,
    precision: str = "auto",
    threads: int | None = None,
    progress: bool | None = None,
    seed: int = 0,
    before: Callable[[Case], None] | None = None,
    after: Callable[[Suite], None] | None = None,
) -> Suite:
    """Compare optcpu with stock PyTorch and every peer that can be imported, on each of ``cases``.

    Args:
        cases: what is trained.
        variants: as in :func:`optcpu.compare`, as all that follow up to ``progress``.
        rounds: turns that each variant gets.
        round_seconds: length of a turn, s.
        precision: of optcpu and the peers.
        threads: threads to compute with.
        progress: ``False`` shows nothing while it runs.
        seed: of weights and data.
        before: called with each case when it begins.
        after: called with what is known so far when a case is done.

    Returns:
        The figures. A case that fails has the reason in its entry, and the others go on.

    Raises:
        ValueError: an option is out of range, or there is no case; before anything is measured.
    """
    if not cases:
        raise ValueError("there is no case to measure: give at least one of optcpu.bench.SUITE")
    suite = Suite(describe_machine(capabilities(), threads or torch.get_num_threads()))
    for case in cases:
        if before is not None:
            before(case)
        entry = Entry(case.name)
        try:
            job = workload(case.workload, seed=seed)
            entry.comparison = compare(
                job.model,
                list(job.batches),
                loss=job.loss,
                steps=case.steps,
                variants=variants,
                rounds=rounds,
                round_seconds=round_seconds,
                accumulation_steps=case.accumulation_steps,
                precision=precision,
                unit=job.unit,
                units_per_batch=job.units_per_batch,
                threads=threads,
                progress=progress,
                name=case.name,
            )
        except (OptcpuError, RuntimeError, MemoryError) as error:
            entry.failed = f"{type(error).__name__}: {error}"
        suite.entries.append(entry)
        if after is not None:
            after(suite)
    return suite
