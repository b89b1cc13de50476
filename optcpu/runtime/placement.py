"""Where the processes of a run compute: on which cores, near which memory."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger("optcpu.trainer")

_NODES = Path("/sys/devices/system/node")


def numa_nodes(root: Path = _NODES) -> list[set[int]]:
    """The hardware threads that this process may run on, by NUMA node; one node where nothing is known."""
    if not hasattr(os, "sched_getaffinity"):
        return [set(range(os.cpu_count() or 1))]
    usable = os.sched_getaffinity(0)
    nodes = []
    for folder in sorted(root.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        try:
            threads = parse_cpu_list((folder / "cpulist").read_text()) & usable
        except (OSError, ValueError):
            continue
        if threads:
            nodes.append(threads)
    return nodes or [usable]


def parse_cpu_list(text: str) -> set[int]:
    """The numbers in ``"0-3,8,10-11"``, as the kernel writes them."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def settle(local_rank: int, local_size: int, nodes: list[set[int]] | None = None) -> int:
    """Keep this process on one NUMA node, where the processes of this machine can share the nodes evenly.

    Memory of another node is reached at a fraction of the speed, and the update of an optimizer is bound by
    memory. A process that spans several nodes is left as it is, with a hint in the log, since moving it
    would leave cores idle.

    Args:
        local_rank: this process among those of the run on this machine.
        local_size: how many these are.
        nodes: as :func:`numa_nodes` gives them.

    Returns:
        How many processes share the cores that this one may use from now on.
    """
    nodes = numa_nodes() if nodes is None else nodes
    if len(nodes) == 1:
        return local_size
    if local_size % len(nodes) == 0:
        os.sched_setaffinity(0, nodes[local_rank % len(nodes)])
        return local_size // len(nodes)
    logger.info(
        "this process computes on %d NUMA nodes; torchrun --nproc-per-node %d, one process for each, is "
        "likely to be faster",
        len(nodes),
        len(nodes),
    )
    return local_size
