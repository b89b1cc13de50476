"""What each variant is: how a user would set it up, in the words of its documentation.

Stock variants are plain PyTorch. Peers are other projects' extensions, offered where they can be
imported; they are imported in the processes that measure them, never in the caller's. Like optcpu
they compute in BF16 where the processor has it, unless ``precision`` says otherwise. ``-tuned``
means that freed memory is kept in the process (``optcpu.memory``), which any user of plain PyTorch
can have as well: the tuned variants are the baseline that counts.

Sources: IPEX's "Cheat Sheet" (``optimize`` with an optimizer, autocast) and "Features"
(``torch.compile`` with its backend, weights not packed); zentorch's README. JAX is no extension of
PyTorch: :mod:`optcpu.measure.jax` runs the exported model with it.
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

from optcpu.cpu import capabilities

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

REFERENCE = "eager-fp32"
_IMPORT_LIMIT_S = 180
_IPEX = "intel_extension_for_pytorch"
# A tuned variant is measured for every stock variant that is within this factor of the fastest one:
# tuning changes the order of those that are close.
_CLOSE_TO_FASTEST = 1.3


@dataclass(frozen=True)
class Variant:
    """One way of running the training step.

    Attributes:
        name: what users call it.
        kind: ``"stock"`` for plain PyTorch, ``"optcpu"``, or ``"peer"``.
        bf16: whether the step of a stock variant runs under BF16 autocast.
        compiled: whether the model goes through ``torch.compile``, with the peer's backend if it is
            a peer.
        tuned: whether freed memory is kept in the process.
        package: what must be importable.
        avx512: whether the package does nothing on a processor without AVX-512.
        layout: of the weights that optcpu stores (``optcpu.optimize``); given together with the optimizer.
        packs: whether it is told apart by packed BF16 weights alone.
        environment: variables that its process starts with, where the caller has not set them.
        by_name: whether it takes part only where it is named.
        note: what a reader of its figures must know.
    """

    name: str
    kind: Literal["stock", "optcpu", "peer"]
    bf16: bool = False
    compiled: bool = False
    tuned: bool = False
    package: str | None = None
    avx512: bool = False
    layout: str = "auto"
    packs: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    by_name: bool = False
    note: str | None = None


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
        Variant("ipex", "peer", package=_IPEX),
        Variant("ipex-tuned", "peer", tuned=True, package=_IPEX),
        Variant("ipex-compiled-tuned", "peer", compiled=True, tuned=True, package=_IPEX),
        Variant(
            "zentorch",
            "peer",
            compiled=True,
            tuned=True,
            package="zentorch",
            avx512=True,
            environment=(("ZENDNNL_MATMUL_WEIGHT_CACHE", "0"),),
            note="with its cache of packed weights, which is on by default, it trains on the "
            "weights of its first step; compare turns that off, unless "
            "ZENDNNL_MATMUL_WEIGHT_CACHE is set",
        ),
        Variant("jax", "peer", compiled=True, tuned=True, package="optax", by_name=True),
        Variant("optcpu", "optcpu"),
        Variant("optcpu+optimizer", "optcpu"),
        # Where both layouts are possible; "optcpu+optimizer" takes the one that it measures to be faster.
        Variant("optcpu+native", "optcpu", package=_IPEX, packs=True, layout="native"),
        Variant("optcpu+ipex", "optcpu", package=_IPEX, packs=True, layout="ipex"),
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
        ValueError: if there is none, one is unknown, or one cannot run here.
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
    problems = _problems(chosen)
    for variant in chosen:
        if variant.name in problems:
            raise ValueError(f"variant {variant.name!r} cannot run here: {problems[variant.name]}.")
    return chosen


def default_stock_variants(bf16_hardware: bool) -> list[Variant]:
    """Plain PyTorch, untuned; BF16 only where the processor multiplies it in hardware."""
    return [
        variant for variant in _stock_variants(tuned=False) if bf16_hardware or not variant.bf16
    ]


def default_other_variants() -> tuple[list[Variant], list[str]]:
    """Peers that can run here, and optcpu; and why peers are left out that are installed."""
    others = [
        variant
        for variant in VARIANTS.values()
        if variant.kind != "stock"
        and not variant.by_name
        and (variant.package is None or importlib.util.find_spec(variant.package) is not None)
        and not (variant.packs and _why_not_packed())  # the same as "optcpu+optimizer" then
    ]
    problems = _problems(others)
    left_out: dict[str, list[str]] = {}
    for name, problem in problems.items():
        left_out.setdefault(problem, []).append(name)
    return (
        [variant for variant in others if variant.name not in problems],
        [f"Left out: {', '.join(found)}; {problem}." for problem, found in left_out.items()],
    )


def tuned_twins(step_seconds: Mapping[str, float]) -> list[Variant]:
    """The tuned counterparts of the fastest of these stock variants, and of those close to it."""
    if not step_seconds:
        return []
    limit = _CLOSE_TO_FASTEST * min(step_seconds.values())
    close = {name for name, seconds in step_seconds.items() if seconds <= limit}
    return [twin for twin in _stock_variants(tuned=True) if twin.name[: -len("-tuned")] in close]


def _problems(variants: Sequence[Variant]) -> dict[str, str]:
    """Why variants cannot run here, by name, of those that cannot."""
    problems: dict[str, str] = {}
    imports: dict[str, str | None] = {}
    for variant in variants:
        package = variant.package
        if package is None:
            continue
        if variant.avx512 and not capabilities().isa.startswith(("avx512", "amx")):
            problems[variant.name] = f"without AVX-512 {package} is plain torch.compile"
            continue
        if variant.packs and (reason := _why_not_packed()) is not None:
            problems[variant.name] = f"no weights are packed here: {reason}"
            continue
        if package not in imports:
            imports[package] = import_problem(package)
        problem = imports[package]
        if problem is not None:
            problems[variant.name] = (
                f"{package} cannot be imported: {problem.rstrip('.')}; a version that fits "
                f"torch {torch.__version__} is needed"
            )
    return problems


def _why_not_packed() -> str | None:
    # Imported here, as the passes come with it: a stock variant's process must not load them.
    from optcpu.layout import native

    return native.why_impossible()


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
    # IPEX prints which torch it needs, and then fails by mistake: the error alone says nothing.
    said = [line for line in (_last_line(trial.stderr), _last_line(trial.stdout)) if line]
    if trial.returncode != 1 or not said:  # not an exception
        said.insert(0, f"its import ended the process with code {trial.returncode}")
    return f"{said[0]} ({'; '.join(said[1:])})" if len(said) > 1 else said[0]


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def default_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """AdamW with a learning rate of 1e-4, updating in one fused kernel."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def prepare(
    variant: Variant, model: nn.Module, make_optimizer: OptimizerFactory, precision: str
) -> Prepared:
    """Set a plain FP32 model up for training as ``variant`` does it.

    ``precision``, of ``"auto"``, ``"bf16"`` and ``"fp32"``, is that of optcpu and of the peers.
    """
    if variant.kind == "optcpu":
        return _prepare_optcpu(variant, model, make_optimizer, precision)
    if variant.package == _IPEX:
        return _prepare_ipex(variant, model, make_optimizer, in_bf16(precision))
    if variant.name == "zentorch":
        importlib.import_module("zentorch")
        return Prepared(
            module=model,
            call=torch.compile(model, backend="zentorch"),
            optimizer=make_optimizer(model.parameters()),
            autocast=_bf16_autocast if in_bf16(precision) else nullcontext,
        )
    return Prepared(
        module=model,
        call=torch.compile(model) if variant.compiled else model,
        optimizer=make_optimizer(model.parameters()),
        autocast=_bf16_autocast if variant.bf16 else nullcontext,
    )


def in_bf16(precision: str) -> bool:
    """Whether ``precision`` means BF16 on this processor."""
    return precision == "bf16" or (precision == "auto" and capabilities().bf16)


def _bf16_autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _prepare_optcpu(
    variant: Variant, model: nn.Module, make_optimizer: OptimizerFactory, precision: str
) -> Prepared:
    # Imported here, so that a stock variant runs in a process that has not loaded the passes.
    from optcpu.optimize import optimize

    optimizer = make_optimizer(model.parameters())
    if variant.name == "optcpu":
        model = optimize(model, precision=precision)
    else:
        model, optimizer = optimize(model, optimizer, precision=precision, layout=variant.layout)
    return Prepared(model, model, optimizer, nullcontext)


def _prepare_ipex(
    variant: Variant, model: nn.Module, make_optimizer: OptimizerFactory, bf16: bool
) -> Prepared:
    ipex = importlib.import_module(_IPEX)
    model, optimizer = ipex.optimize(
        model,
        optimizer=make_optimizer(model.parameters()),
        dtype=torch.bfloat16 if bf16 else None,
        # torch.compile cannot capture the modules that hold packed weights.
        weights_prepack=not variant.compiled,
        inplace=True,
    )
    return Prepared(
        module=model,
        call=torch.compile(model, backend="ipex") if variant.compiled else model,
        optimizer=optimizer,
        autocast=_bf16_autocast if bf16 else nullcontext,
    )
