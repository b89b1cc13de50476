"""SGD with its momentum in BF16."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optcpu.optim import native
from optcpu.optim.base import Group, StoredOptimizer
from optcpu.optim.formats import Format
from optcpu.optim.rules import Constants, Slot


class SGD(StoredOptimizer, torch.optim.SGD):
    """:class:`torch.optim.SGD`, updated in one pass over memory, with its momentum in BF16.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in PyTorch.
        state_dtype: of the momentum. BF16 is rounded to nearest.
        seed: of the random bits that stored weights are rounded by.

    Raises:
        ValueError: an option is out of its range, or a parameter is not FP32 on the CPU.
    """

    moments: ClassVar[dict[str, Format]] = {"momentum_buffer": Format.NEAREST}
    takes_sparse_gradients: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self.keep_state_in(state_dtype, seed)

    def slot(self, group: Group, parameter: Tensor, seed: int) -> Slot:
        state = self.state[parameter] if group["momentum"] else {}
        is_first = state.get("momentum_buffer") is None
        slot = self.new_slot(self.shared(_constants, group, is_first), parameter, seed)
        if group["momentum"]:
            slot.first = self.moment(slot, state, "momentum_buffer")
        return slot

    def update(self, slots: list[Slot]) -> None:
        native.sgd(slots)


def _constants(group: Group, is_first: bool) -> Constants:
    return Constants(
        coupled_decay=float(group["weight_decay"]),
        beta1=float(group["momentum"]),
        # The first gradient is the momentum, undampened.
        rest1=1.0 if is_first else 1 - float(group["dampening"]),
        step_size=float(group["lr"]),
        nesterov=bool(group["nesterov"]),
    )
