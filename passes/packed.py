"""Weights in the layout that a kernel multiplies fastest, kept from one product to the next.

To bring a weight into a blocked layout takes longer than one product gains by it. But a weight changes
once a step of the optimizer and is multiplied once a micro-batch, or more often where layers share it.
Whoever stores a weight, and sees to it that every write counts in a ``_version``, may have packed
copies kept (:func:`keep`), by which the fused operators multiply (:func:`product`) as soon as that pays.
A plain parameter must not be kept: a write to its ``.data`` is counted nowhere.
"""

from __future__ import annotations

import functools
import math
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.profiler import record_function

from passes.gemm import adoptions, fastest, is_small, kernels, remembered, shape_key, times

# Which part of the weight's memory, in which order, is multiplied by how many rows.
Place: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], int]
# Of the weight, and of what it is stored for.
Version: TypeAlias = tuple[int, int]

_NEVER = 0
_MOST_COPIES = 4  # of a weight: two directions, with as many rows as training and validation have


class Packing(Protocol):
    """A layout of weights, and the products by weights in it."""

    name: str

    def pack(self, weight: Tensor, rows: int, before: Any) -> Any:
        """``weight``, shape (N, K), packed for products with ``rows`` rows.

        Args:
            weight: FP32 or BF16, any strides.
            rows: M of the products to come.
            before: what this returned for the same place the last time, whose memory may be used
                again; None the first time.
        """

    def unpack(self, packed: Any) -> Tensor:
        """The weight that was packed, shape (N, K), bit for bit."""

    def linear(
        self, x: Tensor, packed: Any, bias: Tensor | None, activation: str, residual: Tensor | None
    ) -> Tensor:
        """``activation(x @ weight.T + bias)``, or ``x @ weight.T + bias + residual`` if that is given.

        ``activation`` is a key of :data:`passes.ops.ACTIVATIONS`, or ``"none"``.
        """


@dataclass
class _Kept:
    """A weight of which packed copies are kept.

    Attributes:
        weight: what is packed.
        owner: what the weight is stored for; a write counts in its version or in the weight's.
        packing: how it is packed.
        products: how often a place is multiplied between two changes of the weight; None if unknown.
        version: that all the following is about.
        uses: products since the weight has changed, by place.
        uses_before: the same between the last two changes.
        packed: the copies by place, and the version that they are of.
        thresholds: by place, how many products between two changes a packed copy pays from; 0 for none.
        thresholds_for: what they depend on besides: choices that were adopted, and the number of threads.
    """

    weight: weakref.ref[Tensor]
    owner: weakref.ref[Tensor]
    packing: Packing
    products: int | None
    version: Version = (-1, -1)
    uses: dict[Place, int] = field(default_factory=dict)
    uses_before: dict[Place, int] = field(default_factory=dict)
    packed: dict[Place, tuple[Version, Any]] = field(default_factory=dict)
    thresholds: dict[Place, int] = field(default_factory=dict)
    thresholds_for: tuple[int, int] = (0, 0)

    def packed_for(self, x: Tensor, weight: Tensor, version: Version) -> Any:
        """The packed copy to multiply ``x`` by; None where plain ``weight`` is the better choice."""
        if version != self.version:
            self._begin(version)
        offset = int(weight.storage_offset())
        place = (offset, tuple(weight.shape), weight.stride(), x.shape[0])
        self.uses[place] = self.uses.get(place, 0) + 1
        of_version, copy = self.packed.get(place, (None, None))
        if of_version == version:
            return copy
        threshold = self._threshold(place, x, weight)
        if self._is_full(place) or not _NEVER < threshold <= self._expected(place):
            self.packed.pop(place, None)
            return None
        with record_function("optcpu::pack_weight"):
            copy = self.packing.pack(weight, x.shape[0], copy)
        self.packed[place] = version, copy
        return copy

    def _threshold(self, place: Place, x: Tensor, weight: Tensor) -> int:
        present = adoptions(), torch.get_num_threads()
        if present != self.thresholds_for:
            self.thresholds_for = present
            self.thresholds.clear()
        threshold = self.thresholds.get(place)
        if threshold is None:
            threshold = self.thresholds[place] = self.pays_from(x, weight)
        return threshold

    def _begin(self, version: Version) -> None:
        """The weight has changed; places that are multiplied no more are forgotten."""
        self.version, self.uses_before, self.uses = version, self.uses, {}
        for by_place in (self.packed, self.thresholds):
            for place in by_place.keys() - self.uses_before.keys():
                by_place.pop(place, None)  # another thread may have been faster

    def _is_full(self, place: Place) -> bool:
        """Whether there are copies enough, of places that may not come again.

        Who knows how often a place is multiplied relies on the same kernel whatever came before.
        """
        return (
            self.products is None and place not in self.packed and len(self.packed) >= _MOST_COPIES
        )

    def _expected(self, place: Place) -> int:
        """How many products there will be between two changes, or there were already."""
        return self.products or max(self.uses_before.get(place, 0), self.uses.get(place, 0))

    def standing(self) -> tuple[str, str]:
        """The layout that products use at present, and why, in a clause."""
        if not self.thresholds:
            return "plain", "not multiplied so far, or too small for the layout to matter"
        if self.packed:
            return self.packing.name, "a packed copy is kept until the weight changes"
        if not any(self.thresholds.values()):
            return "plain", "products with the packed weight were measured to be no faster"
        first, most = (
            min(filter(None, self.thresholds.values())),
            max(map(self._expected, self.uses)),
        )
        return (
            "plain",
            f"packing pays from {first} products between two changes on; there are {most}",
        )

    def pays_from(self, x: Tensor, weight: Tensor) -> int:
        """From how many products between two changes on packing ``weight`` pays; 0 if it never does.

        Measured once for every kind of product, and remembered as the choice of kernels is.
        """
        key = f"{self.packing.name} {shape_key(x, weight.t())}"
        found = remembered(key, lambda: str(self._measured(x, weight)), str.isdecimal)
        return int(found)

    def _measured(self, x: Tensor, weight: Tensor) -> int:
        plain = kernels(x.dtype)[fastest(x, weight.t())]
        try:
            copy = self.packing.pack(weight, x.shape[0], None)
        except RuntimeError:
            return _NEVER  # no kernel for this dtype on this processor
        taken = times(
            {
                "plain": functools.partial(plain, x, weight.t()),
                "packed": lambda: self.packing.linear(x, copy, None, "none", None),
                "pack": lambda: self.packing.pack(weight, x.shape[0], copy),
            }
        )
        gain = taken["plain"] - taken.get("packed", math.inf)
        return math.ceil(taken["pack"] / gain) if gain > 0 else _NEVER


# By the address of the weight's memory, which is all that a view made by generated code shares with it.
_KEPT: dict[int, _Kept] = {}


def keep(
    weight: Tensor, packing: Packing, products: int | None = None, owner: Tensor | None = None
) -> None:
    """Keep packed copies of ``weight`` from now on, for as long as it exists.

    Args:
        weight: of two dimensions; whose every change counts in its ``_version`` or in that of ``owner``.
        packing: the layout.
        products: how often it is multiplied (forward, say) between two changes, if that is known; else
            what was seen before the last change tells.
        owner: a tensor that stores its numbers in ``weight``; ``weight`` itself if None.
    """
    address = weight.untyped_storage().data_ptr()
    reference = weakref.ref(weight, functools.partial(_drop, address))
    owner = weight if owner is None else owner
    _KEPT[address] = _Kept(reference, weakref.ref(owner), packing, products)


def _drop(address: int, reference: weakref.ref[Tensor]) -> None:
    """Forget a weight that exists no more, unless another lies at its address already."""
    if address in _KEPT and _KEPT[address].weight is reference:
        del _KEPT[address]


def forget(weight: Tensor) -> None:
    """Keep no packed copies of ``weight`` any more."""
    _KEPT.pop(weight.untyped_storage().data_ptr(), None)


def hand_on(weight: Tensor, successor: Tensor) -> None:
    """Keep packed copies of ``successor``, for the same owner, if they are kept of ``weight``."""
    entry = kept(weight)
    if entry is not None:
        keep(successor, entry.packing, entry.products, entry.owner())
        forget(weight)


def any_kept() -> bool:
    """Whether packed copies of any weight may be kept."""
    return bool(_KEPT)


def kept(weight: Tensor) -> _Kept | None:
    """What is kept of ``weight``, or of the tensor that it is a view of; None if nothing is."""
    if not _KEPT:
        return None
    address = weight.untyped_storage().data_ptr()
    entry = _KEPT.get(address)
    if entry is None:
        return None
    present = entry.weight()
    if present is None or present.untyped_storage().data_ptr() != address:
        del _KEPT[address]  # given other memory by set_()
        return None
    return entry


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor | None:
    """``activation(x @ weight.T + bias) (+ residual)`` by a kept copy; None where there is none.

    Args:
        x: shape (M, K).
        weight: shape (N, K), same dtype; a kept weight or a view of one.
        bias: shape (N,).
        activation: a key of :data:`passes.ops.ACTIVATIONS`, or ``"none"``.
        residual: shape (M, N); not together with an activation.
    """
    entry = kept(weight)
    if entry is None or is_small(x.shape[0] * weight.numel(), x.dtype):
        return None
    stored, owner = entry.weight(), entry.owner()
    if stored is None or owner is None:
        return None
    packed = entry.packed_for(x, weight, (stored._version, owner._version))
    return None if packed is None else entry.packing.linear(x, packed, bias, activation, residual)


__all__ = ["Packing", "forget", "hand_on", "keep", "kept", "product"]
