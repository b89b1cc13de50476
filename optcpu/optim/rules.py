"""The update rules: pure mathematics on FP32 numbers, in PyTorch.

``kernels/update.cpp`` holds the same rules in one pass over memory, which Inductor cannot generate: it
has no vector code for 16-bit integers, and took 9 times as long as PyTorch's fused FP32 kernel for a
BF16 AdamW that moves two thirds of its bytes. What is here runs where the kernel cannot be built or
does not fit, and says what it must compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optcpu.optim.formats import Stored


@dataclass(slots=True)
class Constants:
    """What a rule needs besides tensors, for all parameters that it is the same for.

    Attributes:
        gradient_scale: what gradients are multiplied by: for clipping; negative to maximise.
        coupled_decay: times the weight, added to the gradient (L2 regularisation).
        shrink: what weights are multiplied by first (decoupled decay); not by SGD.
        update_decay: LAMB: times the weight, added to the update.
        beta1, beta2: of the moments; SGD: ``beta1`` is the momentum.
        rest1, rest2: 1 - beta1 and 1 - beta2; SGD: ``rest1`` is 1 - dampening.
        epsilon: added to the denominator.
        lr: LAMB: the learning rate.
        step_size: the learning rate (LAMB: 1), divided by the first bias correction.
        root_scale: 1 / the square root of the second bias correction.
        ratio_limit: LAMB: the largest trust ratio; negative for a ratio of one, always.
        slow_step: Lookahead's alpha.
        nesterov: SGD: whether to look ahead along the momentum.
    """

    gradient_scale: float = 1.0
    coupled_decay: float = 0.0
    shrink: float = 1.0
    update_decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    rest1: float = 1.0
    rest2: float = 1.0
    epsilon: float = 0.0
    lr: float = 0.0
    step_size: float = 0.0
    root_scale: float = 1.0
    ratio_limit: float = -1.0
    slow_step: float = 0.0
    nesterov: bool = False


@dataclass(slots=True)
class Slot:
    """One parameter in one step, with all that its rule needs.

    Attributes:
        constants: of the rule.
        weight, gradient: of the parameter.
        first, second, maximum: moments, where the rule has them.
        slow: Lookahead's slow weights, in the step that synchronises them.
    """

    constants: Constants
    weight: Stored
    gradient: Stored
    first: Stored | None = None
    second: Stored | None = None
    maximum: Stored | None = None
    slow: Stored | None = None


def adam(slot: Slot) -> None:
    """Adam (arXiv 1412.6980), AdamW (1711.05101) and AMSGrad (Reddi et al. 2018), as PyTorch has them."""
    constants = slot.constants
    weight = slot.weight.read()
    first, second = _updated_moments(slot, _scaled_gradient(slot, weight))
    if slot.maximum is not None:
        second = torch.maximum(slot.maximum.read(), second)
        slot.maximum.write(second)
    denominator = second.sqrt() * constants.root_scale + constants.epsilon
    _store_weight(slot, weight * constants.shrink - constants.step_size * first / denominator)


def sgd(slot: Slot) -> None:
    """Gradient descent with momentum and Nesterov's variant (Sutskever et al. 2013), as PyTorch has it."""
    constants = slot.constants
    weight = slot.weight.read()
    direction = gradient = _scaled_gradient(slot, weight)
    if slot.first is not None:
        direction = constants.beta1 * slot.first.read() + constants.rest1 * gradient
        slot.first.write(direction)
        if constants.nesterov:
            direction = gradient + constants.beta1 * direction
    _store_weight(slot, weight - constants.step_size * direction)


def lamb(slot: Slot) -> None:
    """LAMB (arXiv 1904.00962, algorithm 2)."""
    constants = slot.constants
    weight = slot.weight.read()
    _updated_moments(slot, _scaled_gradient(slot, weight))
    weight = weight * constants.shrink
    assert slot.first is not None
    assert slot.second is not None
    first, second = slot.first.read(), slot.second.read()  # as they were rounded
    denominator = second.sqrt() * constants.root_scale + constants.epsilon
    update = constants.step_size * first / denominator + constants.update_decay * weight
    ratio = 1.0
    if constants.ratio_limit >= 0:
        norms = math.sqrt(sum_of_squares(weight)), math.sqrt(sum_of_squares(update))
        if min(norms) > 0:
            ratio = min(norms[0] / norms[1], constants.ratio_limit)
    _store_weight(slot, weight - constants.lr * ratio * update)


def sum_of_squares(numbers: Tensor) -> float:
    """The sum of the squares of ``numbers``, in double precision."""
    return float(numbers.double().square().sum())


def gradient_squares(slots: Sequence[Slot]) -> float:
    """The sum of the squares of all gradients, unscaled."""
    return sum(sum_of_squares(slot.gradient.read()) for slot in slots)


def _scaled_gradient(slot: Slot, weight: Tensor) -> Tensor:
    constants = slot.constants
    gradient = slot.gradient.read() * constants.gradient_scale
    return gradient + constants.coupled_decay * weight if constants.coupled_decay else gradient


def _updated_moments(slot: Slot, gradient: Tensor) -> tuple[Tensor, Tensor]:
    assert slot.first is not None
    assert slot.second is not None
    constants = slot.constants
    first, second = slot.first.read(), slot.second.read()
    first = first + (gradient - first) * constants.rest1
    second = second * constants.beta2 + gradient * gradient * constants.rest2
    slot.first.write(first)
    slot.second.write(second)
    return first, second


def _store_weight(slot: Slot, weight: Tensor) -> None:
    if slot.slow is not None:
        slow = slot.slow.read()
        weight = slow + slot.constants.slow_step * (weight - slow)
        slot.slow.write(weight)
    slot.weight.write(weight)
