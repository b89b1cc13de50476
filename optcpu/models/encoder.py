"""A transformer encoder that classifies sequences of bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optcpu.models.transformer import Block, initialise


class Encoder(nn.Module):
    """From token ids ``[batch, time]`` (int64) to logits ``[batch, classes]`` (float32).

    Embedding, learned positions, pre-norm blocks of full attention, the mean over time, a linear layer.
    The default is BERT-base's body (Devlin et al., 2019), 86 million parameters with 1000 classes.

    Args:
        classes: number of classes.
        vocab_size: number of different ids.
        length: of the longest sequence.
        layers: number of blocks.
        width: of the residual stream; a multiple of ``heads``.
        heads: of each block's attention.
    """

    def __init__(
        self,
        classes: int,
        *,
        vocab_size: int = 256,
        length: int = 512,
        layers: int = 12,
        width: int = 768,
        heads: int = 12,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.apply(initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the class of each sequence."""
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(dim=1))
        return logits
