"""What this machine can do for training on the CPU, what is missing, and the remedy for each.

Every check is one function that looks and returns a :class:`Finding`; none changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from optcpu.doctor.compiler import check_compile_cache, check_compiler
from optcpu.doctor.finding import Finding
from optcpu.doctor.hardware import (
    check_allocator,
    check_huge_pages,
    check_openmp,
    check_processor,
    check_set_num_threads,
    check_threads,
)
from optcpu.doctor.libraries import (
    check_ipex,
    check_layouts,
    check_optional_libraries,
    check_torch,
    check_zentorch,
)
from optcpu.doctor.table import show

__all__ = ["CHECKS", "Finding", "examine", "show", "usable"]

CHECKS: tuple[Callable[[], Finding], ...] = (
    check_processor,
    check_threads,
    check_set_num_threads,
    check_compiler,
    check_allocator,
    check_huge_pages,
    check_openmp,
    check_torch,
    check_ipex,
    check_layouts,
    check_zentorch,
    check_compile_cache,
    check_optional_libraries,
)


def examine() -> list[Finding]:
    """Run every check. Takes a few seconds, as it compiles a small program."""
    return [_run(check) for check in CHECKS]


def usable(findings: Iterable[Finding]) -> bool:
    """Whether none of the findings is an error."""
    return all(finding.status != "error" for finding in findings)


def _run(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # an odd machine must not hide what the other checks find
        name = check.__name__.removeprefix("check_").replace("_", " ")
        return Finding(name, "warning", f"could not be checked: {type(error).__name__}: {error}")
