"""How far the first step of a variant is from that of eager FP32.

Errors are relative L2 errors, ``|a - b| / |b|`` with ``b`` the reference, in FP64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

# A gradient whose reference is this small beside all gradients is rounding noise around zero (the
# bias of a key projection, say), of which a relative error means nothing.
_NOISE = 1e-6
_CHUNK = 2**20  # elements compared at a time, so that comparing needs next to no memory


@dataclass
class FirstStep:
    """Output, loss and gradients of one forward and backward pass.

    Attributes:
        output: the floating-point tensors of the output, FP32.
        loss: the scalar loss, FP32.
        gradients: by parameter name; parameters without a gradient are left out.
    """

    output: list[Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]

    def save(self, path: Path) -> None:
        torch.save([self.output, self.loss, self.gradients], path)

    @classmethod
    def load(cls, path: Path) -> FirstStep:
        """Read back what ``save`` wrote, mapped from the file instead of copied to memory."""
        return cls(*torch.load(path, weights_only=True, mmap=True))


@dataclass(frozen=True)
class Accuracy:
    """Relative L2 errors against eager FP32.

    Attributes:
        output: over all tensors of the output together.
        loss: of the loss.
        gradient: over all gradients together; None if one cannot be compared.
        worst_gradient: name of the parameter with the largest error of its gradient; None if no
            gradient has any.
        worst_gradient_error: that error.
        without_gradient: names of the parameters that only the reference has a gradient for, other than
            rounding noise.
        notes: what a reader must know about these figures.
    """

    output: float | None
    loss: float
    gradient: float | None
    worst_gradient: str | None
    worst_gradient_error: float
    without_gradient: list[str]
    notes: list[str]


def compare_first_steps(step: FirstStep, reference: FirstStep) -> Accuracy:
    """The errors of ``step``."""
    notes: list[str] = []
    output: float | None = None
    if [t.shape for t in step.output] == [t.shape for t in reference.output]:
        output = _relative(_squares(zip(step.output, reference.output, strict=True)))
    else:
        notes.append("its output has other tensors or shapes than that of eager-fp32")

    squares = {name: _squares([(g, r)]) for name, g, r in _pairs(step, reference)}
    foreign = [name for name, square in squares.items() if square is None]
    if foreign:
        notes.append(
            f"{len(foreign)} gradients are laid out in another shape and were not compared "
            f"({foreign[0]}, ...)"
        )
    compared = {name: square for name, square in squares.items() if square is not None}
    total = math.fsum(reference for _, reference in compared.values())
    difference = math.fsum(difference for difference, _ in compared.values())
    errors = {
        name: _relative(square)
        for name, square in compared.items()
        if math.sqrt(square[1]) > _NOISE * math.sqrt(total) or not math.isfinite(square[0])
    }
    # A NaN compares as neither larger nor smaller, and is the worst of all.
    ranks = {n: math.inf if math.isnan(error) else error for n, error in errors.items() if error}
    worst = max(ranks, key=lambda name: ranks[name], default=None)
    return Accuracy(
        output=output,
        loss=_relative(_squares([(step.loss, reference.loss)])),
        gradient=None if foreign else _relative((difference, total)),
        worst_gradient=worst,
        worst_gradient_error=0.0 if worst is None else errors[worst],
        without_gradient=[
            n for n in reference.gradients if n in errors and n not in step.gradients
        ],
        notes=notes,
    )


def _pairs(step: FirstStep, reference: FirstStep) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name in reference.gradients.keys() | step.gradients.keys():
        expected = reference.gradients.get(name)
        actual = step.gradients.get(name)
        # A missing gradient is a gradient of zero: nothing will be learned from it.
        if expected is None:
            assert actual is not None
            expected = torch.zeros_like(actual)
        yield name, torch.zeros_like(expected) if actual is None else actual, expected


_Squares = tuple[float, float]


def _squares(pairs: Iterable[tuple[Tensor, Tensor]]) -> Any:
    """Sums of squares of the differences and of the references; None if the shapes differ."""
    difference = reference = 0.0
    for actual, expected in pairs:
        if actual.shape != expected.shape:
            return None
        for a, b in zip(_chunks(actual), _chunks(expected), strict=True):
            b = b.double()
            difference += float((a.double() - b).square().sum())
            reference += float(b.square().sum())
    return difference, reference


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.detach().reshape(-1), _CHUNK)


def _relative(squares: _Squares) -> float:
    difference, reference = squares
    if reference == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / reference)


def change_norms(
    parameters: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, float]:
    """How far each parameter has moved: the L2 norm of its difference, by name."""
    return {
        name: math.sqrt(_squares([(parameter, before[name])])[0])
        for name, parameter in parameters.items()
    }


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, except norms that take their statistics from the batch."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module, training in modes.items():
            module.training = training and isinstance(module, _NormBase)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
