"""How many steps a run is to make."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Plan:
    """The steps of a run, as they are known when it begins or goes on.

    Attributes:
        batches: micro-batches in one epoch of this process; None if unknown.
        accumulation_steps: micro-batches in a step.
        epochs: of the run; None where its steps are given.
        total: optimizer steps in the whole run; None if unknown.
    """

    batches: int | None
    accumulation_steps: int
    epochs: int | None
    total: int | None

    @classmethod
    def of(
        cls, batches: int | None, accumulation_steps: int, epochs: int | None, steps: int | None
    ) -> Plan:
        """That of a new run, of ``epochs`` or of ``steps``."""
        plan = cls(batches, accumulation_steps, epochs, steps)
        if steps is None and plan.per_epoch is not None:
            plan = replace(plan, total=plan.per_epoch * (epochs or 0))
        return plan

    @property
    def per_epoch(self) -> int | None:
        """Optimizer steps in one epoch, the incomplete last one included; None if unknown."""
        return None if self.batches is None else self.steps_for(self.batches)

    def steps_for(self, batches: int) -> int:
        """Optimizer steps for as many micro-batches."""
        return math.ceil(batches / self.accumulation_steps)

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def after(self, saved: dict[str, Any] | None, step: int, epoch: int, batches_left: int) -> Plan:
        """That of a run that goes on, which others than this one may have begun.

        With the same epochs as before, the run ends where it would have ended without interruption.
        With epochs of another number of steps (of another ``batch_size``, say, or number of processes), it
        ends after what is left of them.

        Args:
            saved: what :meth:`state_dict` gave then; None if that was not saved.
            step: optimizer steps made.
            epoch: epochs ended.
            batches_left: in the epoch that is begun.
        """
        if self.epochs is None or self.per_epoch is None or saved is None:
            return self
        before = Plan(**saved)
        if before.per_epoch == self.per_epoch and before.epochs and before.total is not None:
            more = (self.epochs - before.epochs) * self.per_epoch
            return replace(self, total=before.total + more)
        whole_epochs = max(0, self.epochs - epoch - 1)
        begun = self.steps_for(batches_left) if epoch < self.epochs else 0
        return replace(self, total=step + begun + whole_epochs * self.per_epoch)
