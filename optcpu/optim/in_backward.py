"""Updates during the backward pass: a gradient is used and freed as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from optcpu.errors import OptcpuError


class BackwardHooks:
    """Calls an update for each parameter when its gradient is complete, and frees the gradient.

    Args:
        parameters: whom to watch.
        update: given the place of a parameter among ``parameters``, updates it.
        accumulation_steps: how many backward passes make a gradient complete.

    Attributes:
        accumulation_steps: as given.
    """

    def __init__(
        self, parameters: list[Tensor], update: Callable[[int], None], accumulation_steps: int
    ) -> None:
        self.accumulation_steps = accumulation_steps
        self._passes = [0] * len(parameters)
        self._update = update
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._hook_for(place))
            for place, parameter in enumerate(parameters)
            if parameter.requires_grad
        ]

    def _hook_for(self, place: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if self._passes[place] == self.accumulation_steps:
                raise OptcpuError(
                    f"there were more than accumulation_steps = {self.accumulation_steps} backward "
                    "passes since the last optimizer.step(): call it after each "
                    f"{self.accumulation_steps}, though parameters are updated before"
                )
            self._passes[place] += 1
            if self._passes[place] == self.accumulation_steps:
                self._update(place)
                parameter.grad = None

        return hook

    def begin_step(self, done: int = 0) -> None:
        """Expect as many backward passes anew, of which ``done`` have been made."""
        self._passes = [done] * len(self._passes)

    def remove(self) -> None:
        """Watch nobody any more."""
        for handle in self._handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of an optimizer has other parameters: it updates them in ``step()``."""
