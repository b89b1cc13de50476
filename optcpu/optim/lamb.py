"""LAMB: Adam with a learning rate for each layer, for large batches."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optcpu.errors import OptcpuError
from optcpu.optim import native
from optcpu.optim.base import Group, StoredOptimizer, count_step
from optcpu.optim.formats import Format
from optcpu.optim.rules import Constants, Slot


class Lamb(StoredOptimizer):
    """Layer-wise adaptive moments (LAMB), You et al. 2019, arXiv 1904.00962, algorithm 2.

    A parameter moves by ``lr * ratio * update``, where ``update`` is Adam's step, with ``weight_decay``
    times the parameter added to it behind the moments, and ``ratio`` the norm of the parameter over
    that of the update: one where either is zero.

    Args:
        params: parameters or parameter groups; every option but ``state_dtype``, ``seed`` and
            ``max_grad_norm`` may differ between groups.
        lr: the learning rate.
        betas: decay of the first and the second moment a step.
        eps: added to the square root of the second moment.
        weight_decay: of the parameters.
        bias_correction: whether the moments are corrected for beginning at zero.
        trust_clip: the largest ratio; None for no limit.
        exclude_1d: parameters of at most one dimension (biases, the weights of norms) are neither
            decayed nor scaled by a ratio.
        decoupled_decay: decay parameters by ``lr * weight_decay`` first, as AdamW does, in place of
            adding ``weight_decay`` times the parameter to what the ratio scales.
        max_grad_norm: the gradients of all parameters together are scaled down to this norm where
            theirs is larger; None leaves them as they are.
        maximize: whether to go up instead of down.
        state_dtype: of the moments. In BF16 the first one is rounded to nearest and the second one
            stochastically.
        seed: of the random bits of stochastic rounding.

    Raises:
        ValueError: an option is out of its range, or a parameter is not FP32 on the CPU.
    """

    moments: ClassVar[dict[str, Format]] = {
        "exp_avg": Format.NEAREST,
        "exp_avg_sq": Format.STOCHASTIC,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        trust_clip: float | None = None,
        exclude_1d: bool = True,
        decoupled_decay: bool = False,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, or None, not {max_grad_norm!r}")
        self.max_grad_norm = max_grad_norm
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "trust_clip": trust_clip,
            "exclude_1d": exclude_1d,
            "decoupled_decay": decoupled_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        self.keep_state_in(state_dtype, seed)

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        try:
            _check_options(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def update_in_backward(self, accumulation_steps: int = 1) -> None:
        if self.max_grad_norm is not None:
            raise OptcpuError(
                f"max_grad_norm = {self.max_grad_norm} needs the gradients of all parameters before "
                "the first is updated: set it to None, or update in step()"
            )
        super().update_in_backward(accumulation_steps)

    def slot(self, group: Group, parameter: Tensor, seed: int) -> Slot:
        state = self.state[parameter]
        excluded = group["exclude_1d"] and parameter.dim() <= 1
        constants = self.shared(_constants, group, count_step(state), excluded)
        slot = self.new_slot(constants, parameter, seed)
        slot.first = self.moment(slot, state, "exp_avg")
        slot.second = self.moment(slot, state, "exp_avg_sq")
        return slot

    def update(self, slots: list[Slot]) -> None:
        if self.max_grad_norm is not None:
            norm = math.sqrt(native.gradient_squares(slots)) * self._gradient_scale
            for constants in {id(slot.constants): slot.constants for slot in slots}.values():
                constants.gradient_scale *= min(1.0, self.max_grad_norm / norm) if norm else 1.0
        native.lamb(slots)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of Adam knows some of the options only
            for name, value in self.defaults.items():
                if name != "differentiable":  # which PyTorch has just added
                    group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}


def _constants(group: Group, step: int, excluded: bool) -> Constants:
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    beta1, beta2 = map(float, group["betas"])
    constants = Constants(
        beta1=beta1,
        beta2=beta2,
        rest1=1 - beta1,
        rest2=1 - beta2,
        epsilon=float(group["eps"]),
        lr=lr,
        step_size=1.0,
    )
    if group["bias_correction"]:
        constants.step_size = 1 / (1 - beta1**step)
        constants.root_scale = 1 / math.sqrt(1 - beta2**step)
    if excluded:
        return constants
    limit = group["trust_clip"]
    constants.ratio_limit = math.inf if limit is None else float(limit)
    if group["decoupled_decay"]:
        constants.shrink = 1 - lr * decay
    else:
        constants.update_decay = decay
    return constants


def _check_options(group: Group) -> None:
    expected = {
        "lr": (group["lr"] >= 0, "at least 0"),
        "betas": (all(0 <= beta < 1 for beta in group["betas"]), "two numbers from 0 to below 1"),
        "eps": (group["eps"] >= 0, "at least 0"),
        "weight_decay": (group["weight_decay"] >= 0, "at least 0"),
        "trust_clip": (
            group["trust_clip"] is None or group["trust_clip"] > 0,
            "above 0, or None for no limit",
        ),
    }
    for name, (holds, description) in expected.items():
        if not holds:
            raise ValueError(f"{name} must be {description}, not {group[name]!r}")
