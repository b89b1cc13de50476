"""The training loop around the compiled graph, and its parts."""

from __future__ import annotations

from optcpu.runtime.callbacks import Callback
from optcpu.runtime.checkpoint.folder import CheckpointFolder
from optcpu.runtime.data.datasets import SyntheticDataset
from optcpu.runtime.data.tokens import TokenDataset, tokenize_files
from optcpu.runtime.freezing.freezer import DynamicFreezer
from optcpu.runtime.jobs import Job
from optcpu.runtime.saving import TrainingDiverged
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
