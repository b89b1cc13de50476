"""What PyTorch's operators are in JAX: those that the models of the suite consist of.

Products, convolutions, attention and recurrent layers take their operands in ``Policy.dtype``, as under
``torch.autocast``; norms and losses are computed in FP32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from optcpu.errors import OptcpuError

aten = torch.ops.aten

Array = Any
Rule = Callable[..., Any]


@dataclass(frozen=True)
class Policy:
    """The precision of products.

    Attributes:
        dtype: of their operands and results.
    """

    dtype: Any

    def cast(self, *arrays: Array | None) -> list[Any]:
        """Floating-point ``arrays`` in ``dtype``."""
        return [None if array is None else array.astype(self.dtype) for array in arrays]


def _linear(policy: Policy, x: Array, weight: Array, bias: Array | None = None) -> Array:
    x, weight, bias = policy.cast(x, weight, bias)
    product = jnp.matmul(x, weight.T)
    return product if bias is None else product + bias


def _embedding(policy: Policy, weight: Array, indices: Array, padding_index: int = -1) -> Array:
    rows = weight
    if padding_index >= 0:  # that row gets no gradient
        rows = weight.at[padding_index].set(lax.stop_gradient(weight[padding_index]))
    return jnp.take(rows, indices, axis=0)


def _layer_norm(
    policy: Policy,
    x: Array,
    shape: Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Array:
    axes = tuple(range(-len(shape), 0))
    wide = x.astype(jnp.float32)
    mean, variance = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
    return _scaled((wide - mean) * lax.rsqrt(variance + eps), weight, bias).astype(x.dtype)


def _scaled(x: Array, weight: Array | None, bias: Array | None) -> Array:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def batch_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mean: Array | None,
    variance: Array | None,
    momentum: float,
    eps: float,
) -> tuple[Array, Array | None, Array | None]:
    """Normalised in training mode over all axes but the second; and the new running statistics."""
    axes = (0, *range(2, x.ndim))
    along = (1, -1, *[1] * (x.ndim - 2))
    wide = x.astype(jnp.float32)
    own_mean, own_variance = wide.mean(axes), wide.var(axes)
    normal = (wide - own_mean.reshape(along)) * lax.rsqrt(own_variance.reshape(along) + eps)
    scale, shift = (None if one is None else one.reshape(along) for one in (weight, bias))
    result = _scaled(normal, scale, shift).astype(x.dtype)
    if mean is None or variance is None:
        return result, None, None
    count = x.size // x.shape[1]
    unbiased = own_variance * (count / (count - 1))
    new_mean = lax.stop_gradient((1 - momentum) * mean + momentum * own_mean)
    new_variance = lax.stop_gradient((1 - momentum) * variance + momentum * unbiased)
    return result, new_mean, new_variance


def _attention(
    policy: Policy,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    _refuse(dropout > 0, "dropout in attention")
    _refuse(mask is not None or enable_gqa, "attention with a mask or grouped queries")
    query, key, value = policy.cast(query, key, value)
    scores = jnp.matmul(query, key.swapaxes(-1, -2)).astype(jnp.float32)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(allowed, scores, -jnp.inf)
    return jnp.matmul(jax.nn.softmax(scores, axis=-1).astype(value.dtype), value)


def _dropout(policy: Policy, x: Array, p: float, train: bool) -> Array:
    _refuse(train and p > 0, f"dropout of {p}")
    return x


def _convolution(
    policy: Policy,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Array:
    x, weight, bias = policy.cast(x, weight, bias)
    result = lax.conv_general_dilated(
        x,
        weight,
        window_strides=_pair(stride),
        padding=[(one, one) for one in _pair(padding)],
        rhs_dilation=_pair(dilation),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=groups,
    )
    return result if bias is None else result + bias.reshape(1, -1, 1, 1)


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    first, *others = sizes
    return (first, others[0] if others else first)


def _max_pool(
    policy: Policy,
    x: Array,
    size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Array:
    _refuse(ceil_mode, "max pooling with ceil_mode")
    return lax.reduce_window(
        x,
        -jnp.inf,
        lax.max,
        (1, 1, *_pair(size)),
        (1, 1, *_pair(stride or size)),
        [(0, 0), (0, 0), *((one, one) for one in _pair(padding))],
        window_dilation=(1, 1, *_pair(dilation)),
    )


def _adaptive_mean(policy: Policy, x: Array, size: Sequence[int]) -> Array:
    _refuse(_pair(size) != (1, 1), f"adaptive pooling to {list(size)}")
    return x.mean((2, 3), keepdims=True)


def _cross_entropy(
    policy: Policy,
    logits: Array,
    target: Array,
    weight: Array | None = None,
    reduction: int = 1,
    ignored: int = -100,
    smoothing: float = 0.0,
) -> Array:
    _refuse(weight is not None or reduction != 1 or smoothing > 0, "cross entropy with options")
    logits = jnp.moveaxis(logits.astype(jnp.float32), 1, -1)
    counts = target != ignored
    chosen = jnp.take_along_axis(logits, jnp.where(counts, target, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.where(counts, losses, 0).sum() / counts.sum()


def _mean_squared_error(policy: Policy, x: Array, target: Array, reduction: int = 1) -> Array:
    _refuse(reduction != 1, "mean squared error with another reduction")
    return jnp.square(x.astype(jnp.float32) - target).mean()


def _lstm(
    policy: Policy,
    x: Array,
    start: Sequence[Array],
    weights: Sequence[Array],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Array, Array, Array]:
    _refuse(bidirectional or dropout > 0, "LSTMs in two directions or with dropout")
    outputs = x.swapaxes(0, 1) if batch_first else x  # time comes first
    hiddens, cells = [], []
    each = len(weights) // layers
    for layer in range(layers):
        own = policy.cast(*weights[layer * each : (layer + 1) * each])
        state = tuple(policy.cast(start[0][layer], start[1][layer].astype(jnp.float32)))
        outputs, (hidden, cell) = _lstm_layer(policy, outputs, state, own, has_biases)
        hiddens.append(hidden)
        cells.append(cell)
    if batch_first:
        outputs = outputs.swapaxes(0, 1)
    return outputs, jnp.stack(hiddens), jnp.stack(cells)


def _lstm_layer(
    policy: Policy, x: Array, state: tuple[Array, Array], own: Sequence[Array], has_biases: bool
) -> tuple[Array, tuple[Array, Array]]:
    (x,) = policy.cast(x)
    from_input = jnp.matmul(x, own[0].T)  # of all times at once
    if has_biases:
        from_input = from_input + own[2] + own[3]

    def step(state: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        hidden, cell = state
        gates = jnp.split(inputs + jnp.matmul(hidden, own[1].T), 4, axis=-1)
        into, forget, out = (jax.nn.sigmoid(gates[index]) for index in (0, 1, 3))
        cell = forget * cell + into * jnp.tanh(gates[2])
        hidden = out * jnp.tanh(cell)
        return (hidden, cell), hidden

    state, outputs = lax.scan(step, state, from_input)
    return outputs, state


def _add(policy: Policy, x: Array, y: Array, *, alpha: float = 1) -> Array:
    return x + (y if alpha == 1 else y * alpha)


def _flatten(policy: Policy, x: Array, first: int = 0, last: int = -1) -> Array:
    first, last = first % x.ndim, last % x.ndim
    return x.reshape(*x.shape[:first], prod(x.shape[first : last + 1]), *x.shape[last + 1 :])


def _chunk(policy: Policy, x: Array, count: int, axis: int = 0) -> list[Array]:
    size = -(-x.shape[axis] // count)
    return list(jnp.split(x, list(range(size, x.shape[axis], size)), axis=axis))


def _expand(policy: Policy, x: Array, sizes: Sequence[int]) -> Array:
    kept = (1,) * (len(sizes) - x.ndim) + x.shape
    return jnp.broadcast_to(
        x, [own if size == -1 else size for own, size in zip(kept, sizes, strict=True)]
    )


def _gelu(policy: Policy, x: Array, *, approximate: str = "none") -> Array:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def _mean(policy: Policy, x: Array, axes: Sequence[int], keep: bool = False) -> Array:
    return x.astype(jnp.float32).mean(tuple(axes), keepdims=keep)


_DTYPES = {  # 32 bits are JAX's widest
    torch.float32: jnp.float32,
    torch.bfloat16: jnp.bfloat16,
    torch.int64: jnp.int32,
    torch.int32: jnp.int32,
    torch.bool: jnp.bool_,
}


def _to(policy: Policy, x: Array, dtype: torch.dtype, *_: Any) -> Array:
    _refuse(dtype not in _DTYPES, f"numbers of {dtype}")
    return x.astype(_DTYPES[dtype])


def _refuse(wrong: bool, what: str) -> None:
    if wrong:
        raise OptcpuError(f"the jax variant has no {what}")


RULES: dict[Any, Rule] = {
    operator.getitem: lambda policy, values, index: values[index],
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.layer_norm.default: _layer_norm,
    aten.scaled_dot_product_attention.default: _attention,
    aten.dropout.default: _dropout,
    aten.conv2d.default: _convolution,
    aten.max_pool2d.default: _max_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_mean,
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.mse_loss.default: _mean_squared_error,
    aten.broadcast_tensors.default: lambda policy, xs: jnp.broadcast_arrays(*xs),
    aten.lstm.input: _lstm,
    aten.relu.default: lambda policy, x: jax.nn.relu(x),
    aten.gelu.default: _gelu,
    aten.silu.default: lambda policy, x: jax.nn.silu(x),
    aten.tanh.default: lambda policy, x: jnp.tanh(x),
    aten.sigmoid.default: lambda policy, x: jax.nn.sigmoid(x),
    aten.add.Tensor: _add,
    aten.mul.Tensor: lambda policy, x, y: x * y,
    aten.mean.dim: _mean,
    aten.to.dtype: _to,
    aten._assert_tensor_metadata.default: lambda policy, *_, **__: None,
    aten.lift_fresh_copy.default: lambda policy, x: x,
    aten.detach_.default: lambda policy, x: lax.stop_gradient(x),
    aten.arange.default: lambda policy, end, **_: jnp.arange(end),
    aten.zeros.default: lambda policy, size, **_: jnp.zeros(size),
    aten.view.default: lambda policy, x, size: x.reshape(size),
    aten.reshape.default: lambda policy, x, size: x.reshape(size),
    aten.flatten.using_ints: _flatten,
    aten.transpose.int: lambda policy, x, one, other: x.swapaxes(one, other),
    aten.chunk.default: _chunk,
    aten.expand.default: _expand,
    aten.cat.default: lambda policy, xs, axis=0: jnp.concatenate(xs, axis),
    aten.select.int: lambda policy, x, axis, index: lax.index_in_dim(
        x, index, axis, keepdims=False
    ),
}
