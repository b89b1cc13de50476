"""A vision transformer (Dosovitskiy et al., 2021) of the size "tiny" (Touvron et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optcpu.models.transformer import Block, initialise


class VisionTransformer(nn.Module):
    """From images ``[batch, channels, side, side]`` to logits ``[batch, classes]``, both float32.

    The default is ViT-tiny: 5.5 million parameters with ten classes.

    Args:
        classes: number of classes.
        side: of an image in pixels; a multiple of ``patch``.
        patch: side of a patch in pixels.
        channels: of an image.
        layers: number of blocks.
        width: of the residual stream; a multiple of ``heads``.
        heads: of each block's attention.
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        side: int = 224,
        patch: int = 16,
        channels: int = 3,
        layers: int = 12,
        width: int = 192,
        heads: int = 3,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the class of each image."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        first = self.class_token.expand(len(images), -1, -1)
        x = self.blocks(torch.cat([first, patches], dim=1) + self.positions)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def vit_tiny(classes: int = 10) -> VisionTransformer:
    """ViT-tiny for images of 224 x 224 pixels in patches of 16 x 16."""
    return VisionTransformer(classes)
