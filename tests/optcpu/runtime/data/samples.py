"""A dataset that shows which random numbers its samples were made with."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class Augmented(Dataset[Tensor]):
    """The number of a sample, and a random number of each of the three generators."""

    def __init__(self, size: int = 23) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        noise = [random.random(), float(np.random.randn()), float(torch.randn(()))]
        return torch.tensor([index, *noise], dtype=torch.float64)
