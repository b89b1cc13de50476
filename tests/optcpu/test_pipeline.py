"""The list of passes: visible, ordered, and safe against passes that fail."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import optcpu
from optcpu.backend import Backend
from optcpu.pipeline import Pipeline, resolve_precision
from optcpu.record import Record
from passes import CancelCasts, Canonicalize, InsertCasts
from passes.graph import aten, calls, cast, convert, dtype, emit


def relu_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def raises(graph: fx.Graph) -> int:
    for node in calls(graph, aten.relu.default, aten.clamp_min.default):
        node.replace_all_uses_with(node.args[0])
    raise KeyError("the pass is broken")


def narrows_an_output(graph: fx.Graph) -> int:
    (output,) = (node for node in graph.nodes if node.op == "output")
    first = output.args[0][0]
    with graph.inserting_before(output):
        output.args = ([cast(first, first, torch.bfloat16), *output.args[0][1:]],)
    return 1


def leaves_an_invalid_graph(graph: fx.Graph) -> int:
    first, *_, output = graph.nodes
    with graph.inserting_before(first):
        late = graph.call_function(aten.neg.default, (output.args[0][0],))
    late.meta["val"] = output.args[0][0].meta["val"]
    return 1


def gives_another_shape(graph: fx.Graph) -> int:
    """Where somebody reads it: the graph's outputs stay what they are."""
    (relu,) = calls(graph, aten.relu.default)
    relu.target = aten.sum.default
    return 1


def puts_in_what_raises(graph: fx.Graph) -> int:
    (relu,) = calls(graph, aten.relu.default)
    relu.target = lambda x: x / (1 // 0)
    return 1


def test_the_list_is_ordered_and_free_to_change() -> None:
    passes = optcpu.default_passes()
    stages = [step.stage for step in passes]
    assert stages == sorted(stages), "joint passes come before split ones"
    passes.clear()
    assert optcpu.default_passes() != []
    assert [p.name for p in optcpu.default_passes("fp32") if p.changes_numerics] == []


def test_precision() -> None:
    assert resolve_precision("fp32") == "fp32"
    assert resolve_precision("bf16") == "bf16"
    with pytest.raises(ValueError, match="not 'tf32'"):
        resolve_precision("tf32")


def test_the_key_depends_on_the_passes_and_their_order() -> None:
    keys = {
        Pipeline.of(passes).cache_key()
        for passes in (
            [],
            [Canonicalize()],
            [Canonicalize(), CancelCasts()],
            [CancelCasts(), Canonicalize()],
            [InsertCasts()],
        )
    }
    assert len(keys) == 5
    assert Pipeline.of([Canonicalize()]).cache_key() == Pipeline.of([Canonicalize()]).cache_key()


@pytest.mark.parametrize(
    "broken",
    [
        raises,
        narrows_an_output,
        leaves_an_invalid_graph,
        gives_another_shape,
        puts_in_what_raises,
    ],
)
def test_a_failing_pass_is_undone_and_told_once(broken: object) -> None:
    model, x = relu_network(), torch.randn(3, 8)
    record = Record()
    passes = [Canonicalize(), broken, CancelCasts()]
    backend = Backend(Pipeline.of(passes), record=record, codegen=False)  # type: ignore[list-item]
    name = broken.__name__.replace("_", "-")  # type: ignore[attr-defined]
    with pytest.warns(optcpu.FallbackWarning, match=f"pass {name}.*Remedy") as told:
        result = torch.compile(model, backend=backend)(x)
    assert len(told) == 1
    torch.testing.assert_close(result, model(x))
    (joint,) = (g for g in record.graphs if g.kind == "joint")
    assert [run.name for run in joint.runs] == ["canonicalize", name, "cancel-casts"]
    assert [run.error is None for run in joint.runs] == [True, False, True]


def test_what_passes_before_a_failing_one_did_stays() -> None:
    def clamps(graph: fx.Graph) -> int:
        for node in calls(graph, aten.relu.default):
            node.target = aten.clamp_min.default
            node.args = (*node.args, 0)
        return 1

    model, x = relu_network(), torch.randn(3, 8)
    record = Record(keep_graphs=True)
    backend = Backend(Pipeline.of([clamps, raises]), record=record, codegen=False)
    with pytest.warns(optcpu.FallbackWarning, match="pass raises was undone"):
        result = torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(result, model(x))
    (joint,) = (g for g in record.graphs if g.kind == "joint")
    assert joint.final is not None
    assert len(list(calls(joint.final, aten.clamp_min.default))) == 1
    assert list(calls(joint.final, aten.relu.default)) == []


def test_a_failing_pass_raises_where_fallbacks_are_forbidden() -> None:
    backend = Backend(Pipeline.of([raises]), fallback=False, codegen=False)
    with pytest.raises(Exception, match="optcpu: pass raises was undone: KeyError"):
        torch.compile(relu_network(), backend=backend)(torch.randn(3, 8))


@pytest.mark.parametrize("returned", [None, "5", -3, True, 1.5])
def test_a_pass_that_returns_no_count_is_told_so(returned: object) -> None:
    def careless(graph: fx.Graph) -> object:
        return returned

    backend = Backend(Pipeline.of([careless]), codegen=False)  # type: ignore[list-item]
    with pytest.warns(optcpu.FallbackWarning, match="how many places it rewrote"):
        torch.compile(relu_network(), backend=backend)(torch.randn(3, 8))


def test_values_that_a_pass_forgot_are_filled_in() -> None:
    def forgetful(graph: fx.Graph) -> int:
        for node in list(calls(graph, aten.relu.default)):
            with graph.inserting_after(node):
                again = graph.call_function(node.target, node.args)  # type: ignore[arg-type]
            node.replace_all_uses_with(again)
            graph.erase_node(node)
        return 1

    model, x = relu_network(), torch.randn(3, 8)
    backend = Backend(Pipeline.of([forgetful]), fallback=False, codegen=False)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))


def test_values_that_follow_from_a_pass_are_computed_anew() -> None:
    """Here of two operators that the pass leaves alone; the view is one that compiled code can take."""
    seen: list[object] = []

    def lowers(graph: fx.Graph) -> int:
        (relu,) = calls(graph, aten.relu.default)
        with graph.inserting_before(relu):
            turned = cast(relu, relu.args[0], torch.bfloat16)  # type: ignore[arg-type]
        relu.replace_input_with(relu.args[0], turned)  # type: ignore[arg-type]
        (view,) = calls(graph, aten.view.default)
        (wide,) = (user for user in view.users if user.op == "call_function")
        with graph.inserting_before(wide):
            wide.replace_input_with(view, emit(view, convert, view, torch.float32))
        return 1

    def looks(graph: fx.Graph) -> int:
        seen.extend(dtype(node) for node in calls(graph, aten.relu.default, aten.view.default))
        return 0

    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu().view(-1).exp()

    backend = Backend(Pipeline.of([lowers, looks]), fallback=False, codegen=False)
    x = torch.randn(3, 8)
    torch.testing.assert_close(
        torch.compile(Flat(), backend=backend)(x), x.bfloat16().relu().flatten().float().exp()
    )
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_a_pass_may_change_strides_before_a_view() -> None:
    def turns(graph: fx.Graph) -> int:
        (view,) = calls(graph, aten.view.default)
        (given,) = view.all_input_nodes
        with graph.inserting_before(view):
            turned = emit(given, aten.clone.default, emit(given, aten.t.default, given))
            view.replace_input_with(given, emit(given, aten.t.default, turned))
        return 1

    def flat(x: torch.Tensor) -> torch.Tensor:
        return x.relu().view(-1)

    backend = Backend(Pipeline.of([turns]), fallback=False, codegen=False)
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(flat, backend=backend)(x), flat(x))


@pytest.mark.parametrize("given", ["abc", Canonicalize(), 3])
def test_what_is_no_list_of_passes(given: object) -> None:
    with pytest.raises(TypeError, match="list of passes"):
        Pipeline.of(given)  # type: ignore[arg-type]


def test_pipelines_that_do_the_same_are_equal() -> None:
    assert Pipeline.of([Canonicalize()]) == Pipeline.of([Canonicalize()])
    assert hash(Pipeline.of([Canonicalize()])) == hash(Pipeline.of([Canonicalize()]))
    assert Pipeline.of([Canonicalize()]) != Pipeline.of([CancelCasts()])
