from __future__ import annotations

import torch

from optcpu.models.transformer import Block


def test_without_a_mask_the_order_of_tokens_does_not_matter() -> None:
    block = Block(32, 4, causal=False)
    x = torch.randn(2, 7, 32)
    order = torch.randperm(7)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order])


def test_a_causal_block_does_not_look_ahead() -> None:
    block = Block(32, 4, causal=True)
    x = torch.randn(2, 7, 32)
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(block(changed)[:, :4], block(x)[:, :4])
    assert not torch.allclose(block(changed)[:, 4:], block(x)[:, 4:])
