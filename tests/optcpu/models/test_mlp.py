from __future__ import annotations

import pytest
import torch
from torch import nn

from optcpu.models import mlp


def test_reference_model_has_51_million_parameters() -> None:
    with torch.device("meta"):
        model = mlp()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 784 * 4608 + 4608 + 2 * (4608 * 4608 + 4608) + 4608 * 1000 + 1000
    assert round(parameters / 1e6) == 51


def test_is_linear_layers_with_relu_between() -> None:
    model = mlp((5, 7, 3))
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    x = torch.randn(4, 5)
    first, _, last = model
    torch.testing.assert_close(model(x), last(torch.relu(first(x))))


@pytest.mark.parametrize("sizes", [(), (784,), (784, 0, 10), (784, -1)])
def test_rejects_sizes_that_make_no_model(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sizes must hold"):
        mlp(sizes)
