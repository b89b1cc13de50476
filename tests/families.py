"""Small models of the families that people train, each with its inputs and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: what it is called in test reports.
        build: makes a freshly initialised model, FP32, in training mode, without dropout.
        inputs: makes random positional and keyword arguments for a batch of the given size.
        batch: the usual batch size.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    batch: int = 32


def tensors_of(output: Any) -> dict[str, Tensor]:
    """The floating-point tensors of a model's output by name, whatever holds them."""
    if isinstance(output, Tensor):
        return {"output": output} if output.is_floating_point() else {}
    if is_dataclass(output) and not isinstance(output, dict):
        output = {f.name: getattr(output, f.name) for f in fields(output)}
    if isinstance(output, dict):
        items = [(str(key), part) for key, part in output.items()]
    elif isinstance(output, (tuple, list)):
        items = [(str(index), part) for index, part in enumerate(output)]
    else:
        return {}
    return {
        f"{key}.{name}" if name != "output" else key: tensor
        for key, part in items
        for name, tensor in tensors_of(part).items()
    }


def loss_of(output: Any) -> Tensor:
    """A scalar that every output tensor takes part in, with a gradient that differs per element."""
    losses = []
    for tensor in tensors_of(output).values():
        if tensor.requires_grad:
            weights = torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)
            losses.append((tensor.float() * weights).mean() + tensor.float().square().mean())
    return torch.stack(losses).sum()


class Mlp(nn.Module):
    """Linear layers with every activation that can be fused."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(20, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(approximate="tanh"),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, width, bias=False),
            nn.Sigmoid(),
            nn.Linear(width, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Cnn(nn.Module):
    """Convolutions with batch normalisation and pooling, then a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class ResidualBlock(nn.Module):
    """A ResNet block with a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class Attention(nn.Module):
    """Multi-head self-attention by ``scaled_dot_product_attention``."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A transformer block, normalised before (GPT-2, ViT) or behind (BERT) its two parts."""

    def __init__(self, width: int, heads: int, *, causal: bool, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(width, heads, causal)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh" if causal else "none"),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))


class Gpt(nn.Module):
    """Token and position embeddings, two causal blocks, and logits."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 32), nn.Embedding(16, 32)
        self.blocks = nn.ModuleList(
            Block(32, 4, causal=True, norm_first=True) for _ in range(1 if tied else 2)
        )
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class BertEncoder(nn.Module):
    """Two bidirectional blocks with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 32, padding_idx=0)
        self.blocks = nn.ModuleList(Block(32, 4, causal=False, norm_first=False) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != 0)[:, None, None, :]
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return x


class Vit(nn.Module):
    """Patches of an image, a class token, one block, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 32) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 17, 32) * 0.02)
        self.block = Block(32, 4, causal=False, norm_first=True)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        token = self.token.expand(len(images), -1, -1)
        x = self.block(torch.cat([token, patches], 1) + self.positions)
        return self.head(self.norm(x)[:, 0])


class Mixer(nn.Module):
    """MLP-Mixer: linear layers over tokens, then over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.over_tokens = nn.Sequential(nn.Linear(9, 18), nn.GELU(), nn.Linear(18, 9))
        self.over_channels = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.over_channels(self.norm2(x))
        return self.head(x.mean(1))


class LstmClassifier(nn.Module):
    """An embedding, two LSTM layers, a classifier on the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.tokens(tokens))
        return self.head(states[:, -1])


class Autoencoder(nn.Module):
    """A bottleneck between linear layers, with a sigmoid output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 36), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


@dataclass
class Heads:
    """What :class:`MultiHead` returns when it returns a dataclass."""

    classes: Tensor
    box: Tensor


class MultiHead(nn.Module):
    """One trunk and two heads; returns a dict or a dataclass."""

    def __init__(self, returns: type[dict[str, Tensor]] | type[Heads]) -> None:
        super().__init__()
        self.returns = returns
        self.trunk = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.classes, self.box = nn.Linear(32, 7), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.trunk(x)
        return self.returns(classes=self.classes(x), box=self.box(x))


class ConvLinearMix(nn.Module):
    """Depthwise and pointwise convolutions around a gated linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(12, 12, 3, padding=1, groups=12)
        self.pointwise = nn.Conv1d(12, 24, 1)
        self.gate, self.up, self.down = (nn.Linear(24, 24) for _ in range(3))
        self.transposed = nn.ConvTranspose1d(24, 6, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.pointwise(self.depthwise(x))).transpose(1, 2)
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.transposed(x.transpose(1, 2))


class TwoInputs(nn.Module):
    """Two inputs, one by keyword, and an optional flag."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(10, 24), nn.Linear(14, 24)
        self.cross = nn.Parameter(torch.randn(8, 6, 6) * 0.2)
        self.head = nn.Linear(24, 8)

    def forward(self, a: Tensor, *, b: Tensor, halves: bool = False) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.left(a) + self.right(b))
        scale = 0.5 if halves else 1.0
        cross = torch.einsum("bi,oij,bj->bo", hidden[:, :6], self.cross, hidden[:, 6:12])
        return scale * self.head(hidden), cross


def _hugging_face_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def _hugging_face_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).train()


def _tokens(vocabulary: int, length: int) -> Callable[[int], Inputs]:
    return lambda batch: ((torch.randint(1, vocabulary, (batch, length)),), {})


def _numbers(*shape: int) -> Callable[[int], Inputs]:
    return lambda batch: ((torch.randn(batch, *shape),), {})


def _padded_tokens(batch: int) -> Inputs:
    tokens = torch.randint(1, 50, (batch, 12))
    lengths = torch.arange(batch) % 8 + 4
    return (tokens * (torch.arange(12) < lengths[:, None]),), {}


def _bert_arguments(batch: int) -> Inputs:
    tokens = torch.randint(1, 64, (batch, 12))
    lengths = torch.arange(batch) % 8 + 4
    mask = (torch.arange(12) < lengths[:, None]).long()
    return (), {"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(batch) % 3}


def _gpt2_arguments(batch: int) -> Inputs:
    tokens = torch.randint(1, 64, (batch, 12))
    return (), {"input_ids": tokens, "labels": tokens}


FAMILIES: tuple[Family, ...] = (
    Family("mlp", Mlp, _numbers(20)),
    Family("cnn-batchnorm", Cnn, _numbers(3, 12, 12)),
    Family("resnet-block", ResidualBlock, _numbers(4, 10, 10)),
    Family("gpt2-block", Gpt, _tokens(50, 12)),
    Family("bert-encoder", BertEncoder, _padded_tokens),
    Family("vit", Vit, _numbers(3, 16, 16)),
    Family("mlp-mixer", Mixer, _numbers(9, 24)),
    Family("lstm", LstmClassifier, _tokens(30, 7)),
    Family("autoencoder", Autoencoder, _numbers(36)),
    Family("tied-embeddings", lambda: Gpt(tied=True), _tokens(50, 12)),
    Family("dict-output", lambda: MultiHead(dict), _numbers(20)),
    Family("dataclass-output", lambda: MultiHead(Heads), _numbers(20)),
    Family("conv-linear-mix", ConvLinearMix, _numbers(12, 10)),
    Family("two-inputs", TwoInputs, lambda b: ((torch.randn(b, 10),), {"b": torch.randn(b, 14)})),
    Family("hf-gpt2", _hugging_face_gpt2, _gpt2_arguments),
    Family("hf-bert", _hugging_face_bert, _bert_arguments),
)

BY_NAME = {family.name: family for family in FAMILIES}
