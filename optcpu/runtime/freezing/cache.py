"""The outputs of a frozen prefix, kept so that its forward pass goes as well.

Whether that is right depends on the data (no augmentation) and on where the prefix ends, which no module
can know of itself. So it is not done behind the user's back: :meth:`DynamicFreezer.split` cuts a
``Sequential`` model in two, and :class:`PrefixCache` stands for the first part::

    prefix, rest = freezer.split()
    cache, rest = PrefixCache(prefix), optcpu.optimize(rest)
    for indices, inputs, labels in loader:  # indices: which samples these are
        loss = criterion(rest(cache(indices, inputs)), labels)

After a further freeze both parts are others: split anew, with a new cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from optcpu.runtime.freezing.rule import check_integer


class PrefixCache:
    """Calls ``prefix`` once for each sample and remembers the output.

    A sample's output may differ in the last bits from one computed in another batch, as in any product
    of matrices.

    Args:
        prefix: a module without anything that is trained or random; called with one tensor, it gives
            one tensor, row by row.
        max_bytes: what may be kept; samples beyond are computed every time.

    Attributes:
        computed: how many samples went through ``prefix`` so far.

    Raises:
        ValueError: ``prefix`` holds parameters that require gradients, or something random (dropout,
            also within attention and recurrent layers) or batch normalisation in training mode; or
            ``max_bytes`` is negative. Random operators in a ``forward`` of the user's own are not seen.
    """

    def __init__(self, prefix: nn.Module, max_bytes: int = 1 << 30) -> None:
        check_integer("max_bytes", max_bytes, 0)
        _check_deterministic(prefix)
        self._prefix, self._max_bytes = prefix, max_bytes
        self._rows: dict[int, Tensor] = {}
        self._bytes = self.computed = 0

    @property
    def bytes(self) -> int:
        """How much is kept, in bytes."""
        return self._bytes

    @torch.no_grad()
    def __call__(self, indices: Tensor, inputs: Tensor) -> Tensor:
        """The outputs of ``prefix`` for a batch.

        Args:
            indices: ``[n]``, which samples these are, by numbers that stay theirs.
            inputs: ``[n, ...]``, the samples; the same for the same number every time.

        Raises:
            ValueError: there is not one index for each sample, or ``prefix`` is trained again.
        """
        if indices.dim() != 1 or len(indices) != len(inputs):
            raise ValueError(
                f"indices must have shape [{len(inputs)}], one for each sample, not {list(indices.shape)}"
            )
        numbers: list[int] = indices.tolist()
        _check_frozen(self._prefix)
        missing = [place for place, number in enumerate(numbers) if number not in self._rows]
        if not missing:
            return torch.stack([self._rows[number] for number in numbers])
        _check_deterministic(self._prefix)
        computed: Tensor = self._prefix(inputs[missing])
        self.computed += len(missing)
        fresh = dict(zip((numbers[place] for place in missing), computed, strict=True))
        for number, row in fresh.items():
            self._keep(number, row)
        return torch.stack([fresh[n] if n in fresh else self._rows[n] for n in numbers])

    def _keep(self, number: int, row: Tensor) -> None:
        size = row.numel() * row.element_size()
        if self._bytes + size <= self._max_bytes:
            self._rows[number] = row.clone()
            self._bytes += size


def split(model: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """A ``Sequential`` in two: what comes before the first module that is trained, and the rest.

    Raises:
        ValueError: ``model`` is no ``Sequential``, or nothing or everything in it is trained from the
            beginning on.
    """
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"only nn.Sequential models can be split, since their forward pass is known; this is a "
            f"{type(model).__name__}: write its two parts as modules, and give the first to PrefixCache"
        )
    children = list(model)
    trained = [any(p.requires_grad for p in child.parameters()) for child in children]
    cut = trained.index(True) if any(trained) else len(children)
    if not any(True for child in children[:cut] for _ in child.parameters()):
        raise ValueError(
            "there is nothing to split off: the first module with parameters is trained"
        )
    if cut == len(children):
        raise ValueError("there is nothing left to train: no parameter requires gradients")
    return nn.Sequential(*children[:cut]), nn.Sequential(*children[cut:])


def _check_frozen(prefix: nn.Module) -> None:
    for name, parameter in prefix.named_parameters():
        if parameter.requires_grad:
            raise ValueError(
                f"{name!r} of the prefix is trained, so that its outputs cannot be kept"
            )


def _check_deterministic(prefix: nn.Module) -> None:
    _check_frozen(prefix)
    for name, module in prefix.named_modules():
        if module.training and _differs_in_training(module):
            what = f"{name!r} of the prefix" if name else "the prefix"
            raise ValueError(
                f"{what} is a {type(module).__name__} in training mode, whose outputs "
                "differ from batch to batch: freeze with eval_frozen=True, or call prefix.eval()"
            )


def _differs_in_training(module: nn.Module) -> bool:
    """Whether a module in training mode gives a sample another output each time, or by its batch."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout > 0
    return isinstance(module, (_NormBase, nn.RReLU))
