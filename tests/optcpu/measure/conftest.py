"""A comparison with made-up figures: what a user gets to see, without measuring anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from optcpu.measure.machine import Machine
from optcpu.measure.result import Comparison, Row
from optcpu.measure.roofline import Limits
from optcpu.measure.work import Ideal

MACHINE = Machine(
    cpu="AMD EPYC 9654 96-Core Processor",
    cores=2,
    isa="avx512_bf16",
    bf16=True,
    emulated=(),
    memory_gb=23.4,
    torch="2.13.0+cpu",
    python="3.11.2",
    threads=2,
)

LIMITS = Limits(
    threads=2,
    gemm={
        "fp32": {"aten": 200e9, "onednn": 480e9},
        "bf16": {"aten": 800e9, "onednn": 960e9},
    },
    bandwidth=32e9,
    first_touch=2e9,
    first_touch_huge=18e9,
)


def make_row(variant: str, kind: str, ms: float, **figures: Any) -> Row:
    """A row of a variant that learned; a step of eager FP32 takes 300 ms, of the best stock 96."""
    usual: dict[str, Any] = {
        "step_ms": ms,
        "step_ms_spread": (0.97 * ms, 1.1 * ms),
        "rounds_ms": [ms, 0.97 * ms, 1.1 * ms],
        "units_per_second": 128e3 / ms,
        "speedup_vs_eager": 300 / ms,
        "speedup_vs_best_stock": 96 / ms,
        "of_ideal": 60 / ms,
        "peak_memory_mb": 1900.0,
        "memory_growth_mb": 1600.0,
        "compile_seconds": 0.1,
        "output_error": 4e-3,
        "loss_error": 2e-4,
        "gradient_error": 1.2e-2,
        "worst_gradient": "transformer.h.11.attn.c_attn.weight",
        "worst_gradient_error": 5e-2,
        "first_loss": 6.9,
        "final_loss": 0.01234,
        "losses": [6.9, 0.01234],
        "movement": 1.0,
        "learned": True,
    }
    return Row(variant, kind, **(usual | figures))


def make_comparison(*rows: Row, **fields: Any) -> Comparison:
    """Rows of stock PyTorch with ``rows`` behind them."""
    stock = [
        make_row(
            "eager-fp32",
            "stock",
            300.0,
            output_error=0.0,
            loss_error=0.0,
            gradient_error=0.0,
            worst_gradient=None,
        ),
        make_row("eager-bf16", "stock", 250.0),
        make_row("compiled-bf16-tuned", "stock", 96.0, compile_seconds=14.0, peak_memory_mb=2100.0),
    ]
    usual: dict[str, Any] = {
        "name": "MLP 784-4608-4608-4608-1000",
        "rows": [*stock, *rows],
        "best_stock": "compiled-bf16-tuned",
        "machine": MACHINE,
        "unit": "samples",
        "steps": 50,
        "accumulation_steps": 1,
        "parameters": 51_000_000,
        "ideal": Ideal("bf16", "onednn", 38.4e9, 960e9, 640e6, 32e9),
        "limits": LIMITS,
        "notes": [],
    }
    return Comparison(**(usual | fields))


@pytest.fixture
def row() -> Callable[..., Row]:
    return make_row


@pytest.fixture
def comparison() -> Callable[..., Comparison]:
    return make_comparison
