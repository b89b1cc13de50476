"""Adam and AdamW with BF16 state."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optcpu.optim import native
from optcpu.optim.base import Group, StoredOptimizer, count_step
from optcpu.optim.formats import Format
from optcpu.optim.rules import Constants, Slot


class _AdamUpdate(StoredOptimizer):
    """The update of :class:`torch.optim.Adam` and of :class:`torch.optim.AdamW`."""

    moments: ClassVar[dict[str, Format]] = {
        "exp_avg": Format.NEAREST,
        "exp_avg_sq": Format.STOCHASTIC,
        # It only grows: rounded at random it would grow by itself.
        "max_exp_avg_sq": Format.NEAREST,
    }

    def slot(self, group: Group, parameter: Tensor, seed: int) -> Slot:
        state = self.state[parameter]
        slot = self.new_slot(self.shared(_constants, group, count_step(state)), parameter, seed)
        slot.first = self.moment(slot, state, "exp_avg")
        slot.second = self.moment(slot, state, "exp_avg_sq")
        if group["amsgrad"]:
            slot.maximum = self.moment(slot, state, "max_exp_avg_sq")
        return slot

    def update(self, slots: list[Slot]) -> None:
        native.adam(slots)


def _constants(group: Group, step: int) -> Constants:
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    beta1, beta2 = map(float, group["betas"])
    decoupled = group["decoupled_weight_decay"]
    return Constants(
        shrink=1 - lr * decay if decoupled else 1.0,
        coupled_decay=0.0 if decoupled else decay,
        beta1=beta1,
        beta2=beta2,
        rest1=1 - beta1,
        rest2=1 - beta2,
        epsilon=float(group["eps"]),
        step_size=lr / (1 - beta1**step),
        root_scale=1 / math.sqrt(1 - beta2**step),
    )


class Adam(_AdamUpdate, torch.optim.Adam):
    """:class:`torch.optim.Adam`, updated in one pass over memory, with moments in BF16.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in PyTorch.
        state_dtype: of the moments. In BF16 the first one is rounded to nearest and the second one
            stochastically, which takes 4 bytes a parameter in place of 8.
        seed: of the random bits of stochastic rounding.

    Raises:
        ValueError: an option is out of its range, or a parameter is not FP32 on the CPU.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self.keep_state_in(state_dtype, seed)


class AdamW(_AdamUpdate, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`, updated in one pass over memory, with moments in BF16.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in PyTorch.
        state_dtype, seed: as in :class:`Adam`.

    Raises:
        ValueError: an option is out of its range, or a parameter is not FP32 on the CPU.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        self.keep_state_in(state_dtype, seed)
