"""How many processes shall fetch the batches of training."""

from __future__ import annotations

import copy
import math
import os
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

from optcpu.cpu import capabilities
from optcpu.runtime.data.fetching import SeededBatches
from optcpu.runtime.data.sampling import Batch, ResumableBatchSampler

# Seconds of fetching a batch from which processes gained, where step times were measured with 0 to 2.
_WORTH_A_WORKER, _WORTH_BUSY_CORES = 5e-3, 40e-3
_USUAL_STEP = 20e-3
_MOST_THAT_WAIT = 8  # processes, each of which holds batches and memory of its own
_PROBES, _PROBE_SECONDS = 3, 0.2

_SCHEDULED = Path("/proc/thread-self/schedstat")  # nanoseconds on a core, and in the queue for one


class FetchTime(NamedTuple):
    """What fetching a batch takes, in seconds: of the processor, and waiting for a disk, say."""

    computing: float
    waiting: float


def choose_workers(
    fetching: FetchTime, *, cores: int, threads: int, step_seconds: float | None = None
) -> int:
    """How many processes shall fetch batches.

    A process hides what it waits for, and on a core of its own what it computes, and costs a transfer of
    each batch. Where all cores train, computing is not hidden: on two such cores and steps of 25 and 75 ms
    one process was about even with none however long a fetch took; two were up to 15 % slower where it
    took 25 ms or less, even at 40 ms, and 20 to 37 % faster at 150 ms, as they fetch on both cores and the
    main process on one. Processes that mostly wait take no core, and there may be more of them: fetches of
    35 ms beside steps of 6 ms gave one in 42 ms without processes, 18 with two, 11 with four to eight.

    Args:
        fetching: a batch in the main process.
        cores: that this process may use.
        threads: that training computes with.
        step_seconds: that training takes for one; None if unknown.
    """
    wanted = math.ceil(sum(fetching) / (step_seconds or _USUAL_STEP))
    if fetching.waiting >= max(_WORTH_A_WORKER, fetching.computing):
        return min(wanted, max(cores, _MOST_THAT_WAIT))
    spare = cores - threads
    if spare > 0:
        return min(wanted, spare) if sum(fetching) >= _WORTH_A_WORKER else 0
    if fetching.computing >= _WORTH_BUSY_CORES and cores > 1:
        return min(max(wanted, 2), cores)
    return min(wanted, cores) if fetching.waiting >= _WORTH_A_WORKER else 0


def cores_for_loading() -> int:
    """Physical cores that this process may use, if all that torchrun started here take the same share."""
    shared_by = os.environ.get("LOCAL_WORLD_SIZE", "1")
    processes = int(shared_by) if shared_by.isdigit() and int(shared_by) else 1
    return max(1, capabilities().physical_cores // processes)


def fetch_time(batches: SeededBatches, sampler: ResumableBatchSampler) -> FetchTime:
    """Measured for a batch in this process: the fastest of up to three.

    0 if that fails: the error is to come up in training, where its place can be told.
    """
    times: list[tuple[float, float]] = []
    try:
        probed = copy.copy(sampler)  # the sampler itself stays where it is
        if not probed.steps_after(probed.consumed):
            probed.consumed = 0
        for batch in islice(probed, _PROBES):
            # Where others use the cores as well, the time until this thread had one counts for neither.
            started, computed = time.perf_counter() - _seconds_in_queue(), time.process_time()
            batches.__getitems__(cast(Batch, batch))
            ended = time.perf_counter() - _seconds_in_queue()
            times.append((ended - started, time.process_time() - computed))
            if sum(seconds for seconds, _ in times) > _PROBE_SECONDS:
                break
    except Exception:
        return FetchTime(0.0, 0.0)
    seconds, computing = min(times)
    # Several threads can compute for longer than that takes.
    waiting = max(0.0, seconds - computing)
    return FetchTime(seconds - waiting, waiting)


def _seconds_in_queue() -> float:
    """How long this thread has been waiting for a core since it began; 0 where the system does not tell."""
    try:
        return int(_SCHEDULED.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
