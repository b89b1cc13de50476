"""Gradients that leave a backward graph one by one, each as soon as it is there.

What a graph returns lives until its end, so that the gradients of all weights are there at once. An
operator in the middle of the graph hands them to whoever waits for them (:func:`receive`), who may
update the weight, and the gradient's memory is free again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.graph import dtype, is_cast, may_alias, value
from passes.operators import define

Receiver = Callable[[int, Tensor], None]
# For each value that forward saves, by name: of which of the captured graph's inputs it is the memory.
Origins = Mapping[str, frozenset[int]]

# The attribute of an autograd node that runs a backward graph: who gets what that hands over.
_RECEIVER = "optcpu_receiver"


def receive(node: Any, receiver: Receiver) -> None:
    """Let ``receiver`` have what a backward graph hands over: an input's number and its gradient.

    The gradient's memory is the graph's again once the receiver returns.

    Args:
        node: of autograd, in which the graph will run.
        receiver: lives as long as the node does.
    """
    setattr(node, _RECEIVER, receiver)


def _hand_over(gradient: Tensor, input: int, weight: Sequence[Tensor]) -> None:
    node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
    receiver: Receiver | None = getattr(node, _RECEIVER, None)
    if receiver is None:
        raise RuntimeError("a gradient is handed over, and nobody waits for it")
    receiver(input, gradient)


# Said to write to the weight, so that generated code reads it before; and to have an effect at all.
hand_over = define(
    "hand_over(Tensor gradient, int input, Tensor(a!)[] weight) -> ()",
    _hand_over,
    lambda gradient, input, weight: None,
)


def origins(forward: fx.Graph) -> Origins:
    """What a forward graph returns and saves, by name, with the inputs whose memory each may be.

    Inputs are numbered as in the captured graph; PyTorch 2.8 does not tell their numbers.
    """
    given = {node: _input(node) for node in forward.find_nodes(op="placeholder")}
    return {
        node.name: frozenset(
            number for before in _memory_of(node) if (number := given.get(before)) is not None
        )
        for node in forward.output_node().all_input_nodes
    }


def hand_over_gradients(backward: fx.Graph, inputs: Collection[int], saved: Origins) -> int:
    """Hand the gradients of some inputs over where they are complete; None is returned in their place.

    Before::

        g = mm(d, x); e = mm(d, weight); ...; return [g, ...]

    After::

        g = mm(d, x); e = mm(d, weight); hand_over(g, 0, [weight]); ...; return [None, ...]

    A weight may change as soon as its gradient has been handed over: that comes behind all that reads it.

    Args:
        backward: a partitioned backward graph, edited in place.
        inputs: the numbers of the captured graph's inputs whose gradients to hand over.
        saved: of its forward graph, as :func:`origins` gives it.

    Returns:
        How many are handed over.
    """
    output = backward.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    whose = [_number(getattr(about, "grad_of", None)) for about in output.meta.get("desc") or ()]
    weights = _weights(backward, saved)
    if weights is None:
        return 0
    fired = 0
    for place, number in enumerate(whose):
        gradient = results[place]
        once = isinstance(gradient, fx.Node) and results.count(gradient) == 1
        if number is None or number not in inputs or not once or gradient.op == "placeholder":
            continue
        if value(gradient).dim() > 1:  # small ones stay fused with what they are fused with
            _move_forward(gradient)
        memory = weights.get(number, [])
        last = _last([gradient, *_writers(gradient), *_readers(memory)])
        with backward.inserting_after(last):
            call = backward.call_function(hand_over, (gradient, number, memory))
        call.meta["val"] = None
        results[place] = None
        fired += 1
    if fired:
        output.args = (tuple(results),)
        _read_weights_before()
    return fired


@functools.cache
def _read_weights_before() -> None:
    """Have Inductor compute what reads a weight before the weight is handed over.

    It does so by itself for a mutation of its own, but for that of an operator it does it too late: what
    it has not decided to compute yet is computed behind the operator.
    """
    from torch._inductor import lowering  # takes a second
    from torch._inductor.virtualized import V

    def readers_first(node: fx.Node, gradient: Any, input: int, weight: Sequence[Any]) -> Any:
        for part in weight:
            V.graph.mark_buffer_mutated(part.get_name())
        return (gradient, input, weight), {}

    lowering.make_fallback(hand_over, readers_first)


def _input(node: fx.Node) -> int | None:
    return _number(node.meta.get("desc"))


def _number(description: Any) -> int | None:
    """The number of the captured graph's input that is described, as a whole or a part of it."""
    number = getattr(getattr(description, "base", description), "idx", None)
    return number if isinstance(number, int) else None


def _memory_of(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose memory the result of ``node`` may be, itself among them."""
    yield node
    if node.op == "call_function" and _is_alias(node):
        for before in node.all_input_nodes:
            yield from _memory_of(before)


def _weights(backward: fx.Graph, saved: Origins) -> dict[int, list[fx.Node]] | None:
    """The backward's inputs that are memory of an input of the captured graph, by its number.

    None if it cannot be told of one.
    """
    found: dict[int, list[fx.Node]] = {}
    for node in backward.find_nodes(op="placeholder"):
        if not isinstance(value(node), Tensor) or _is_tangent(node):
            continue
        if node.name not in saved:
            return None
        for number in saved[node.name]:
            found.setdefault(number, []).append(node)
    return found


def _is_tangent(node: fx.Node) -> bool:
    """Whether an input of the backward is the gradient of an output of forward."""
    description = node.meta.get("desc")
    return hasattr(getattr(description, "base", description), "output")


def _readers(memory: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """What reads those inputs, itself or through a view of them."""
    for node in memory:
        for user in node.users:
            if user.op != "output":
                yield user
                if _is_alias(user):
                    yield from _readers([user])


def _writers(node: fx.Node) -> Iterator[fx.Node]:
    """What writes to the memory of the result of ``node``."""
    for memory in _memory_of(node):
        for user in memory.users:
            schema = getattr(user.target, "_schema", None)
            if schema is not None and schema.is_mutable and user.args[0] is memory:
                yield user


def _is_alias(node: fx.Node) -> bool:
    return may_alias(node) or (is_cast(node) and dtype(node) == dtype(node.args[0]))


def _last(nodes: Sequence[fx.Node]) -> fx.Node:
    """The one that comes last in the graph."""
    last = nodes[0]
    for node in nodes[1:]:
        if last < node:
            last = node
    return last


def _move_forward(node: fx.Node) -> None:
    """Compute something, and what is computed for it alone, as early as the rest allows.

    Passes leave the casts of what is returned at the graph's end, and Inductor all that nobody else uses.
    """
    inputs = node.all_input_nodes
    for before in inputs:
        if before.op == "call_function" and len(before.users) == 1:
            _move_forward(before)
    written = [writer for before in inputs for writer in _writers(before) if writer < node]
    last = _last([*node.graph.find_nodes(op="placeholder")[-1:], *inputs, *written])
    if node.prev is not last:
        last.append(node)


__all__ = ["hand_over", "hand_over_gradients", "origins", "receive"]
