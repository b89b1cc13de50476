"""The blocks of a model in the order of its forward pass, as the freezer counts them.

A block is what is frozen together: an embedding, a transformer layer, a Linear layer with the norm behind
it. A wrong order costs speed but never correctness: what is frozen gets no gradient, everything else gets
its right one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, eq=False)
class Block:
    """Modules that are frozen together.

    Attributes:
        name: of its first module.
        modules: with everything in them; those without parameters (dropout) are there as well.
        parameters: that are frozen with it; a tied one belongs to the last block that uses it.
        tied: that it uses, but that belong to a later block.
        work: parameters that take part in matrix products, which its share of a step is taken from.
    """

    name: str
    modules: tuple[nn.Module, ...]
    parameters: tuple[nn.Parameter, ...]
    tied: tuple[nn.Parameter, ...] = ()
    work: int = 0


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a model.

    Attributes:
        blocks: in the order of the forward pass, each with at least one parameter that can be frozen.
        outside: parameters that are trained but belong to no block, and so are never frozen.
        fixed_work: ``work`` of all that is in no block.
    """

    blocks: tuple[Block, ...]
    outside: tuple[nn.Parameter, ...]
    fixed_work: int

    def backward_ends(self, frozen: int) -> bool:
        """Whether nothing is trained below the end of the first ``frozen`` blocks.

        Parameters outside all blocks may lie anywhere and count as below.
        """
        inside = {id(p) for block in self.blocks[:frozen] for p in block.parameters}
        tied = (p for block in self.blocks[:frozen] for p in block.tied)
        return not self.outside and all(id(p) in inside for p in tied)

    def step_work(self, frozen: int) -> float:
        """Cost of a step in units of one product with each matrix weight: about its time.

        Forward, input gradient and weight gradient cost the same. A frozen block has no weight
        gradient, and no input gradient either where the backward pass ends behind it. Embeddings and
        vectors cost nothing; a convolution, which uses its weights many times over, is underestimated.
        """
        remaining = 1 if self.backward_ends(frozen) else 2
        return sum(
            block.work * (remaining if place < frozen else 3)
            for place, block in enumerate(self.blocks)
        ) + (3.0 * self.fixed_work)


def find_blocks(
    model: nn.Module, trained: Iterable[Tensor], chosen: Sequence[str | nn.Module] | None = None
) -> Blocks:
    """The blocks of ``model``: those that are ``chosen``, or those found by :func:`declared`.

    Args:
        model: the module.
        trained: the parameters that may be frozen: those of the optimizer.
        chosen: modules or their names, in the order of the forward pass.

    Raises:
        TypeError: an entry of ``chosen`` is neither a name nor a module.
        ValueError: there is no such module in ``model``, two of them overlap, or fewer than two blocks
            hold a parameter that may be frozen.
    """
    groups = declared(model) if chosen is None else _named(model, chosen)
    known = {id(p) for p in trained}
    trainable = {id(p): p for p in model.parameters() if p.requires_grad and id(p) in known}
    last_use = {id(p): place for place, group in enumerate(groups) for p in group.parameters}
    work = {id(p): p.numel() for p in _matrix_weights(model)}
    blocks = []
    for place, group in enumerate(groups):
        uses = [p for p in group.parameters if id(p) in trainable]
        own = tuple(p for p in uses if last_use[id(p)] == place)
        tied = tuple(p for p in uses if last_use[id(p)] != place)
        held = sum(work.get(id(p), 0) for p in group.parameters if last_use[id(p)] == place)
        blocks.append(Block(group.name, tuple(group.modules), own, tied, held))
    kept = _without_empty(blocks)
    if len(kept) < 2:
        raise ValueError(
            f"{type(model).__name__} has {len(kept)} block(s) with parameters that the optimizer trains, "
            "but freezing needs two, since the last is never frozen: name smaller ones with "
            "blocks=[...], in the order of the forward pass"
        )
    inside = {id(p) for block in kept for p in block.parameters}
    outside = tuple(p for p in model.parameters() if p.requires_grad and id(p) not in inside)
    fixed = sum(work.values()) - sum(block.work for block in kept)
    return Blocks(tuple(kept), outside, fixed)


@dataclass
class _Group:
    name: str
    modules: list[nn.Module]
    parameters: list[nn.Parameter]

    def is_small(self) -> bool:
        """Whether it only scales and shifts (a norm), or has no parameters: no block of its own."""
        return all(parameter.dim() <= 1 for parameter in self.parameters)

    def joined(self, other: _Group) -> _Group:
        """One group of two; the name is that of the larger one."""
        name = self.name if other.is_small() else other.name
        return _Group(name, self.modules + other.modules, self.parameters + other.parameters)


def declared(model: nn.Module) -> list[_Group]:
    """Blocks of ``model`` in the order in which it declares its modules.

    Each element of a ``Sequential``, ``ModuleList`` or ``ModuleDict`` is a block, unless it holds more
    than half of all parameters and such a list within; so is every module beside the lists. Norms,
    activations and dropout belong to the block in front of them, parameters of a module that is taken
    apart to its first block.
    """
    total = sum(p.numel() for p in model.parameters())
    groups: list[_Group] = []
    for group in _walk(model, "", total):
        if groups and (group.is_small() or groups[-1].is_small()):
            groups[-1] = groups[-1].joined(group)
        else:
            groups.append(group)
    return groups


def _walk(module: nn.Module, prefix: str, total: int) -> Iterator[_Group]:
    first = True
    own = list(module.parameters(recurse=False))
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if _is_taken_apart(child, total, in_list=isinstance(module, _LISTS)):
            inner = list(_walk(child, f"{path}.", total))
        else:
            inner = [_Group(path, [child], list(child.parameters()))]
        if first and own and inner:
            inner[0].parameters[:0] = own
            first = False
        yield from inner
    if first and own:
        yield _Group(prefix.rstrip(".") or "model", [module], own)


def _is_taken_apart(module: nn.Module, total: int, *, in_list: bool) -> bool:
    if isinstance(module, _LISTS):
        return True
    inner = (part for name, part in module.named_modules() if "parametrizations" not in name)
    if not any(_is_divisible(part) for part in inner):
        return False
    return not in_list or 2 * sum(p.numel() for p in module.parameters()) > total


def _is_divisible(module: nn.Module) -> bool:
    """Whether it is a list of at least two modules with parameters."""
    if not isinstance(module, _LISTS):
        return False
    return sum(any(True for _ in child.parameters()) for child in module.children()) > 1


def _named(model: nn.Module, chosen: Sequence[str | nn.Module]) -> list[_Group]:
    names = {id(module): name for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    groups: list[_Group] = []
    seen: dict[int, str] = {}
    if isinstance(chosen, str):
        raise TypeError(f"blocks must be a list of modules or names, not the string {chosen!r}")
    for entry in chosen:
        if not isinstance(entry, (str, nn.Module)):
            raise TypeError(f"blocks must hold modules or their names, not {entry!r}")
        if isinstance(entry, str) and entry not in modules:
            near = difflib.get_close_matches(entry, [name for name in modules if name], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "model.named_modules() lists them"
            raise ValueError(f"blocks: {type(model).__name__} has no module {entry!r}; {hint}")
        if isinstance(entry, nn.Module) and id(entry) not in names:
            raise ValueError(f"blocks: this {type(entry).__name__} is no module of the model")
        module = modules[entry] if isinstance(entry, str) else entry
        name = names[id(module)] or "model"
        for inner in module.modules():
            if id(inner) in seen:
                raise ValueError(
                    f"blocks: {name!r} and {seen[id(inner)]!r} overlap; each module belongs to one block"
                )
        seen.update({id(inner): name for inner in module.modules()})
        groups.append(_Group(name, [module], list(module.parameters())))
    return groups


def _without_empty(blocks: list[Block]) -> list[Block]:
    """Leave out blocks with nothing to freeze; what they have tied counts for the block behind them."""
    kept: list[Block] = []
    carried: tuple[nn.Parameter, ...] = ()
    for block in blocks:
        if not block.parameters:
            carried += block.tied
            continue
        kept.append(
            Block(block.name, block.modules, block.parameters, carried + block.tied, block.work)
        )
        carried = ()
    return kept


def _matrix_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of at least two dimensions, each once; those that are only looked up in left out."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, _LOOKUPS):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
