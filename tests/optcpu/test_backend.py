"""The backend: caches that can be trusted, and parts that cannot be compiled."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import ir

import optcpu
import passes
from optcpu.backend import Backend
from optcpu.compiled_call import compiled_call
from optcpu.pipeline import Pipeline, default_passes
from optcpu.record import Record

TRAIN = """
import json, sys, warnings, torch, optcpu
from torch import nn
from torch._dynamo.utils import counters
torch.set_num_threads(2)
torch.manual_seed(0)

def own(graph):
    return CHANGE

passes = [own, *optcpu.default_passes("fp32")]
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 4))
x = torch.randn(8, 16)
expected = model(x)
expected.square().sum().backward()
gradients = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    optcpu.optimize(model, passes=passes)
    result = model(x)
    result.square().sum().backward()
torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
for parameter, gradient in zip(model.parameters(), gradients):
    torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
print(json.dumps({
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "misses": counters["aot_autograd"]["autograd_cache_miss"],
    "told": [str(w.message) for w in told if issubclass(w.category, optcpu.FallbackWarning)],
}))
"""


def train(cache: Path, change: int = 0, **environment: str) -> dict[str, object]:
    """Train one step in a new process; the numbers are checked there."""
    import json

    settings = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)} | environment
    command = [sys.executable, "-c", TRAIN.replace("CHANGE", str(change))]
    run = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_an_unchanged_pipeline_is_served_from_the_cache_of_another_process(tmp_path: Path) -> None:
    first, again, changed = train(tmp_path), train(tmp_path), train(tmp_path, change=1)
    assert (first["hits"], again["hits"], changed["hits"]) == (0, 1, 0)
    assert first["told"] == again["told"] == []


@pytest.mark.slow
def test_without_a_compiler_the_rewritten_graphs_run_eagerly(tmp_path: Path) -> None:
    told = train(tmp_path, CXX="/no/such/compiler")["told"]
    assert isinstance(told, list)
    assert told
    assert all("install a C++ compiler" in message for message in told)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    told = train(tmp_path)["told"]
    assert isinstance(told, list)
    assert any("TORCHINDUCTOR_CACHE_DIR" in message for message in told)


@pytest.mark.parametrize("keep_graphs", [False, True])
@pytest.mark.parametrize("codegen", [False, True])
def test_what_is_looked_at_comes_from_no_cache(keep_graphs: bool, codegen: bool) -> None:
    pipeline = Pipeline.of(default_passes("fp32"))
    backend = Backend(pipeline, record=Record(keep_graphs=keep_graphs), codegen=codegen)
    expected = None if keep_graphs or not codegen else pipeline.cache_key()
    assert backend.cache_key() == expected


class Layers(nn.Module):
    """Equal layers with attention and dropout, and outputs that are views of what they keep."""

    def __init__(self, count: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 24, dropout, norm_first=True, batch_first=True)
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        kept = []
        for layer in self.layers:
            x = layer(x)
            kept.append(x[:, 0])
        return x.transpose(1, 2), torch.stack(kept)


def outputs_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    outputs = model(x)
    sum(output.square().sum() for output in outputs).backward()
    return [*outputs, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_as_eager(model: nn.Module, x: Tensor) -> Record:
    """Optimize ``model`` and compare; the record of what happened."""
    expected = outputs_and_gradients(model, x)
    optcpu.optimize(model, precision="fp32", fallback=False)
    results = outputs_and_gradients(model, x)
    assert len(results) == len(expected)
    for got, wanted in zip(results, expected, strict=True):
        # As a whole: of the gradient of a bias of keys, which is zero, only rounding is left.
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
        assert got.stride() == wanted.stride()
    call = compiled_call(model)
    assert call is not None
    return call.record


@pytest.mark.slow
def test_code_for_equal_layers_is_generated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    record = assert_as_eager(Layers(5), torch.randn(3, 6, 8))
    blocks = {graph.kind: graph.blocks for graph in record.graphs if graph.kind != "joint"}
    assert [b.count for b in blocks["forward"]] == [5]
    assert [b.count for b in blocks["backward"]] == [5]


@pytest.mark.slow
def test_equal_layers_drop_out_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as from code for each layer, which are others in each layer."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    results = {}
    for shared in (True, False):
        with monkeypatch.context() as patch:
            if not shared:
                patch.setattr(passes, "share_blocks", lambda module: [])
            torch.manual_seed(0)
            model = optcpu.optimize(Layers(4, dropout=0.5), precision="fp32", fallback=False)
            results[shared] = outputs_and_gradients(model, torch.ones(3, 6, 8))
            torch.compiler.reset()
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "second"))
    for got, wanted in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_blocks_that_inductor_cannot_take_are_compiled_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def refuse(*args: object) -> None:
        raise NotImplementedError("a graph with subgraphs")

    monkeypatch.setattr(ir.InvokeSubgraph, "create", refuse)
    record = assert_as_eager(Layers(3), torch.randn(3, 6, 8))
    assert [graph.blocks for graph in record.graphs] == [[], [], []]
    assert record.fallbacks == []


def test_the_name_of_the_backend() -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    compiled = torch.compile(model, backend="optcpu", options={"precision": "fp32"})
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"precison": "fp32"}}, "no option 'precison'"),
        ({"options": {"precision": "fp8"}}, "not 'fp8'"),
        ({"options": {"fallback": "no"}}, "fallback must be True or False"),
        ({"mode": "max-autotune"}, "no mode 'max-autotune'"),
    ],
)
def test_unknown_options_are_refused(arguments: dict[str, object], message: str) -> None:
    compiled = torch.compile(nn.Linear(4, 4), backend="optcpu", **arguments)  # type: ignore[call-overload]
    with pytest.raises(Exception, match=message):
        compiled(torch.randn(2, 4))


class Doubled(torch.autograd.Function):
    """An operator of the user's own, with a backward of its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 2


class Unusual(nn.Module):
    """A custom autograd function, a graph break, and control flow that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = Doubled.apply(self.inward(x))
        if float(x.sum()) > 0:
            x = x + 1
        return {"scores": self.outward(x)}


def test_parts_between_graph_breaks_are_compiled() -> None:
    model = Unusual()
    x = torch.randn(3, 6)
    expected = model(x)["scores"]
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    optcpu.optimize(model, precision="fp32")
    result = model(x)["scores"]
    result.sum().backward()
    torch.testing.assert_close(result, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert model._compiled_call_impl.record.regions >= 2  # type: ignore[union-attr]


class Scaled(nn.Linear):
    """A module of the user's own, which Dynamo can begin with."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Masked(nn.Module):
    """Writes where a mask says so: to how many places depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = Scaled(6, 6), nn.Linear(6, 2)
        self.filling = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.inward(x)
        x[mask] = self.filling
        result: Tensor = self.outward(x)
        return result


def test_around_what_depends_on_data_the_graph_is_compiled() -> None:
    model = Masked()
    x, mask = torch.randn(3, 5, 6), torch.rand(3, 5) > 0.5
    expected = model(x, mask)
    expected.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    optcpu.optimize(model, precision="fp32")
    with pytest.warns(optcpu.FallbackWarning, match=r"not compiled as a whole.*torch\.where"):
        result = model(x, mask)
    result.square().sum().backward()
    torch.testing.assert_close(result, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    call = compiled_call(model)
    assert call is not None
    assert call.backend.parts_run


def test_what_depends_on_data_is_refused_where_nothing_may_be_left_out() -> None:
    model = optcpu.optimize(Masked(), precision="fp32", fallback=False)
    with pytest.raises(Exception, match="not compiled as a whole"):
        model(torch.randn(3, 5, 6), torch.rand(3, 5) > 0.5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64])
def test_input_of_a_wrong_dtype_is_told_as_by_pytorch(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.ones(3, 16, dtype=dtype)
    optcpu.optimize(model, precision="fp32")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            model(x)
    assert not [w for w in told if issubclass(w.category, optcpu.FallbackWarning)]
    model(torch.ones(3, 16)).sum().backward()
