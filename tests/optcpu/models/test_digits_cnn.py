from __future__ import annotations

import torch
import torch.nn.functional as F

from optcpu.models import digits_cnn


def test_maps_images_to_logits() -> None:
    model = digits_cnn()
    assert model(torch.rand(5, 1, 8, 8)).shape == (5, 10)
    assert digits_cnn(classes=3)(torch.rand(2, 1, 8, 8)).shape == (2, 3)


def test_has_the_size_that_its_docstring_names() -> None:
    parameters = sum(parameter.numel() for parameter in digits_cnn().parameters())
    assert round(parameters / 1e3) == 94


def test_every_parameter_learns() -> None:
    model = digits_cnn()
    F.cross_entropy(model(torch.rand(16, 1, 8, 8)), torch.arange(16) % 10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
