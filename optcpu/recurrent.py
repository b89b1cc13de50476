"""Models with recurrent layers, which Dynamo does not capture by itself.

They are captured here where their kernel can run, and become what :mod:`passes.recurrent` makes of them.
Elsewhere, and around LSTMs with projections and layers with a forward of their own, a function that calls
one runs eagerly; only the functions below it are compiled. No pass reaches the layer then, so the whole
model runs under autocast, which makes an LSTM use oneDNN's BF16 kernels. What the model returns keeps the
dtype it would have without.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._C import DispatchKey
from torch._dynamo import config as dynamo_config
from torch.utils._pytree import tree_flatten, tree_unflatten

from passes.recurrent import DECOMPOSITIONS
from passes.recurrent_steps import kernel_available

NOT_CAPTURED = "its recurrent layers are not captured"


def is_captured(model: nn.Module, precision: str) -> bool:
    """Whether ``model`` has recurrent layers, and all are such as can be captured here."""
    layers = _recurrent_layers(model)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return bool(layers) and all(map(_can_be_captured, layers)) and kernel_available(dtype)


def runs_eagerly_in_part(model: nn.Module, precision: str) -> bool:
    """Whether ``model`` has recurrent layers around which nothing is compiled."""
    return bool(_recurrent_layers(model)) and not is_captured(model, precision)


def needs_autocast(model: nn.Module, precision: str) -> bool:
    """Whether BF16 reaches a layer of ``model`` through autocast alone.

    Not on processors without AVX512, where oneDNN has no BF16 kernel for an LSTM and autocast raises.
    """
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return precision == "bf16" and runs_eagerly_in_part(model, precision) and supported


def _recurrent_layers(model: nn.Module) -> list[nn.RNNBase]:
    return [layer for layer in model.modules() if isinstance(layer, nn.RNNBase)]


def _can_be_captured(layer: nn.RNNBase) -> bool:
    known = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)
    return type(layer).forward in known and layer.proj_size == 0


class _Capturing(threading.local):
    """How often a thread has entered :func:`recurrent_layers_taken_apart` and not left it."""

    depth = 0


_capturing = _Capturing()


@contextmanager
def recurrent_layers_taken_apart() -> Iterator[None]:
    """Within it, tracing finds in ``torch.lstm`` and its like what :mod:`passes.recurrent` makes of them.

    PyTorch would write down every step by itself. What else is traced in this process is not concerned.
    """
    _replace_decompositions()
    _capturing.depth += 1
    try:
        yield
    finally:
        _capturing.depth -= 1


@functools.cache
def _replace_decompositions() -> None:
    for operator, own in DECOMPOSITIONS.items():
        for key in (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd):
            operator.py_kernels[key] = _own_if_capturing(own, operator.py_kernels[key])
        operator._dispatch_cache.clear()


def _own_if_capturing(own: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (own if _capturing.depth else other)(*args, **kwargs)

    return chosen


def with_recurrent_layers(
    call: Callable[..., Any], model: nn.Module, precision: str
) -> Callable[..., Any]:
    """``call``, which Dynamo compiles and which calls ``model``, as its recurrent layers need it."""
    if is_captured(model, precision):
        return _capturing_layers(call)
    return under_autocast(call) if needs_autocast(model, precision) else call


def _capturing_layers(call: Callable[..., Any]) -> Callable[..., Any]:
    def call_capturing(*args: Any, **kwargs: Any) -> Any:
        before = dynamo_config.allow_rnn
        dynamo_config.allow_rnn = True
        try:
            with recurrent_layers_taken_apart():
                return call(*args, **kwargs)
        finally:
            dynamo_config.allow_rnn = before

    return call_capturing


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
