"""``inspect`` tells what the passes did, from the user's line to the summary, and changes nothing."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import optcpu
from optcpu.compiled_call import CompiledCall, Settings, compiled_call
from optcpu.inspect import Inspection, inspect
from optcpu.pipeline import Pipeline, default_passes
from optcpu.record import Record
from passes import Canonicalize
from passes.recurrent_steps import kernel_available


class Net(nn.Module):
    """Everything that has a state to disturb: batch norm, dropout, and two layers to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        return self.second(self.drop(self.norm(hidden)))


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        torch._dynamo.graph_break()
        return self.second(y)


def the_input(rows: int = 4) -> Tensor:
    return torch.randn(rows, 16)


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    torch.manual_seed(0)
    return inspect(Net(), the_input(), precision="bf16")


class TestWhatItHolds:
    def test_every_stage_of_every_graph(self, inspection: Inspection) -> None:
        stages = inspection.stages()
        assert stages[0] == "captured"
        for step in default_passes("bf16"):
            graphs = ["joint"] if step.stage == "joint" else ["forward", "backward"]
            for graph in graphs:
                assert f"{graph}/{step.name}" in stages
        for graph in ("joint", "forward", "backward"):
            assert {f"{graph}/initial", f"{graph}/final"} <= set(stages)

    def test_the_same_passes_fire_as_often_as_in_an_optimized_model(
        self, inspection: Inspection
    ) -> None:
        settings = Settings("bf16", Pipeline.of(default_passes("bf16")), True, None)
        # What the cache of an earlier run serves leaves no counts; graphs that are kept bypass it.
        call = CompiledCall(Net(), settings, Record(keep_graphs=True))
        call(the_input()).mean().backward()
        assert inspection.counts() == call.record.counts()
        assert inspection.counts()["insert-casts"] == 5  # two products forward, three backward
        assert inspection.counts()["fuse-linear-backward"] == 2

    def test_nodes_come_and_go(self, inspection: Inspection) -> None:
        casts = next(t for t in inspection.totals() if t.name == "insert-casts")
        assert casts.changes_numerics
        assert casts.casts_inserted["f32 to bf16"] == 12
        assert not casts.gone
        cancelled = next(t for t in inspection.totals() if t.name == "cancel-casts")
        assert sum(cancelled.casts_cancelled.values()) > 0
        fused = next(t for t in inspection.totals() if t.name == "fuse-linear-backward")
        assert fused.come["optcpu.linear_backward"] == 2
        assert fused.gone["aten.mm"] == 3

    def test_every_edge_has_a_dtype(self, inspection: Inspection) -> None:
        for name in inspection.stages():
            stage = inspection.stage(name)
            read = {source for node in stage.nodes for source in node.inputs}
            for node in stage.nodes:
                if node.name in read:
                    assert node.values, f"{name}: {node.name}"

    def test_nodes_are_traced_to_the_users_line_and_module(self, inspection: Inspection) -> None:
        linear = [n for n in inspection.stage().nodes if n.operator == "optcpu.linear"]
        assert len(linear) == 2
        source = linear[0].source
        assert source is not None
        assert source.file.endswith("test_inspect.py")
        assert source.code == "hidden = F.relu(self.first(x))"
        assert source.function == "forward"
        assert linear[1].module == "second"
        assert inspection.modules["first"] == "Linear"
        assert inspection.modules[""] == "Net"
        backward = inspection.stage("backward")
        fused = [n for n in backward.nodes if n.operator == "optcpu.linear_backward"]
        assert [n.module for n in fused] == ["second", "first"]
        assert fused[1].source is not None
        assert fused[1].source.line == source.line

    def test_inputs_are_called_what_the_user_calls_them(self, inspection: Inspection) -> None:
        labels = {n.label: n.type for n in inspection.stage("joint").nodes if n.label}
        assert labels["first.weight"] == "f32[32, 16]"
        assert labels["norm.running_mean"] == "f32[32]"
        assert labels["x"] == "f32[4, 16]"
        assert labels["gradient of output 0"] == "f32[4, 8]"

    def test_what_is_fused_and_what_stays_in_fp32(self, inspection: Inspection) -> None:
        fused = {(f.graph, f.operator, f.detail): f.times for f in inspection.fused()}
        assert fused["forward", "optcpu.linear", ""] == 2
        assert fused["backward", "optcpu.linear_backward", "relu"] == 1
        (norms,) = inspection.stays_wide()
        assert norms.reason == "not in the policy"
        assert "aten.rsqrt" in norms.operators
        assert inspection.casts_left()["forward"]["f32 to bf16"] > 0

    def test_there_was_nothing_to_complain_about(self, inspection: Inspection) -> None:
        assert inspection.breaks == ()
        assert inspection.fallbacks == ()

    def test_it_says_that_small_products_are_written_out(self, inspection: Inspection) -> None:
        (note,) = inspection.notes
        assert note.startswith(f"{sum(f.times for f in inspection.fused())} of the fused")


def test_it_says_which_blocks_share_their_code() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    inspection = optcpu.inspect(model, torch.randn(2, 3, 8), precision="fp32")
    notes = [note for note in inspection.notes if note.startswith("Code is generated once")]
    (note,) = notes
    assert re.search(
        r": 4 of \d+ operators \(forward\), [34] of \d+ operators \(backward\)\.$", note
    )


class TestReading:
    def test_code(self, inspection: Inspection) -> None:
        code = inspection.code()
        assert code == inspection.code("forward/final") == inspection.code("forward")
        assert re.search(
            r"^linear_default\w*: bf16\[4, \d+\] = optcpu\.linear\(.*\)  # .*test_inspect\.py:\d+ "
            r"hidden = F\.relu\(self\.first\(x\)\)",
            code,
            re.MULTILINE,
        )
        assert "  # first.weight" in code

    def test_difference(self, inspection: Inspection) -> None:
        difference = inspection.diff("joint/canonicalize", "joint/insert-casts")
        assert difference.startswith("--- joint/canonicalize\n+++ joint/insert-casts\n")
        assert re.search(
            r"^\+addmm_default: bf16\[4, 32\] = aten\.addmm\(", difference, re.MULTILINE
        )
        assert re.search(r"^-addmm: f32\[4, 32\] = aten\.addmm\(", difference, re.MULTILINE)
        assert inspection.diff("captured", "captured") == ""

    @pytest.mark.parametrize(("stage", "region"), [("backwards", 0), ("forward", 1)])
    def test_what_is_not_there(self, inspection: Inspection, stage: str, region: int) -> None:
        expected = "has no stage 'backwards'; it has 'captured'" if region == 0 else "no region 1"
        with pytest.raises(ValueError, match=expected):
            inspection.code(stage, region)

    def test_json(self, inspection: Inspection, tmp_path: Path) -> None:
        path = tmp_path / "graphs.json"
        read = json.loads(inspection.to_json(path))
        assert read == json.loads(path.read_text())
        assert read["summary"]["fired"] == inspection.counts()
        graph = next(g for g in read["regions"][0]["graphs"] if g["name"] == "forward")
        names = [read["nodes"][position]["name"] for position in graph["final"]["nodes"]]
        assert names == [node.name for node in inspection.stage().nodes]

    def test_no_code_was_generated(self, inspection: Inspection) -> None:
        with pytest.raises(ValueError, match="inspect with codegen=True"):
            inspection.output_code()


class TestNothingIsDisturbed:
    def test_model_inputs_and_random_state(self) -> None:
        model = Net()
        x = the_input().requires_grad_()
        model(x.detach()).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        values = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
        state = {name: value.clone() for name, value in model.state_dict().items()}
        torch_state, python_state = torch.get_rng_state(), random.getstate()
        numpy_state: Any = np.random.get_state()
        inspect(model, x, train=True)
        inspect(model.eval(), x, train=True)
        assert not model.training
        assert x.grad is None
        for name, parameter in model.named_parameters():
            assert parameter.grad is gradients[name]
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, values[name])
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert random.getstate() == python_state
        numpy_after: Any = np.random.get_state()
        assert (numpy_after[1] == numpy_state[1]).all()
        assert numpy_after[2] == numpy_state[2]
        assert compiled_call(model) is None

    def test_a_model_that_cannot_be_copied(self) -> None:
        model = Net()
        model.lock = threading.Lock()  # type: ignore[assignment]
        model.second.eval()
        model(the_input()).sum().backward()
        gradient = model.first.weight.grad
        buffer = model.norm.running_mean
        assert buffer is not None
        assert gradient is not None
        before = buffer.clone(), gradient.clone()
        inspection = inspect(model, the_input(), train=True)
        assert "cannot be copied" in inspection.notes[0]
        assert "backward/final" in inspection.stages()
        assert model.norm.running_mean is buffer
        assert torch.equal(buffer, before[0])
        assert model.first.weight.grad is gradient
        assert torch.equal(gradient, before[1])
        assert (model.training, model.second.training) == (True, False)

    def test_an_optimized_model_keeps_its_code(self) -> None:
        model = optcpu.optimize(Broken(), precision="fp32", keep_memory=False)
        call = compiled_call(model)
        assert call is not None
        x = the_input()
        expected = model(x)
        expected.sum().backward()
        regions = call.record.regions
        for _ in range(3):
            inspection = inspect(model, x)
        assert inspection.precision == "fp32"
        assert len(inspection.regions) == 2
        assert torch.equal(model(x), expected)
        assert call.record.regions == regions

    def test_earlier_batch_sizes_are_not_remembered(self) -> None:
        for rows in (4, 8, 16):
            stage = inspect(Net(), the_input(rows)).stage("captured")
            assert next(n for n in stage.nodes if n.label == "x").type == f"f32[{rows}, 16]"


class TestSettings:
    def test_those_of_the_optimized_model(self) -> None:
        model = optcpu.optimize(Net(), precision="fp32", passes=[Canonicalize()], keep_memory=False)
        inspection = inspect(model, the_input())
        assert (inspection.precision, inspection.passes) == ("fp32", ("canonicalize",))
        assert {s.reason for s in inspection.stays_wide()} == {"precision is fp32"}

    def test_earlier_fallbacks_are_told(self) -> None:
        def fails(graph: fx.Graph) -> int:
            raise RuntimeError("not today")

        model = optcpu.optimize(Net(), passes=[fails], keep_memory=False)
        with pytest.warns(optcpu.FallbackWarning):
            model(the_input())
        inspection = inspect(model, the_input())
        assert [f.part for f in inspection.earlier_fallbacks] == ["pass fails"]
        assert "fallback (before this inspection): pass fails" in str(inspection)

    def test_a_failing_pass_is_told_and_the_others_run(self) -> None:
        def fails(graph: fx.Graph) -> int:
            next(iter(graph.nodes)).target = "nonsense"
            raise RuntimeError("not today")

        def counts(graph: fx.Graph) -> int:
            return 3

        inspection = inspect(Net(), the_input(), precision="bf16", passes=[fails, counts])
        failed, counted = inspection.totals()
        assert failed.errors == ("RuntimeError: not today",)
        assert (failed.total, counted.total) == (0, 3)
        assert inspection.diff("joint/initial", "joint/fails") == ""
        (fallback,) = inspection.fallbacks
        assert fallback.part == "pass fails"
        assert any("insert-casts is not in the list" in s.reason for s in inspection.stays_wide())

    def test_evaluation(self) -> None:
        inspection = inspect(Net(), the_input(), train=False)
        assert not inspection.training
        assert [g.kind for g in inspection.graphs] == ["joint", "inference"]
        assert "Gradients are off" in inspection.notes[0]
        assert inspection.code() == inspection.code("inference/final")

    def test_the_modes_of_the_caller(self) -> None:
        model = Net().eval()
        assert "backward/final" in inspect(model, the_input()).stages()
        with torch.no_grad():
            assert "inference/final" in inspect(model, the_input()).stages()
            assert "backward/final" in inspect(model, the_input(), train=True).stages()
        with torch.inference_mode():
            assert "inference/final" in inspect(model, the_input()).stages()

    def test_own_loss(self) -> None:
        seen: list[Tensor] = []

        def loss(output: Tensor) -> Tensor:
            seen.append(output)
            return output.square().mean()

        assert "backward/final" in inspect(Net(), the_input(), loss=loss).stages()
        assert seen[0].shape == (4, 8)

    @pytest.mark.slow
    def test_generated_code(self) -> None:
        inspection = inspect(Net(), the_input(), codegen=True)
        for graph in ("forward", "backward"):
            assert "def call(" in inspection.output_code(graph)


@dataclasses.dataclass
class Answer:
    logits: Tensor
    count: int


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(16, 9, batch_first=True, proj_size=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Output(nn.Module):
    """Of a recurrent layer."""

    def forward(self, result: tuple[Tensor, Any]) -> Tensor:
        return result[0]


class Returning(nn.Module):
    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)
        self.give = give

    def forward(self, x: Tensor, *more: Tensor, scale: float = 1.0) -> Any:
        return self.give(self.layer(x) * scale)


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.sum() > -1e9:
            y = self.second(y)
        return y


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class TestAnyModel:
    def test_graph_break(self) -> None:
        inspection = inspect(Broken(), the_input())
        (found,) = inspection.breaks
        assert "torch._dynamo.graph_break()" in found.reason
        assert found.source is not None
        assert found.source.file.endswith("test_inspect.py")
        assert found.source.code == "torch._dynamo.graph_break()"
        assert len(inspection.regions) == 2
        assert "backward/final" in inspection.stages(0)
        assert "backward/final" in inspection.stages(1)
        assert f"test_inspect.py:{found.source.line}" in str(inspection)

    def test_data_dependent_control_flow(self) -> None:
        (found,) = inspect(Deciding(), the_input()).breaks
        assert "ata-dependent" in found.reason
        assert found.source is not None
        assert found.source.code == "if y.sum() > -1e9:"
        assert found.remedies

    def test_recurrent(self) -> None:
        inspection = inspect(Classifier(), torch.randn(2, 5, 16), precision="bf16")
        assert any("LSTM" in found.reason for found in inspection.breaks)
        in_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert any("recurrent layers" in note for note in inspection.notes) == in_bf16
        assert str(inspection)

    @pytest.mark.skipif(not kernel_available(torch.float32), reason="its steps have no kernel here")
    def test_a_recurrent_layer_that_is_captured(self) -> None:
        """It is captured, and its work counted: all products of the layer, and of the head."""
        model = nn.Sequential(nn.LSTM(16, 8), Output(), nn.Linear(8, 4))
        inspection = inspect(model, torch.randn(5, 2, 16), precision="fp32")
        assert not inspection.breaks
        counts = {graph.kind: graph.flops for graph in inspection.graphs}
        head = 2 * 10 * 8 * 4
        assert counts["joint"] == 2 * 10 * 32 * (16 + 8 + 16 + 8 + 8) + 3 * head

    @pytest.mark.parametrize(
        "give",
        [
            lambda y: {"logits": y, "name": "x"},
            lambda y: (y, [y + 1, None]),
            lambda y: Answer(y, 3),
        ],
        ids=["dict", "nested", "dataclass"],
    )
    def test_outputs_of_any_form(self, give: Callable[[Tensor], Any]) -> None:
        inspection = inspect(Returning(give), the_input(), the_input(), scale=2.0)
        assert "backward/final" in inspection.stages()

    def test_no_parameters(self) -> None:
        inspection = inspect(Doubling(), the_input())
        assert inspection.notes == ("No output needs a gradient: there is no backward to show.",)
        assert "inference/final" in inspection.stages()
        assert "backward/final" in inspect(Doubling(), the_input().requires_grad_()).stages()

    def test_plain_sequential_points_to_its_modules(self) -> None:
        stage = inspect(nn.Sequential(nn.Linear(16, 8), nn.ReLU()), the_input()).stage("captured")
        linear = next(n for n in stage.nodes if n.operator.endswith("linear"))
        assert linear.module == "0"
        assert linear.source is None or linear.source.library

    def test_symbolic_sizes(self) -> None:
        model = optcpu.optimize(Net(), dynamic=True, keep_memory=False)
        stage = inspect(model, the_input()).stage("captured")
        assert re.fullmatch(r"f32\[s\d+, 16\]", next(n for n in stage.nodes if n.label == "x").type)


class TestBadInput:
    def test_not_a_module(self) -> None:
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not function"):
            inspect(lambda x: x, the_input())  # type: ignore[arg-type]

    def test_no_inputs(self) -> None:
        with pytest.raises(TypeError, match=r"called as forward.*missing a required argument: 'x'"):
            inspect(Net())

    def test_unknown_keyword(self) -> None:
        with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
            inspect(Net(), the_input(), y=1)

    def test_wrong_shape(self, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(
            ValueError, match=r"Net does not run on these inputs \(float32\[4, 9\]\): "
        ):
            inspect(Net(), torch.randn(4, 9))
        assert "Traceback" not in capfd.readouterr().err

    def test_elsewhere(self) -> None:
        with pytest.raises(ValueError, match=r"input \[0\] is on meta.*value\.cpu\(\)"):
            inspect(Net(), the_input().to("meta"))
        with pytest.raises(ValueError, match=r"parameter 'first.weight' is on meta"):
            inspect(Net().to("meta"), the_input())
        model = Net()
        model.norm.running_mean = torch.zeros(32, device="meta")
        with pytest.raises(ValueError, match=r"buffer 'norm\.running_mean' is on meta"):
            inspect(model, the_input())

    def test_wrong_loss(self) -> None:
        with pytest.raises(TypeError, match="loss must be a function"):
            inspect(Net(), the_input(), loss=torch.ones(1))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"one number, not shape \[4, 8\]"):
            inspect(Net(), the_input(), loss=lambda output: output)

    def test_wrong_precision(self) -> None:
        with pytest.raises(ValueError, match="precision must be"):
            inspect(Net(), the_input(), precision="int8")


class TestPrinting:
    @pytest.mark.parametrize("columns", ["80", "120"])
    def test_it_fits(
        self, inspection: Inspection, columns: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", columns)
        text = str(inspection)
        assert max(map(len, text.splitlines())) <= int(columns)
        for name in inspection.counts():
            assert re.search(rf"^{name} ", text, re.MULTILINE), name
        assert "1 region captured, 1 joint, 1 forward, 1 backward" in text
        assert re.search(r"^graph breaks +none$", text, re.MULTILINE)
        assert re.search(r"^backward fused +.*optcpu\.linear_backward", text, re.MULTILINE)
