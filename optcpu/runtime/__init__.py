"""The training loop around the compiled graph, and its parts."""

from __future__ import annotations

from optcpu.runtime.callbacks import Callback
from optcpu.runtime.checkpoint import CheckpointFolder
from optcpu.runtime.datasets import SyntheticDataset
from optcpu.runtime.freezer import DynamicFreezer
from optcpu.runtime.jobs import Job
from optcpu.runtime.loop import TrainingDiverged
from optcpu.runtime.tokens import TokenDataset, tokenize_files
from optcpu.runtime.trainer import Trainer, TrainingResult

__all__ = [
    "Callback",
    "CheckpointFolder",
    "DynamicFreezer",
    "Job",
    "SyntheticDataset",
    "TokenDataset",
    "Trainer",
    "TrainingDiverged",
    "TrainingResult",
    "tokenize_files",
]
