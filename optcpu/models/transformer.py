"""The block of pre-norm transformers (Vaswani et al., 2017; Radford et al., 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and feed-forward, each normalised first and added to the residual stream.

    Maps ``[batch, time, width]`` to the same shape.

    Args:
        width: of the residual stream; a multiple of ``heads``.
        heads: of the attention.
        dropout: of the attention's weights and of what is added to the residual stream.
        causal: whether a token sees itself and what came before alone.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0, causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, dropout=dropout, causal=causal)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        branch: Tensor = self.feed_forward(self.feed_forward_norm(x))
        return x + branch


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself; the arguments are those of :class:`Block`."""

    def __init__(self, width: int, heads: int, *, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        heads = (batch, time, self.heads, width // self.heads)
        query, key, value = (t.view(heads).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=self.causal,
        )
        merged = attended.transpose(1, 2).reshape(batch, time, width)
        projected: Tensor = self.dropout(self.projection(merged))
        return projected


class FeedForward(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.expansion = nn.Linear(width, 4 * width)
        self.activation = nn.GELU(approximate="tanh")
        self.projection = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.dropout(self.projection(self.activation(self.expansion(x))))
        return projected


def initialise(module: nn.Module) -> None:
    """GPT-2's initialisation of a linear layer or an embedding, for ``module.apply``."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
