from __future__ import annotations

import torch
import torch.nn.functional as F

from optcpu.models import LstmLanguageModel


def test_has_the_size_that_its_docstring_names() -> None:
    parameters = sum(parameter.numel() for parameter in LstmLanguageModel().parameters())
    assert round(parameters / 1e6, 1) == 4.5


def test_a_token_does_not_see_later_ones() -> None:
    model = LstmLanguageModel(20, width=16)
    tokens = torch.randint(20, (3, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 20
    torch.testing.assert_close(model(changed)[:, :5], model(tokens)[:, :5])
    assert not torch.allclose(model(changed)[:, 5:], model(tokens)[:, 5:])


def test_every_parameter_learns() -> None:
    model = LstmLanguageModel(20, width=16)
    tokens = torch.arange(40).view(2, 20) % 20
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
