"""What each variant is: how a user would set it up, in the words of its documentation.

Stock variants are plain PyTorch. Peers are other projects' extensions, offered where they can be
imported. ``-tuned`` means that freed memory is kept in the process (``optcpu.memory``), which any
user of plain PyTorch can have as well: the tuned variants are the baseline that counts.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

REFERENCE = "eager-fp32"
_IMPORT_LIMIT_S = 180
# A tuned variant is measured for every stock variant that is within this factor of the fastest one:
# tuning changes the order of those that are close.
_CLOSE_TO_FASTEST = 1.3


@dataclass(frozen=True)
class Variant:
    """One way of running the training step.

    Attributes:
        name: what users call it.
        kind: ``"stock"`` for plain PyTorch, ``"optcpu"``, or ``"peer"``.
        bf16: whether the step runs under BF16 autocast.
        compiled: whether the model goes through stock ``torch.compile``.
        tuned: whether freed memory is kept in the process.
        package: what must be importable.
        environment: variables that its process starts with, where the caller has not set them.
    """

    name: str
    kind: Literal["stock", "optcpu", "peer"]
    bf16: bool = False
    compiled: bool = False
    tuned: bool = False
    package: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


def _stock_variants(tuned: bool) -> list[Variant]:
    return [
        Variant(
            f"{'compiled' if compiled else 'eager'}-{'bf16' if bf16 else 'fp32'}"
            + ("-tuned" if tuned else ""),
            "stock",
            bf16=bf16,
            compiled=compiled,
            tuned=tuned,
        )
        for compiled in (False, True)
        for bf16 in (False, True)
    ]


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        *_stock_variants(tuned=False),
        *_stock_variants(tuned=True),
        Variant("ipex", "peer", bf16=True, tuned=True, package="intel_extension_for_pytorch"),
        Variant(
            "zentorch",
            "peer",
            bf16=True,
            tuned=True,
            package="zentorch",
            # With its cache of packed weights (the default) it trains on those of the first step.
            environment=(("ZENDNNL_MATMUL_WEIGHT_CACHE", "0"),),
        ),
        Variant("optcpu", "optcpu"),
        Variant("optcpu+optimizer", "optcpu"),
    )
}


@dataclass
class Prepared:
    """A variant that is ready to train.

    Attributes:
        module: the module whose parameters are trained.
        call: what is called in its place.
        optimizer: steps the parameters of ``module``.
        autocast: makes the context in which output and loss are computed.
    """

    module: nn.Module
    call: Callable[..., Any]
    optimizer: Optimizer
    autocast: Callable[[], AbstractContextManager[Any]]


def named_variants(names: Sequence[str]) -> list[Variant]:
    """The variants called ``names``, without repetitions, the reference first.

    Raises:
        TypeError: if ``names`` is a bare string.
        ValueError: if there is none, one is unknown, or its package cannot be imported.
    """
    if isinstance(names, str):
        raise TypeError(f"variants must be a sequence of names: write variants=[{names!r}].")
    if not names:
        raise ValueError(f"variants is empty; choose from {', '.join(VARIANTS)}.")
    for name in names:
        if name not in VARIANTS:
            near = difflib.get_close_matches(str(name), VARIANTS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown variant {name!r}.{hint} Known: {', '.join(VARIANTS)}.")
    chosen = [VARIANTS[name] for name in dict.fromkeys([REFERENCE, *names])]
    for variant in chosen:
        problem = import_problem(variant.package) if variant.package else None
        if problem:
            raise ValueError(
                f"variant {variant.name!r} needs {variant.package}, which cannot be imported here: "
                f"{problem}. Install a version that fits torch {torch.__version__}, or leave the "
                "variant out."
            )
    return chosen


def default_stock_variants(bf16_hardware: bool) -> list[Variant]:
    """Plain PyTorch, untuned; BF16 only where the processor multiplies it in hardware."""
    return [
        variant for variant in _stock_variants(tuned=False) if bf16_hardware or not variant.bf16
    ]


def default_other_variants(bf16_hardware: bool) -> list[Variant]:
    """Peers that can be imported here, and optcpu."""
    return [
        variant
        for variant in VARIANTS.values()
        if variant.kind != "stock"
        and (bf16_hardware or not variant.bf16)
        and (variant.package is None or import_problem(variant.package) is None)
    ]


def tuned_twins(step_seconds: Mapping[str, float]) -> list[Variant]:
    """The tuned counterparts of the fastest of these stock variants, and of those close to it."""
    if not step_seconds:
        return []
    limit = _CLOSE_TO_FASTEST * min(step_seconds.values())
    close = {name for name, seconds in step_seconds.items() if seconds <= limit}
    return [twin for twin in _stock_variants(tuned=True) if twin.name[: -len("-tuned")] in close]


def import_problem(package: str) -> str | None:
    """Why ``package`` cannot be imported here, or None if it can.

    Tried in a process of its own, since an extension built for another version of torch can end
    the process that imports it.
    """
    if importlib.util.find_spec(package) is None:
        return "it is not installed"
    try:
        trial = subprocess.run(
            [sys.executable, "-c", f"import torch, {package}"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_IMPORT_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return f"its import did not end within {_IMPORT_LIMIT_S} s"
    if trial.returncode == 0:
        return None
    lines = [line.strip() for line in trial.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"its import ended the process with code {trial.returncode}"


def default_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """AdamW with a learning rate of 1e-4, updating in one fused kernel."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def prepare(
    variant: Variant, model: nn.Module, make_optimizer: OptimizerFactory, precision: str
) -> Prepared:
    """Set a plain FP32 model up for training as ``variant`` does it."""
    if variant.name == "ipex":
        return _prepare_ipex(model, make_optimizer)
    if variant.name == "zentorch":
        importlib.import_module("zentorch")
        optimizer = make_optimizer(model.parameters())
        return Prepared(model, torch.compile(model, backend="zentorch"), optimizer, _bf16_autocast)
    if variant.kind == "optcpu":
        return _prepare_optcpu(variant, model, make_optimizer, precision)
    return Prepared(
        module=model,
        call=torch.compile(model) if variant.compiled else model,
        optimizer=make_optimizer(model.parameters()),
        autocast=_bf16_autocast if variant.bf16 else nullcontext,
    )


def _bf16_autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _prepare_optcpu(
    variant: Variant, model: nn.Module, make_optimizer: OptimizerFactory, precision: str
) -> Prepared:
    # Imported here, so that a stock variant runs in a process that has not loaded the passes.
    from optcpu.optimize import optimize

    optimizer = make_optimizer(model.parameters())
    if variant.name == "optcpu+optimizer":
        model, optimizer = optimize(model, optimizer, precision=precision)
    else:
        model = optimize(model, precision=precision)
    return Prepared(model, model, optimizer, nullcontext)


def _prepare_ipex(model: nn.Module, make_optimizer: OptimizerFactory) -> Prepared:
    ipex = importlib.import_module("intel_extension_for_pytorch")
    model, optimizer = ipex.optimize(
        model, optimizer=make_optimizer(model.parameters()), dtype=torch.bfloat16, inplace=True
    )
    # Compiled where it works: a graph that IPEX's backend cannot compile runs eagerly.
    torch._dynamo.config.suppress_errors = True
    return Prepared(model, torch.compile(model, backend="ipex"), optimizer, _bf16_autocast)
