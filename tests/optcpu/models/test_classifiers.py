"""The encoder, the vision transformer, ResNet-18 and the small CNN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optcpu.models import Encoder, VisionTransformer, resnet18, small_cnn, vit_tiny


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (lambda: resnet18(classes=1000), 11_689_512),  # torchvision's documentation
        (lambda: vit_tiny(classes=1000), 5_717_416),  # timm's vit_tiny_patch16_224
        (small_cnn, 1_199_882),  # PyTorch's MNIST example
        # BERT-base's 12 layers, the norm, 256 embeddings, 512 positions, 1000 classes.
        (lambda: Encoder(1000), 85_054_464 + 1536 + 768 * (256 + 512) + 769 * 1000),
    ],
)
def test_published_sizes(make: Callable[[], nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        model = make()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def _images(channels: int, side: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(4, channels, side, side)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (lambda: resnet18(classes=3), _images(3, 64)),
        (
            lambda: VisionTransformer(3, side=16, patch=8, layers=2, width=24, heads=3),
            _images(3, 16),
        ),
        (lambda: small_cnn(classes=3), _images(1, 28)),
        (
            lambda: Encoder(3, length=9, layers=2, width=24, heads=3),
            lambda: torch.arange(36).view(4, 9),
        ),
    ],
    ids=["resnet18", "vit", "small-cnn", "encoder"],
)
def test_every_parameter_learns(
    model: Callable[[], nn.Module], inputs: Callable[[], Tensor]
) -> None:
    torch.manual_seed(0)
    built = model()
    logits = built(inputs())
    assert logits.shape == (4, 3)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
