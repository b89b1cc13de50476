"""The reference models: plain PyTorch, random weights, nothing downloaded."""

from __future__ import annotations

from optcpu.models.digits_cnn import digits_cnn
from optcpu.models.gpt2 import GPT2, GPT2Config, gpt2_small
from optcpu.models.mlp import mlp

__all__ = ["GPT2", "GPT2Config", "digits_cnn", "gpt2_small", "mlp"]
