"""Parameters whose storage is BF16 inside and FP32 to everyone who looks.

``StoredWeight`` is a tensor of dtype FP32 that holds BF16 upper halves, to compute with, and
(``Format.SPLIT``) the lower halves that make them the exact FP32 master weight, or
(``Format.STOCHASTIC``) nothing else: the numbers are then BF16, and updates round them stochastically.
Whatever reads it gets FP32 numbers, whatever writes to it (``copy_``, an initialiser, an update made by
hand) stores FP32 numbers. Compiled graphs see the halves, so that products read the upper one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_any, tree_map_only

from optcpu.errors import OptcpuError
from optcpu.optim.formats import Format, Stored, split
from passes import packed
from passes.halves import joined

aten = torch.ops.aten

# Operators that read the same bits as other numbers.
_REREADS = (aten.view.dtype, aten.view_as_complex.default, aten._neg_view.default)
# Those that read a few rows of the tensor.
_LOOKUPS = (aten.embedding.default, aten.index_select.default)


class StoredWeight(Tensor):
    """An FP32 tensor that is stored as BF16, with or without the lower halves.

    Args:
        high: BF16.
        low: int16 of the same shape and strides, or None.
    """

    high: Tensor
    low: Tensor | None

    @staticmethod
    def __new__(cls, high: Tensor, low: Tensor | None) -> StoredWeight:
        with _no_inference_tensors():
            made: StoredWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, high.shape, strides=high.stride(), dtype=torch.float32, device=high.device
            )
        return made

    def __init__(self, high: Tensor, low: Tensor | None) -> None:
        self.high, self.low = high, low

    @classmethod
    def of(cls, numbers: Tensor, format: Format) -> StoredWeight:
        """FP32 ``numbers``, stored in ``format``: ``SPLIT`` keeps every bit, ``STOCHASTIC`` rounds."""
        if format == Format.SPLIT:
            return cls(*split(numbers))
        return cls(numbers.bfloat16(), None)

    def full(self) -> Tensor:
        """The numbers as a plain FP32 tensor, a new one."""
        return self.high.float() if self.low is None else joined(self.high, self.low)

    def stored(self, seed: int = 0) -> Stored:
        """The halves as update rules take them."""
        format = Format.STOCHASTIC if self.low is None else Format.SPLIT
        return Stored(format, self.high, self.low, seed)

    def widen_gradient(self) -> None:
        """Have an FP32 gradient from now on, where it may be BF16."""
        if hasattr(self, "grad_dtype") and self.grad_dtype is None:
            gradient, self.grad = self.grad, None
            self.grad_dtype = self.dtype
            self.grad = None if gradient is None else gradient.float()

    def each_half(self, function: Callable[[Tensor], Tensor]) -> StoredWeight:
        """``function`` of both halves."""
        return StoredWeight(function(self.high), None if self.low is None else function(self.low))

    def views(self, function: Callable[[Tensor], Any]) -> Any:
        """The view, or the list of views, that ``function`` gives of both halves."""
        high = function(self.high)
        low = None if self.low is None else function(self.low)
        if isinstance(high, Tensor):
            return StoredWeight(high, low)
        lows = [None] * len(high) if low is None else low
        return [StoredWeight(*halves) for halves in zip(high, lows, strict=True)]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return (["high"] if self.low is None else ["high", "low"]), None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: None, size: Sequence[int], stride: Sequence[int]
    ) -> StoredWeight:
        made = StoredWeight(inner["high"], inner.get("low"))
        if isinstance(made.high, FakeTensor) and hasattr(made, "grad_dtype"):
            made.grad_dtype = None  # PyTorch gives what it traces with the gradient, too: in BF16
        return made

    def _stable_hash_for_caching(self) -> str:
        """All that code compiled for this tensor depends on: part of the key of PyTorch's cache."""
        halves = "bf16" if self.low is None else "split"
        return f"{halves} {tuple(self.shape)} {self.stride()} {self.requires_grad}"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Dynamo is off, since it looks into all that is called where a module is run eagerly.
        kwargs = kwargs or {}
        first = args[0] if args else None
        if _is_composite(function):  # these come whole in inference mode alone
            return function.decompose(*args, **kwargs)
        if _is_view(function) and isinstance(first, cls):
            return first.views(lambda half: function(half, *args[1:], **kwargs))
        if function in _LOOKUPS and isinstance(first, cls) and not _among(args[1:], cls):
            return first.each_half(lambda half: function(half, *args[1:], **kwargs)).full()
        written = _written(function, args, kwargs)
        with _no_inference_tensors() if function in _REREADS else nullcontext():
            plain_args, plain_kwargs, copies = _in_full(args, kwargs)
            result = function(*plain_args, **plain_kwargs)
        for weight in written:
            weight.assign(copies[id(weight)])
        if isinstance(result, Tensor) and len(written) == 1 and result is copies[id(written[0])]:
            return written[0]
        return result

    def assign(self, numbers: Tensor) -> None:
        """Store FP32 ``numbers`` of this shape; without lower halves they are rounded to nearest."""
        if self.low is None:
            self.high.copy_(numbers)
        else:
            self.stored().write(numbers)
        count_writes([self])  # operators on lists of tensors leave that out

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The same numbers, apart from autograd; see :attr:`torch.Tensor.data`."""
        return self.detach()

    @data.setter
    def data(self, numbers: Tensor) -> None:
        """Store other FP32 numbers, of whatever shape and memory order, in the same format.

        Raises:
            OptcpuError: they are not FP32 on the CPU.
        """
        if numbers.dtype != torch.float32 or numbers.device.type != "cpu":
            raise OptcpuError(
                f"this weight is stored for training in FP32 on the CPU and cannot become {numbers.dtype} "
                f"on {numbers.device}: call optcpu.restore(model) first"
            )
        if numbers.shape == self.shape and numbers.stride() == self.stride():
            self.assign(numbers.detach())
            return
        new: Tensor = StoredWeight.of(numbers.detach().clone(), self.stored().format)
        before = self.high
        become(
            self, nn.Parameter(new, self.requires_grad) if isinstance(self, nn.Parameter) else new
        )
        packed.hand_on(before, self.high)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """See :meth:`torch.Tensor.to`."""
        return self._moved(super().to(*args, **kwargs))

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        """See :meth:`torch.Tensor.cpu`."""
        return self._moved(super().cpu(*args, **kwargs))

    def float(self, *args: Any, **kwargs: Any) -> Tensor:
        """See :meth:`torch.Tensor.float`."""
        return self._moved(super().float(*args, **kwargs))

    def _moved(self, result: Tensor) -> Tensor:
        """``result``, but without autograd a plain tensor where it is this one.

        Moving a module assigns the result to the parameter, as data if it is plain; a tensor like this
        one PyTorch would swap, and refuse to once compiled code knows the parameter. On another device the
        result becomes a new parameter, a plain one, which takes over a gradient of its own dtype alone.
        """
        if result.device != self.device and not torch.is_grad_enabled():
            self.widen_gradient()
        return self.full() if result is self and not torch.is_grad_enabled() else result

    def share_memory_(self) -> Tensor:
        """Move the halves to shared memory; see :meth:`torch.Tensor.share_memory_`."""
        packed.forget(self.high)  # what other processes write is not seen here
        self.each_half(Tensor.share_memory_)
        return self._moved(self)

    def is_shared(self) -> bool:
        """See :meth:`torch.Tensor.is_shared`."""
        return bool(self.high.is_shared())

    def numpy(self, *, force: bool = False) -> Any:
        """A copy of the numbers as an array; see :meth:`torch.Tensor.numpy`."""
        if self.requires_grad and not force:
            raise RuntimeError(
                "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead."
            )
        return self.full().numpy()

    def tolist(self) -> Any:
        """See :meth:`torch.Tensor.tolist`."""
        return self.full().tolist()

    def __format__(self, specification: str) -> str:
        return format(self.full(), specification)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(plain_copy(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A plain FP32 tensor or parameter: a copy is not what the optimizer updates."""
        return plain_copy(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if isinstance(self.high, FakeTensor):
            # Never loaded again: it is part of a cache's key in PyTorch 2.8.
            return StoredWeight, (self.high, self.low, self.requires_grad)
        plain = plain_copy(self)
        plain.__dict__.update(_marks(self))
        return plain.__reduce_ex__(protocol)


def count_writes(tensors: Iterable[Tensor]) -> None:
    """Let autograd know that ``tensors`` were written to past it: what it saved of them is no more.

    Compiled graphs save the halves of a :class:`StoredWeight`.
    """
    written: list[Tensor] = []
    for tensor in tensors:
        written.append(tensor)
        if isinstance(tensor, StoredWeight):
            written += [half for half in (tensor.high, tensor.low) if half is not None]
    torch.autograd.graph.increment_version(written)


def become(tensor: Tensor, new: Tensor) -> None:
    """Make ``tensor`` what ``new`` is, but for who it is, its gradient, its hooks and its user's marks.

    As :func:`torch.utils.swap_tensors`, which refuses where somebody holds a weak reference; compiled
    code does, and looks at the tensor's type before it goes on.
    """
    if is_in_a_graph(tensor) and tensor.requires_grad and tensor.is_leaf:
        # It would give the gradient to what the tensor has been.
        torch.autograd.graph.get_gradient_edge(tensor).node.register_prehook(_refuse_backward)
    if isinstance(new, StoredWeight) and new.requires_grad and hasattr(new, "grad_dtype"):
        new.grad_dtype = None  # gradients come in FP32 or BF16
    hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    gradient, tensor.grad = tensor.grad, None
    new.__dict__.update(_marks(tensor))
    torch._C._swap_tensor_impl(tensor, new)  # type: ignore[attr-defined]
    tensor.__class__, new.__class__ = new.__class__, tensor.__class__
    tensor.__dict__, new.__dict__ = new.__dict__, tensor.__dict__
    tensor._backward_hooks, tensor._post_accumulate_grad_hooks = hooks  # type: ignore[attr-defined]
    if gradient is not None and gradient.shape == tensor.shape:
        tensor.grad = gradient


def is_in_a_graph(tensor: Tensor) -> bool:
    """Whether autograd (or another part of PyTorch) holds ``tensor``, and so would miss its change."""
    return bool(tensor._use_count() > 1)  # type: ignore[attr-defined]


def _marks(tensor: Tensor) -> dict[str, Any]:
    """What users have set on a tensor: ``parameter.no_decay = True``, say."""
    return {k: v for k, v in tensor.__dict__.items() if k not in ("high", "low", "_is_param")}


def _refuse_backward(gradients: Any) -> None:
    raise OptcpuError(
        "a weight was stored in another way between forward and backward: call optcpu.optimize and "
        "optcpu.restore, and assign .data of weights, between backward and the next forward"
    )


def plain_copy(tensor: StoredWeight) -> Tensor:
    """A plain FP32 copy: a parameter of a parameter, a tensor of a tensor."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.full(), tensor.requires_grad)
    return tensor.full()


def _no_inference_tensors() -> AbstractContextManager[Any]:
    """Tensors that inference mode makes cannot be views of a parameter, nor be trained."""
    # Entered in vain it would switch autograd on, too.
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


@functools.cache
def _is_view(function: Any) -> bool:
    """Whether ``function`` gives the same numbers in another order or shape, or some of them.

    Views of each half are then views of both.
    """
    results = function._schema.returns
    return (
        function not in _REREADS
        and bool(results)
        and all(result.alias_info and not result.alias_info.is_write for result in results)
    )


@functools.cache
def _is_composite(function: Any) -> bool:
    """Whether ``function`` is made of others that autograd knows."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(function.has_kernel_for_dispatch_key(key))


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[StoredWeight]:
    """The stored weights that ``function`` changes."""
    arguments = list(zip(function._schema.arguments, args, strict=False))
    arguments += [(a, kwargs[a.name]) for a in function._schema.arguments if a.name in kwargs]
    found: list[StoredWeight] = []
    for argument, given in arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            tree_map_only(StoredWeight, found.append, given)
    return found


def _among(arguments: Any, kind: type) -> bool:
    return tree_any(lambda leaf: isinstance(leaf, kind), arguments)


def _in_full(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, Tensor]]:
    """The arguments with plain tensors in place of stored weights, and which stands for which."""
    copies: dict[int, Tensor] = {}

    def full(weight: StoredWeight) -> Tensor:
        return copies.setdefault(id(weight), weight.full())

    plain_args, plain_kwargs = tree_map_only(StoredWeight, full, (args, kwargs))
    return plain_args, plain_kwargs, copies
