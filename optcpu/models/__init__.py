"""The reference models: plain PyTorch, random weights, nothing downloaded."""

from __future__ import annotations

from optcpu.models.digits_cnn import digits_cnn
from optcpu.models.encoder import Encoder
from optcpu.models.gpt2 import GPT2, GPT2Config, gpt2_small
from optcpu.models.lstm import LstmLanguageModel
from optcpu.models.mlp import mlp
from optcpu.models.resnet import resnet18
from optcpu.models.small_cnn import small_cnn
from optcpu.models.vit import VisionTransformer, vit_tiny

__all__ = [
    "GPT2",
    "Encoder",
    "GPT2Config",
    "LstmLanguageModel",
    "VisionTransformer",
    "digits_cnn",
    "gpt2_small",
    "mlp",
    "resnet18",
    "small_cnn",
    "vit_tiny",
]
