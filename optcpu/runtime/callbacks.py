"""What a user may hook into a training run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optcpu.runtime.trainer import Trainer, TrainingResult


class Callback:
    """Called at the stations of a run; override what you need.

    A callback that keeps a state which matters for an exact resume returns it in :meth:`state_dict`:
    nested dicts, lists, tuples, numbers, strings, tensors.
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Everything is ready, a checkpoint is loaded if there is one; the first step comes next."""

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """An optimizer step is made. ``metrics`` has at least ``loss`` and ``lr``."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """All training data of an epoch have been used."""

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """A validation is done."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """A checkpoint is written."""

    def on_train_end(self, trainer: Trainer, result: TrainingResult) -> None:
        """The run has ended, for whatever reason but an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint shall hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
