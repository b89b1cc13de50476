"""Convolutions, and their gradients, as matrix products.

What the kernel sees at each place of an image is written out as one row. The output is a product of these
rows with the weight, the gradient of the weight one of the rows with the output's gradient, and that of the
input is another, whose rows are added up where they came from.

The rows take the memory of the image as often as the kernel has places. So those for the weight are written
for a few images at a time, or for a part of one, and their products are added up. oneDNN computes the
gradient of the weight at half the speed of its other products in FP32; from 64 channels on this is faster,
by a tenth to a half, and with images of 224 x 224 places twice as fast or more. The output and the input
gradient gain only with small images of many channels, at the end of a network, where nearly all of oneDNN's
time goes to the weight, which it reads for every image.

Source: Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document
Processing" (2006), section 3.1, "unfolding".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._prims_common import make_channels_last_strides_for, suggest_memory_format
from torch.nn.functional import pad

from passes.gemm import choose, is_small, matmul

# Of the input, the weight and the bias; None for one that is not wanted.
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
# From the output's gradient, the input and the weight.
Backward: TypeAlias = Callable[[Tensor, Tensor, Tensor], Gradients]

_DTYPES = (torch.float32, torch.bfloat16)  # of whose products the kernel is chosen

# The rows at hand may take this many times the weight's memory, or as much as the caches hold: more would
# cost more than it gains.
_ROWS_TO_WEIGHT = 2
_CACHED_BYTES = 8 * 2**20

# Rows are copied from pieces of the image, a row of a window each; smaller ones than this take too long.
_COPIED_BYTES = 128


def convolution(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """What ``aten.convolution`` does without a bias, by the way that is the fastest for these shapes.

    Args:
        x: shape (N, C, H, W), FP32 or BF16.
        weight: shape (O, C, h, w), same dtype.
        stride: along the height and the width.
        padding: with zeros, likewise.

    Returns:
        Shape (N, O, H', W'), laid out as ``x``.
    """
    return fastest_convolution(x, weight, stride, padding)(x, weight, stride, padding)


def fastest_convolution(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Callable[..., Tensor]:
    """What takes the arguments of :func:`convolution` and is the fastest for those like these."""
    if not all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight)):
        return native_convolution
    by_name: dict[str, Callable[..., Tensor]] = {"native": native_convolution, "product": output}
    arguments = (x, weight, stride, padding)
    runs = {name: functools.partial(way, *arguments) for name, way in by_name.items()}
    sizes = [tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding)]
    key = f"convolution {sizes} {str(x.dtype)[6:]} {torch.get_num_threads()}"
    return by_name[choose(key, runs, preferred="native")]


def native_convolution(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """PyTorch's own; takes what :func:`convolution` takes."""
    plain = ([1, 1], False, [0, 0], 1)  # dilation, transposed, output padding, groups
    result: Tensor = torch.ops.aten.convolution.default(x, weight, None, stride, padding, *plain)
    return result


def is_worth_a_product(places: int, weight: Tensor) -> bool:
    """Whether images are so small that the output could be faster as a product.

    Args:
        places: of the output, in all images.
        weight: shape (O, C, h, w), of known sizes.
    """
    if weight.dtype not in _DTYPES or places > _ROWS_TO_WEIGHT * weight.shape[0]:
        return False
    return not is_small(places * weight.numel(), weight.dtype)


def output(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """The output of a convolution, channels-last; takes what :func:`convolution` takes."""
    outputs, channels, height, width = weight.shape
    windows = _windows(x, (height, width), stride, padding)
    rows = windows.reshape(-1, height * width * channels)
    result = matmul(rows, weight.permute(0, 2, 3, 1).reshape(outputs, -1).t())
    return result.view(*windows.shape[:3], outputs).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Geometry:
    """What a convolution's gradients depend on besides tensors: the arguments of the operator in ATen.

    Attributes:
        bias_sizes: those of the bias; None without one.
        wanted: whether the gradients of input, weight and bias are; the rest is as in a convolution.
    """

    bias_sizes: Sequence[int] | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int
    wanted: Sequence[bool]

    @property
    def is_plain(self) -> bool:
        """Whether it can be done by products."""
        return not self.transposed and self.groups == 1 and all(step == 1 for step in self.dilation)


def convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *geometry: Any) -> Gradients:
    """What ``aten.convolution_backward`` does, by the way that is the fastest for these shapes."""
    return fastest_backward(gradient, x, weight, *geometry)(gradient, x, weight)


def fastest_backward(gradient: Tensor, x: Tensor, weight: Tensor, *geometry: Any) -> Backward:
    """The fastest way to the gradients of a convolution for arguments like these.

    Args:
        gradient: of the output.
        x: the input.
        weight: of the convolution.
        geometry: those of :class:`Geometry`.

    Returns:
        A function of the three tensors.
    """
    there = Geometry(*geometry)
    native = _Native(gradient, x, weight, there)
    x = native.seen(x)
    if not (there.is_plain and there.wanted[1] and _is_worth_measuring(gradient, x, weight)):
        return native
    of_input, _, of_bias = there.wanted
    others = dataclasses.replace(there, wanted=[of_input, False, of_bias])
    for_others = _Native(gradient, x, weight, others)
    by_name: dict[str, Backward] = {
        "native": native,
        "product for the weight": functools.partial(_product_for_weight, for_others, there),
    }
    if of_input and is_worth_a_product(_places(gradient), weight):
        by_name["products"] = functools.partial(_products, there)
    runs = {name: functools.partial(way, gradient, x, weight) for name, way in by_name.items()}
    sizes = [*map(tuple, (x.shape, weight.shape, there.stride, there.padding)), len(runs)]
    key = f"convolution backward {sizes} {str(x.dtype)[6:]} {torch.get_num_threads()}"
    return by_name[choose(key, runs, preferred="native")]


class _Native:
    """PyTorch's own way to the gradients, for tensors of the shapes and layouts of those given."""

    def __init__(self, gradient: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> None:
        self._strides = _strides_that_tell(x, gradient)
        *self._geometry, self._wanted = (getattr(geometry, f.name) for f in fields(Geometry))
        self._unseen: list[tuple[int, int]] = []
        if geometry.wanted[1] and x.dtype == torch.bfloat16:
            # oneDNN does not write there (PyTorch 2.13).
            read, written = (gradient, x) if geometry.transposed else (x, gradient)
            self._unseen = places_that_see_padding_alone(
                weight.shape[2:],
                read.shape[2:],
                written.shape[2:],
                geometry.stride,
                geometry.padding,
                geometry.dilation,
            )

    def seen(self, x: Tensor) -> Tensor:
        """``x`` as the kernels shall see it."""
        return x if self._strides is None else x.as_strided(x.shape, self._strides)

    def __call__(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Gradients:
        backward = torch.ops.aten.convolution_backward.default
        x = self.seen(x)
        of_input, of_weight, of_bias = backward(gradient, x, weight, *self._geometry, self._wanted)
        for axis, place in self._unseen:
            of_weight.select(2 + axis, place).zero_()
        return of_input, of_weight, of_bias


def _product_for_weight(
    for_others: Backward, geometry: Geometry, gradient: Tensor, x: Tensor, weight: Tensor
) -> Gradients:
    of_input, _, of_bias = for_others(gradient, x, weight)
    of_weight = weight_gradient(gradient, x, weight, geometry.stride, geometry.padding)
    return of_input, of_weight, of_bias


def _products(geometry: Geometry, gradient: Tensor, x: Tensor, weight: Tensor) -> Gradients:
    of_bias = gradient.sum((0, 2, 3)) if geometry.wanted[2] else None
    operands = (gradient, x, weight, geometry.stride, geometry.padding)
    return input_gradient(*operands), weight_gradient(*operands), of_bias


def places_that_see_padding_alone(
    sizes: Sequence[int],
    read: Sequence[int],
    written: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[tuple[int, int]]:
    """The axes and places of a kernel that lie outside of the image wherever it is put.

    Args:
        sizes: of the kernel.
        read: spatial sizes of what the convolution reads.
        written: of what it writes.
        stride, padding, dilation: of each spatial dimension, or of all.
    """
    stride, padding, dilation = (
        [*given] if len(given) == len(sizes) else [*given] * len(sizes)
        for given in (stride, padding, dilation)
    )
    unseen = []
    for axis, size in enumerate(sizes):
        for place in range(size):
            start = place * dilation[axis] - padding[axis]
            reached = range(start, start + stride[axis] * written[axis], stride[axis])
            if not any(0 <= position < read[axis] for position in reached):
                unseen.append((axis, place))
    return unseen


def _strides_that_tell(x: Tensor, gradient: Tensor) -> Sequence[int] | None:
    """Strides for ``x`` that tell its layout; None where its own do.

    Those of a single channel do not tell it. Written as those of channels-last, they bring about the kernel
    for that, which is several times as fast for the weight.
    """
    one_channel = x.dim() == 4 and x.shape[1] == 1 and x.is_contiguous()
    if one_channel and gradient.is_contiguous(memory_format=torch.channels_last):
        return make_channels_last_strides_for(x.shape)
    return None


def _is_worth_measuring(gradient: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether products could be faster: for channels-last images of many channels, with much to compute."""
    if x.dim() != 4 or x.dtype not in _DTYPES or suggest_memory_format(x) != torch.channels_last:
        return False
    if not all(t.is_contiguous(memory_format=torch.channels_last) for t in (gradient, x)):
        return False
    if x.shape[1] * weight.shape[3] * x.element_size() < _COPIED_BYTES:
        return False
    return not is_small(_places(gradient) * weight.numel(), x.dtype)


def _places(gradient: Tensor) -> int:
    """In all images of the output."""
    return gradient.numel() // gradient.shape[1]


def weight_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The gradient of a convolution's weight, of its shape, channels-last.

    Args:
        gradient: of the output, shape (N, O, H', W').
        x: the input, shape (N, C, H, W).
        weight: shape (O, C, h, w); only its shape counts.
        stride: along the height and the width.
        padding: with zeros, likewise.
    """
    outputs, channels, height, width = weight.shape
    windows = _windows(x, (height, width), stride, padding)
    by_place = gradient.permute(0, 2, 3, 1)
    # In FP32, as the products of many parts may be added up.
    total: Tensor | None = None
    for part in _parts(windows, _ROWS_TO_WEIGHT * weight.numel() * weight.element_size()):
        rows = windows[part].reshape(-1, height * width * channels)
        product = matmul(by_place[part].reshape(-1, outputs).t(), rows).float()
        total = product if total is None else total.add_(product)
    assert total is not None
    result = total.to(gradient.dtype).view(outputs, height, width, channels)
    return result.permute(0, 3, 1, 2)


def _windows(
    x: Tensor, kernel: tuple[int, int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """What the kernel sees at each place: a view of shape (N, H', W', h, w, C)."""
    image = x.permute(0, 2, 3, 1)
    if any(padding):
        image = pad(image, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = image.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    return windows.permute(0, 1, 2, 4, 5, 3)


def _parts(windows: Tensor, memory: int) -> Iterator[tuple[slice, slice]]:
    """Images and their rows of places of which ``memory`` bytes, or the caches, hold all windows."""
    images, places_high = windows.shape[:2]
    row_bytes = windows[0, 0].numel() * windows.element_size()
    rows = max(1, max(memory, _CACHED_BYTES) // row_bytes)
    images_at_once = max(1, rows // places_high)
    rows_at_once = min(rows, places_high)
    for image in range(0, images, images_at_once):
        for row in range(0, places_high, rows_at_once):
            yield slice(image, image + images_at_once), slice(row, row + rows_at_once)


def input_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The gradient of a convolution's input, of its shape, channels-last.

    Takes what :func:`weight_gradient` takes; of ``x`` only the shape counts.
    """
    images, channels, x_height, x_width = x.shape
    outputs, _, height, width = weight.shape
    out_height, out_width = gradient.shape[2:]
    rows = matmul(_by_place(gradient), weight.permute(0, 2, 3, 1).reshape(outputs, -1))
    windows = rows.view(images, out_height, out_width, height, width, channels)
    # In FP32, as up to height * width numbers are added up one by one.
    size = (images, x_height + 2 * padding[0], x_width + 2 * padding[1], channels)
    padded = torch.zeros(size, dtype=torch.float32)
    for row in range(height):
        for column in range(width):
            seen = padded[:, row:, column:][:, :: stride[0], :: stride[1]]
            seen[:, :out_height, :out_width] += windows[:, :, :, row, column]
    result = padded[:, padding[0] :, padding[1] :][:, :x_height, :x_width]
    return result.to(x.dtype).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _by_place(gradient: Tensor) -> Tensor:
    """``gradient``, shape (N, O, H', W'), as a matrix with a row for each place."""
    return gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])
