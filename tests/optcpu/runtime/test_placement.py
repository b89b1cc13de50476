from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from optcpu.runtime.placement import numa_nodes, parse_cpu_list, settle


def test_lists_of_the_kernel() -> None:
    assert parse_cpu_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpu_list("\n") == set()


def _machine(tmp_path: Path, *lists: str) -> Path:
    for number, text in enumerate(lists):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(text)
    return tmp_path


def test_nodes_hold_what_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 5})
    assert numa_nodes(_machine(tmp_path, "0-3", "4-7", "8-11")) == [{1, 2}, {5}]
    assert numa_nodes(tmp_path / "nothing") == [{1, 2, 5}]


def test_on_this_machine_no_thread_is_lost() -> None:
    assert set().union(*numa_nodes()) <= os.sched_getaffinity(0)


def test_each_process_has_a_node_where_they_come_out_even(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, threads: bound.append(threads))
    nodes = [{0, 1}, {2, 3}]
    for rank in range(4):
        assert settle(rank, 4, nodes) == 2
    assert bound == [{0, 1}, {2, 3}, {0, 1}, {2, 3}]
    assert settle(1, 3, [{0, 1, 2, 3}]) == 3
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("optcpu.trainer")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        assert settle(0, 3, nodes) == 3
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert len(bound) == 4
    assert "torchrun --nproc-per-node 2" in seen[0]
