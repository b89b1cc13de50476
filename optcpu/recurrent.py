"""Models with recurrent layers, which Dynamo does not capture.

A function that calls ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` runs eagerly; only the functions below it are
compiled. No pass reaches the recurrent layer, so the whole model runs under autocast, which makes that
layer use oneDNN's BF16 kernels. What the model returns keeps the dtype it would have without.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten


def has_recurrent_layers(model: nn.Module) -> bool:
    """Whether a module of ``model`` is recurrent."""
    return any(isinstance(layer, nn.RNNBase) for layer in model.modules())


def needs_autocast(model: nn.Module, precision: str) -> bool:
    """Whether BF16 reaches a layer of ``model`` through autocast alone.

    Not on processors without AVX512, where oneDNN has no BF16 kernel for an LSTM and autocast raises.
    """
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return precision == "bf16" and has_recurrent_layers(model) and supported


def under_autocast(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` under BF16 autocast, with FP32 results in place of BF16 ones."""

    def call_under_autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            result = call(*args, **kwargs)
        return _widened(result)

    return call_under_autocast


def _widened(result: Any) -> Any:
    """``result`` with FP32 tensors for BF16 ones, also in dataclasses, which pytree passes over."""
    if isinstance(result, torch.Tensor):
        return result.float() if result.dtype == torch.bfloat16 else result
    if dataclasses.is_dataclass(result) and not isinstance(result, (type, dict)):
        wide = copy.copy(result)
        for field in dataclasses.fields(result):
            object.__setattr__(wide, field.name, _widened(getattr(result, field.name)))
        return wide
    leaves, structure = tree_flatten(result)
    if len(leaves) == 1 and leaves[0] is result:
        return result
    return tree_unflatten([_widened(leaf) for leaf in leaves], structure)
