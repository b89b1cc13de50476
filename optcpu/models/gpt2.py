"""GPT-2 (Radford et al., 2019): a pre-norm transformer decoder with learned positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optcpu.models.transformer import Block, initialise


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
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, dropout=config.dropout, causal=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding.weight
        self.apply(initialise)
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


def _scale_residual_projections(block: nn.Module, layers: int) -> None:
    # Each block adds two branches to the residual stream; the scaling keeps its variance
    # independent of depth (section 2.3 of the paper).
    for branch in block.children():
        projection = getattr(branch, "projection", None)
        if projection is not None:
            nn.init.normal_(projection.weight, std=0.02 / (2 * layers) ** 0.5)
