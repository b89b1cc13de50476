"""Where the time of a step goes."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optcpu.measure import breakdown as module
from optcpu.measure.breakdown import breakdown, costs_of, kind_of_operator
from optcpu.measure.breakdown_table import breakdown_table
from optcpu.measure.work import Ideal
from optcpu.tables import to_text
from passes import ops, packed

IDEAL = Ideal("fp32", "onednn", flops=30e9, peak=1e12, update_bytes=32e7, bandwidth=32e9)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mm", "products"),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", "products"),
        ("convolution_backward", "convolutions"),
        ("mkldnn_rnn_layer", "recurrent"),
        ("embedding", "operators"),
    ],
)
def test_kinds_of_operators(name: str, kind: str) -> None:
    assert kind_of_operator(name) == kind


def test_what_runs_is_told_with_its_shapes() -> None:
    a, b = torch.randn(64, 32), torch.randn(32, 16)
    layer = nn.Linear(16, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    image, kernel = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3)

    def run() -> None:
        for _ in range(4):
            layer(a @ b).sum().backward()
            optimizer.step()
            nn.functional.conv2d(image, kernel)
            time.sleep(0.005)

    costs = {(cost["kind"], cost["what"]): cost for cost in costs_of(run, steps=4)}
    assert costs["products", "matmul 64x32 32x16"]["calls"] == 1
    assert costs["products", "linear 64x16 16x16 16"]["calls"] == 1
    assert costs["products", "mm 16x64 64x16"]["calls"] == 1, "the gradient of the weight"
    assert costs["convolutions", "conv2d 1x2x8x8 3x2x3x3"]["calls"] == 1
    assert costs["update", ""]["ms"] > 0
    assert costs["python", ""]["ms"] > 4, "what lies between the ranges"
    assert not any("addmm" in what for _, what in costs), "counted with linear"


def test_packing_is_told_apart_from_the_product_that_needs_it() -> None:
    class Packing:
        name = "slow"

        def pack(self, weight: Tensor, rows: int, before: Any) -> Tensor:
            time.sleep(0.02)
            return weight

        def unpack(self, packed: Tensor) -> Tensor:
            return packed

        def linear(self, x: Tensor, packed: Tensor, *_: Any) -> Tensor:
            return x @ packed.t()

    x, weight = torch.randn(512, 512), torch.randn(512, 512)
    packed.keep(weight, Packing(), products=3)
    kept = packed.kept(weight)
    assert kept is not None
    kept.pays_from = lambda x, weight: 1  # type: ignore[method-assign]

    def run() -> None:
        for _ in range(3):
            ops.linear_op(x, weight, None, "none")

    costs = {(cost["kind"], cost["what"]): cost for cost in costs_of(run, steps=1)}
    packing, product = (
        costs["packing", "pack_weight"],
        costs["products", "linear 512x512 512x512"],
    )
    assert (packing["calls"], product["calls"]) == (1, 3)
    assert packing["ms"] >= 20
    packed.forget(weight)
    product_that_packs = _event("optcpu::linear", 10, _event("optcpu::pack_weight", 4))
    assert list(module._pieces_of(product_that_packs)) == [
        ("products", "linear", 6),
        ("packing", "pack_weight", 4),
    ]


def _event(name: str, total: float, *children: Any, shapes: Any = ()) -> Any:
    inside = sum(child.cpu_time_total for child in children)
    made = SimpleNamespace(
        name=name,
        cpu_time_total=total,
        self_cpu_time_total=total - inside,
        cpu_children=children,
        cpu_parent=None,
        input_shapes=shapes,
    )
    for child in children:
        child.cpu_parent = made
    return made


def test_ranges_keep_what_their_operators_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    product = _event(
        "optcpu::linear_backward",
        50.0,
        _event("aten::mm", 40.0),
        shapes=[[8, 4], [], [8, 2], [4, 2]],
    )
    graph = _event("## Call CompiledFxGraph f00 ##", 90.0, product, _event("aten::sum", 10.0))
    backward = _event("autograd::engine::evaluate_function: X", 100.0, graph)

    class Profiler:
        def __init__(self, **_: Any) -> None:
            self.waits = 0

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def events(self) -> Any:
            return [backward, graph, product, *product.cpu_children, *graph.cpu_children]

    monkeypatch.setattr(module, "profile", Profiler)
    costs = {(c["kind"], c["what"]): c["ms"] for c in costs_of(lambda: None, steps=1)}
    assert costs["products", "linear_backward 8x4 8x2 4x2"] == 0.05
    assert costs["operators", "sum"] == 0.01
    assert costs["generated", ""] == pytest.approx(0.03)
    assert costs["python", ""] == pytest.approx(0.01)
    assert len(costs) == 4


def test_what_a_graph_leaves_is_generated_code_with_a_range_of_its_own_and_without() -> None:
    own = _event("CompiledFunction", 5.0)
    around = _event("CompiledFunction", 5.0, _event("## Call CompiledFxGraph f00 ##", 4.0))
    assert list(module._pieces_of(own)) == [("generated", "", 5.0)]
    assert list(module._pieces_of(around)) == [("python", "", 1.0), ("generated", "", 4.0)]


COSTS = [
    {"kind": "products", "what": "mm 8x8 8x8", "calls": 2.0, "ms": 10.0},
    {"kind": "products", "what": "mm 8x8 8x9", "calls": 1.0, "ms": 30.0},
    {"kind": "generated", "what": "", "calls": 4.0, "ms": 25.0},
    {"kind": "update", "what": "", "calls": 1.0, "ms": 12.0},
    {"kind": "python", "what": "", "calls": 1.0, "ms": 0.5},
]


def test_shares_are_told_against_the_ideal() -> None:
    made = breakdown("optcpu", COSTS, IDEAL, {"products": 30e9})
    assert [share.kind for share in made.shares] == ["generated", "products", "update", "python"]
    generated, products, update, _ = made.shares
    assert (products.ms, products.ideal_ms, products.above_ms) == (40.0, 30.0, 10.0)
    assert [piece.what for piece in products.pieces] == ["mm 8x8 8x9", "mm 8x8 8x8"]
    assert (generated.ideal_ms, generated.pieces) == (0.0, [])
    assert update.ideal_ms == pytest.approx(10.0)
    assert made.step_ms == 77.5


def test_table() -> None:
    made = breakdown("optcpu", COSTS, IDEAL, {"products": 30e9})
    lines = [line.split() for line in to_text(breakdown_table(made), 100).splitlines()]
    assert ["generated", "code", "25.0", "0.000", "25.0"] in lines
    assert ["1", "x", "mm", "8x8", "8x9", "30.0"] in lines
    assert "Farthest above the ideal: generated code (25.0 ms)" in to_text(breakdown_table(made))
