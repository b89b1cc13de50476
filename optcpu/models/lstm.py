"""A language model with an LSTM (Hochreiter and Schmidhuber, 1997)."""

from __future__ import annotations

from torch import Tensor, nn


class LstmLanguageModel(nn.Module):
    """From token ids ``[batch, time]`` (int64) to logits ``[batch, time, vocab_size]`` (float32).

    The default has 4.5 million parameters.

    Args:
        vocab_size: number of different ids.
        width: of the embedding and of the state.
        layers: of the LSTM.
    """

    def __init__(self, vocab_size: int = 256, *, width: int = 512, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each of ``tokens``."""
        states, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.head(states)
        return logits
