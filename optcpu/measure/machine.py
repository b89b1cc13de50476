"""What a measurement ran on."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import psutil
import torch

from optcpu.cpu import Capabilities


@dataclass(frozen=True)
class Machine:
    """The processor and the software of one measurement.

    Attributes:
        cpu: model name of the processor.
        cores: cores that the process may use.
        isa: highest instruction set in use.
        bf16: whether products of BF16 numbers are done in hardware.
        emulated: environment variables that made the processor pass for an older one.
        memory_gb: installed memory, GiB.
        torch: version of torch.
        python: version of Python.
        threads: threads that torch computed with.
    """

    cpu: str
    cores: int
    isa: str
    bf16: bool
    emulated: tuple[str, ...]
    memory_gb: float
    torch: str
    python: str
    threads: int

    def __str__(self) -> str:
        isa = self.isa if self.bf16 else f"{self.isa}, no BF16 hardware"
        if self.emulated:
            isa += f" ({', '.join(self.emulated)})"
        return (
            f"{self.cpu}, {self.cores} core{'s' if self.cores > 1 else ''}, {isa}, "
            f"{self.memory_gb:.0f} GiB; torch {self.torch}, {self.threads} "
            f"thread{'s' if self.threads > 1 else ''}"
        )


def describe_machine(cpu: Capabilities, threads: int) -> Machine:
    """This machine, computing with ``threads`` threads."""
    return Machine(
        cpu=cpu.model or cpu.vendor or cpu.architecture,
        cores=cpu.physical_cores,
        isa=cpu.isa,
        bf16=cpu.bf16,
        emulated=cpu.emulated,
        memory_gb=round(psutil.virtual_memory().total / 2**30, 1),
        torch=torch.__version__,
        python=platform.python_version(),
        threads=threads,
    )
