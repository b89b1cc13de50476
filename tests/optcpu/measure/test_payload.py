from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optcpu.errors import OptcpuError
from optcpu.measure.payload import Payload, Trial, checked_payload, try_out

X = torch.randn(4, 8)
Y = torch.randint(0, 3, (4,))


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def tried(module: nn.Module, batch: Any = (X, Y), **functions: Any) -> Trial:
    loss, optimizer = functions.get("loss"), functions.get("optimizer")
    return try_out(checked_payload(module, batch, loss, optimizer), 0)


class TestSaving:
    def test_a_job_is_read_back_with_its_weights_and_ties(self, tmp_path: Path) -> None:
        tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
        tied[1].weight = tied[0].weight
        factor = 2.0
        payload = checked_payload(tied, (X, Y), lambda o, b: factor * o.sum(), torch.optim.SGD)
        payload.save(tmp_path / "payload.pt")
        loaded = Payload.load(tmp_path / "payload.pt")
        assert isinstance(loaded.model, nn.Sequential)
        assert loaded.model[1].weight is loaded.model[0].weight
        assert torch.equal(loaded.model[2].bias, tied[2].bias)
        assert torch.equal(loaded.batches[0][0], X)
        assert float(loaded.loss(torch.ones(3), None)) == 6.0
        assert loaded.optimizer is torch.optim.SGD

    def test_gradients_stay_behind(self, tmp_path: Path) -> None:
        module = model()
        module(X).sum().backward()
        checked_payload(module, (X, Y), None, None).save(tmp_path / "payload.pt")
        loaded = Payload.load(tmp_path / "payload.pt").model
        assert all(parameter.grad is None for parameter in loaded.parameters())

    def test_the_attribute_that_cannot_be_pickled_is_named(self, tmp_path: Path) -> None:
        module = model()
        module[1].guard = threading.Lock()
        payload = checked_payload(module, (X, Y), None, None)
        with pytest.raises(OptcpuError, match=r"attribute '1.guard' of the model \(lock\)"):
            payload.save(tmp_path / "payload.pt")

    def test_a_loss_that_cannot_be_pickled_is_named(self, tmp_path: Path) -> None:
        lock = threading.Lock()

        def loss(output: Tensor, batch: object) -> Tensor:
            with lock:
                return output.sum()

        payload = checked_payload(model(), (X, Y), loss, None)
        with pytest.raises(OptcpuError, match="the loss function cannot be sent"):
            payload.save(tmp_path / "payload.pt")

    def test_a_folder_without_room_is_named(self, tmp_path: Path) -> None:
        payload = checked_payload(model(), (X, Y), None, None)
        with pytest.raises(OptcpuError, match="TMPDIR"):
            payload.save(tmp_path / "no" / "such" / "folder.pt")

    @pytest.mark.slow
    def test_what_a_script_defines_is_carried_along(self, tmp_path: Path) -> None:
        script = """
            import sys
            from pathlib import Path
            import torch
            from torch import nn
            from optcpu.measure.payload import checked_payload
            SCALE = 2.0
            def scaled(x):
                return SCALE * x
            class Net(nn.Linear):
                def forward(self, x):
                    return super().forward(scaled(x))
            payload = checked_payload(Net(8, 3), torch.randn(4, 8), lambda o, b: o.sum(), None)
            payload.save(Path(sys.argv[1]))
        """
        (tmp_path / "script.py").write_text(textwrap.dedent(script))
        file = tmp_path / "payload.pt"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, tmp_path / "script.py", file]
        subprocess.run(command, check=True, env=environment)
        loaded = Payload.load(file)
        assert loaded.script_globals["SCALE"] == 2.0
        assert type(loaded.model).__name__ == "Net"
        assert loaded.model(X).shape == (4, 3)


class NotCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class TestRefusals:
    def test_a_class_is_not_a_model(self) -> None:
        with pytest.raises(TypeError, match=r"not the class NotCalled. Make an instance"):
            checked_payload(NotCalled, X, None, None)  # type: ignore[arg-type]

    def test_a_function_is_not_a_model(self) -> None:
        with pytest.raises(TypeError, match=r"must be a torch.nn.Module, not function"):
            checked_payload(lambda x: x, X, None, None)  # type: ignore[arg-type]

    def test_a_compiled_model_is_unwrapped(self) -> None:
        plain = model()
        assert checked_payload(torch.compile(plain), (X, Y), None, None).model is plain

    def test_an_optimizer_is_no_factory(self) -> None:
        module = model()
        optimizer = torch.optim.SGD(module.parameters())
        with pytest.raises(TypeError, match=r"lambda parameters: torch\.optim\.AdamW"):
            checked_payload(module, (X, Y), None, optimizer)  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_parameters_must_be_finite(self, value: float) -> None:
        module = model()
        with torch.no_grad():
            module[2].weight[1, 2] = value
        with pytest.raises(ValueError, match=r"parameter '2\.weight' has values that are NaN"):
            checked_payload(module, (X, Y), None, None)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_parameters_must_be_fp32(self, dtype: torch.dtype) -> None:
        with pytest.raises(ValueError, match=r"'0.weight' is (bfloat16|float64).*model.float"):
            checked_payload(model().to(dtype), (X, Y), None, None)

    def test_parameters_must_be_on_the_cpu(self) -> None:
        with pytest.raises(ValueError, match=r"'0.weight' is on meta.*model.cpu\(\)"):
            checked_payload(model().to("meta"), (X, Y), None, None)

    def test_lazy_parameters_must_be_initialised(self) -> None:
        with pytest.raises(ValueError, match="'weight' is not initialised yet"):
            checked_payload(nn.LazyLinear(3), (X, Y), None, None)

    def test_something_must_be_trained(self) -> None:
        with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
            checked_payload(model().requires_grad_(False), (X, Y), None, None)

    def test_an_input_of_the_wrong_shape_is_shown(self) -> None:
        message = r"model\(float32\[4, 9\]\) failed in eager FP32: RuntimeError: mat1 and mat2"
        with pytest.raises(ValueError, match=message):
            tried(model(), (torch.randn(4, 9), Y))

    def test_every_shape_is_tried(self) -> None:
        with pytest.raises(ValueError, match=r"model\(float32\[2, 7\]\) failed"):
            tried(model(), [(X, Y), (torch.randn(2, 7), Y[:2])])

    def test_the_loss_must_be_a_scalar(self) -> None:
        with pytest.raises(ValueError, match=r"a scalar tensor, not a tensor of shape \[4, 3\]"):
            tried(model(), loss=lambda output, batch: output)
        with pytest.raises(ValueError, match=r"a scalar tensor, not 3\.0"):
            tried(model(), loss=lambda output, batch: 3.0)

    def test_a_loss_that_fails_is_shown_with_what_it_is_given(self) -> None:
        with pytest.raises(ValueError, match=r"loss\(output, batch\) failed: TypeError"):
            tried(model(), loss=nn.CrossEntropyLoss())

    @pytest.mark.parametrize("module", [NotCalled(), Detached(8, 3)])
    def test_the_loss_must_depend_on_a_parameter(self, module: nn.Module) -> None:
        with pytest.raises(ValueError, match="does not depend on any parameter"):
            tried(module, loss=lambda output, batch: output.sum())

    def test_the_loss_must_be_finite(self) -> None:
        with pytest.raises(ValueError, match="the loss of the first batch is inf"):
            tried(model(), loss=lambda output, batch: output.abs().sum() / 0.0)

    def test_gradients_must_be_finite(self) -> None:
        with pytest.raises(ValueError, match=r"gradient of '0.weight' is NaN"):
            tried(model(), loss=lambda output, batch: (output - output.detach()).sum().sqrt())

    def test_an_optimizer_that_fails_is_shown(self) -> None:
        with pytest.raises(ValueError, match="making the optimizer or its first step failed"):
            tried(model(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=-1.0))


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(())


class TestTrial:
    def test_a_plain_model_is_not_random(self) -> None:
        trial = tried(model())
        assert (trial.random, trial.random_without_dropout) == (False, False)

    def test_batch_norm_is_not_random(self) -> None:
        assert not tried(nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))).random

    def test_dropout_is_random_until_it_is_off(self) -> None:
        dropped = nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5))
        trial = tried(dropped)
        assert (trial.random, trial.random_without_dropout) == (True, False)

    def test_other_randomness_stays(self) -> None:
        trial = tried(Noisy(8, 3))
        assert (trial.random, trial.random_without_dropout) == (True, True)

    def test_random_generators_are_left_as_they_were(self) -> None:
        noisy = Noisy(8, 3)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        tried(noisy)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.array_equal(np.random.get_state()[1], states[2])
