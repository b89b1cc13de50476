"""GPT-2 (Radford et al., 2019): a pre-norm transformer decoder with learned positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPT2Config:
    """The shape of the model; the defaults are those of GPT-2 small (124 million parameters).

    Raises:
        ValueError: A size is not positive, ``width`` is no multiple of ``heads``, or ``dropout``
            is not in [0, 1).
    """

    vocab_size: int = 50257
    context_length: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads, got width {self.width} and {self.heads} heads"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


def gpt2_small(**changes: Any) -> GPT2:
    """GPT-2 small with random weights.

    Args:
        **changes: Fields of :class:`GPT2Config` to set otherwise.
    """
    return GPT2(GPT2Config(**changes))


class GPT2(nn.Module):
    """From token ids ``[batch, time]`` (int64) to logits ``[batch, time, vocab_size]`` (float32).

    The output projection shares its weight with the token embedding.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding.weight
        self.apply(_initialise)
        for block in self.blocks:
            _scale_residual_projections(block, config.layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each of ``tokens``.

        Raises:
            ValueError: ``tokens`` is longer than the context.
        """
        time = tokens.shape[-1]
        if time > self.config.context_length:
            raise ValueError(
                f"{time} tokens do not fit into a context of {self.config.context_length}; "
                "cut the input or raise GPT2Config.context_length"
            )
        positions = torch.arange(time, device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


class Block(nn.Module):
    """Attention and feed-forward, each normalised first and added to the residual stream."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = CausalSelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        branch: Tensor = self.feed_forward(self.feed_forward_norm(x))
        return x + branch


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.projection = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        heads = (batch, time, self.heads, width // self.heads)
        query, key, value = (t.view(heads).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=True,
        )
        merged = attended.transpose(1, 2).reshape(batch, time, width)
        projected: Tensor = self.dropout(self.projection(merged))
        return projected


class FeedForward(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.expansion = nn.Linear(config.width, 4 * config.width)
        self.activation = nn.GELU(approximate="tanh")
        self.projection = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.dropout(self.projection(self.activation(self.expansion(x))))
        return projected


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _scale_residual_projections(block: nn.Module, layers: int) -> None:
    # Each block adds two branches to the residual stream; the scaling keeps its variance
    # independent of depth (section 2.3 of the paper).
    for branch in block.children():
        projection = getattr(branch, "projection", None)
        if projection is not None:
            nn.init.normal_(projection.weight, std=0.02 / (2 * layers) ** 0.5)
