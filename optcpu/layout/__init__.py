"""Weight layouts: how the weights that optcpu stores are laid out for the products with them.

A weight is stored plainly (:mod:`optcpu.optim.weights`), whatever reads it; beside it a packed copy may be
kept that the fused operators multiply by (:mod:`passes.packed`). A layout is where that copy comes from:
``native`` is oneDNN's blocked format by PyTorch itself, ``ipex`` that of Intel's extension, ``none`` keeps
no copies. Only weights that are stored in two halves, or as BF16, are kept packed: a plain FP32
parameter can change unseen, through its ``.data``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from optcpu.errors import OptcpuError, warn
from optcpu.layout import choice, ipex, native
from optcpu.optim.weights import StoredWeight
from passes import packed

Layout = Literal["auto", "native", "ipex", "none"]


@dataclass(frozen=True)
class WeightLayout:
    """The layout of one weight.

    Attributes:
        name: the parameter's.
        layout: ``"native"``, ``"ipex"``, or ``"plain"`` where no packed copy is kept.
        reason: why, in a clause.
    """

    name: str
    layout: str
    reason: str


def checked_layout(layout: str) -> Layout:
    """``layout``, if it is one and possible here.

    Raises:
        ValueError: it is none of ``"auto"``, ``"native"``, ``"ipex"`` and ``"none"``.
        OptcpuError: it is ``"ipex"``, and the extension cannot be used here.
    """
    if layout not in ("auto", "native", "ipex", "none"):
        raise ValueError(f"layout must be 'auto', 'native', 'ipex' or 'none', not {layout!r}")
    if layout == "ipex":
        ipex.load()
    return layout  # type: ignore[return-value]


def keep_packed(model: nn.Module, layout: Layout) -> None:
    """Keep packed copies of the weights of ``model`` that are stored for training, as ``layout`` says.

    Args:
        model: whose stored weights (:class:`StoredWeight`) may be packed; others stay as they are.
        layout: where ``"auto"`` is ``"ipex"`` if the extension fits and was measured to be faster with the
            shapes of this model, else ``"native"``.
    """
    weights = _packable(model)
    packing = _packing(layout, weights)
    for weight in weights:
        if packing is None:
            packed.forget(weight.high)
        else:
            packed.keep(weight.high, packing, owner=weight)
    if layout in ("native", "ipex") and not weights:
        warn(
            f"layout={layout!r} has no weights to pack: it packs those that optcpu stores as BF16, with "
            "precision='bf16' and an optimizer; plain FP32 weights are multiplied as they are"
        )


def expect_products(model: nn.Module, products: int) -> None:
    """Tell how often the weights of ``model`` are multiplied between two updates."""
    for weight in _packable(model):
        kept = packed.kept(weight.high)
        if kept is not None:
            kept.products = products


def layouts(model: nn.Module) -> list[WeightLayout]:
    """The layout of every weight of ``model`` of two dimensions or more, and why it has that."""
    return [
        WeightLayout(name, *_layout_of(parameter))
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    ]


def _layout_of(parameter: nn.Parameter) -> tuple[str, str]:
    if not isinstance(parameter, StoredWeight):
        return (
            "plain",
            "an FP32 parameter, which can change unseen: packed within a product, if at all",
        )
    if parameter.dim() != 2:
        return "plain", "not a matrix"
    kept = packed.kept(parameter.high)
    if kept is None:
        return "plain", native.why_impossible() or "layout='none'"
    return kept.standing()


def _packing(layout: Layout, weights: list[StoredWeight]) -> packed.Packing | None:
    if layout == "none" or not weights:
        return None
    problem = native.why_impossible()
    if problem is not None:
        if layout != "auto":
            warn(f"layout={layout!r} packs no weights: {problem}. They are multiplied as they are")
        return None
    if layout == "ipex":
        return ipex.IpexPacking()
    if layout == "auto" and choice.ipex_wins([tuple(weight.shape) for weight in weights]):
        try:
            return ipex.IpexPacking()
        except OptcpuError as error:
            warn(f"{error}. The native layout is used")
    return native.NativePacking()


def _packable(model: nn.Module) -> list[StoredWeight]:
    """The matrices stored for training; but what other processes write to shared ones is seen by nobody."""
    stored = (p for p in model.parameters() if isinstance(p, StoredWeight))
    return [weight for weight in stored if weight.dim() == 2 and not weight.is_shared()]
