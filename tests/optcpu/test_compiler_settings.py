"""Settings of PyTorch's compiler are those of optcpu within a call alone."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.fx.experimental import _config as shape_config

import optcpu
from optcpu.compiled_call import compiled_call
from optcpu.compiler_settings import with_hooks_guarded, with_sizes_apart


def test_settings_are_put_back() -> None:
    seen = []

    def fails() -> None:
        seen.append(torch._dynamo.config.skip_nnmodule_hook_guards)
        seen.append(shape_config.use_duck_shape)
        raise KeyError

    def settings() -> list[bool]:
        return [torch._dynamo.config.skip_nnmodule_hook_guards, shape_config.use_duck_shape]

    before = settings()
    with pytest.raises(KeyError):
        with_hooks_guarded(with_sizes_apart(fails))()
    assert seen == [False, False]
    assert settings() == before


def test_a_batch_as_large_as_the_features_is_one_of_many() -> None:
    """Else the code for it would be another once a batch of another size was there."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    optcpu.optimize(model, precision="fp32", dynamic=True, fallback=False)
    call = compiled_call(model)
    assert call is not None
    call.backend.codegen = False
    regions = []
    for size in (16, 11, 16, 7):
        model(torch.randn(size, 16)).sum().backward()
        regions.append(call.record.regions)
    assert regions == [1, 1, 1, 1]


def test_an_input_of_the_wrong_shape_is_told_of_once() -> None:
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        optcpu.optimize(model, precision="fp32")
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            model(torch.randn(4, 9))
        assert not logged
        with pytest.raises(RuntimeError):  # what is not ours is told as ever
            torch.compile(nn.Linear(8, 16), backend="eager")(torch.randn(4, 9))
        assert logged
    finally:
        logger.removeHandler(handler)
