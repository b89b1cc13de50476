from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from optcpu.models import GPT2, GPT2Config, gpt2_small

TINY = GPT2Config(vocab_size=50, context_length=16, layers=2, heads=2, width=8)


def test_small_has_the_published_size() -> None:
    with torch.device("meta"):
        model = gpt2_small()
    # Shared weights count once: 124,439,808 is the size of OpenAI's released model.
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    assert model.lm_head.weight is model.token_embedding.weight


def test_agrees_with_transformers() -> None:
    """The same weights in an independent implementation give the same logits and gradients."""
    try:
        from transformers import GPT2Config as TheirConfig
        from transformers import GPT2LMHeadModel
    except ImportError as error:  # also where something that it imports is broken
        pytest.skip(f"transformers cannot be imported: {error}")
    ours = GPT2(TINY)
    theirs = GPT2LMHeadModel(
        TheirConfig(
            vocab_size=50,
            n_positions=16,
            n_layer=2,
            n_head=2,
            n_embd=8,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).train()
    _copy_weights(ours, theirs)
    tokens = torch.randint(50, (3, 10))

    logits, expected = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(logits, expected)
    logits.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(ours.token_embedding.weight.grad, theirs.transformer.wte.weight.grad)
    torch.testing.assert_close(
        ours.blocks[0].attention.qkv.weight.grad.T, theirs.transformer.h[0].attn.c_attn.weight.grad
    )


def _copy_weights(ours: GPT2, theirs: torch.nn.Module) -> None:
    # transformers keeps the projections as Conv1D, whose weight is transposed.
    source = theirs.transformer
    pairs = [
        (ours.token_embedding, source.wte),
        (ours.position_embedding, source.wpe),
        (ours.norm, source.ln_f),
    ]
    transposed = []
    for block, other in zip(ours.blocks, source.h, strict=True):
        pairs += [(block.attention_norm, other.ln_1), (block.feed_forward_norm, other.ln_2)]
        transposed += [
            (block.attention.qkv, other.attn.c_attn),
            (block.attention.projection, other.attn.c_proj),
            (block.feed_forward.expansion, other.mlp.c_fc),
            (block.feed_forward.projection, other.mlp.c_proj),
        ]
    for module, other in pairs:
        module.load_state_dict(other.state_dict())
    for linear, convolution in transposed:
        linear.load_state_dict({"weight": convolution.weight.T, "bias": convolution.bias})


def test_a_token_does_not_see_later_ones() -> None:
    model = GPT2(TINY)
    tokens = torch.randint(50, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % 50
    difference = (model(tokens) - model(changed)).abs().amax(dim=-1)[0]
    assert difference[:5].max() == 0
    assert difference[5] > 0


def test_starts_near_the_uniform_distribution() -> None:
    model = GPT2(TINY)
    tokens = torch.randint(50, (4, 16))
    loss = F.cross_entropy(model(tokens).flatten(0, 1), torch.randint(50, (4, 16)).flatten())
    assert loss.item() == pytest.approx(torch.tensor(50.0).log().item(), abs=0.05)


def test_dropout_acts_in_training_only() -> None:
    model = gpt2_small(vocab_size=50, context_length=16, layers=1, heads=2, width=8, dropout=0.5)
    tokens = torch.randint(50, (1, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_copy_keeps_the_weights_tied() -> None:
    model = copy.deepcopy(GPT2(TINY))
    assert model.lm_head.weight is model.token_embedding.weight


def test_too_long_an_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"17 tokens do not fit into a context of 16"):
        GPT2(TINY)(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be positive, got 0"),
        ({"width": 10, "heads": 4}, "multiple of heads"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_wrong_configuration_is_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt2_small(**changes)
