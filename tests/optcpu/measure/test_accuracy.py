from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from optcpu.measure.accuracy import FirstStep, change_norms, compare_first_steps, dropout_off


def first_step(scale: float = 1.0, **gradients: torch.Tensor) -> FirstStep:
    return FirstStep([torch.ones(3, 4) * scale], torch.tensor(2.0 * scale), gradients)


def test_equal_steps_have_no_error() -> None:
    accuracy = compare_first_steps(first_step(w=torch.ones(5)), first_step(w=torch.ones(5)))
    assert (accuracy.output, accuracy.loss, accuracy.gradient) == (0.0, 0.0, 0.0)
    assert (accuracy.worst_gradient, accuracy.worst_gradient_error) == (None, 0.0)


def test_errors_are_relative_l2_norms_and_the_worst_gradient_is_named() -> None:
    reference = first_step(a=torch.tensor([3.0, 4.0]), b=torch.tensor([12.0]))
    step = first_step(1.01, a=torch.tensor([3.0, 5.0]), b=torch.tensor([12.0]))
    accuracy = compare_first_steps(step, reference)
    assert accuracy.output == pytest.approx(0.01)
    assert accuracy.loss == pytest.approx(0.01)
    assert accuracy.gradient == pytest.approx(1 / 13)
    assert accuracy.worst_gradient == "a"
    assert accuracy.worst_gradient_error == pytest.approx(1 / 5)


def test_large_tensors_are_compared_whole() -> None:
    reference = torch.ones(2**20 + 3)
    other = reference.clone()
    other[-1] = 2.0  # in the last chunk
    accuracy = compare_first_steps(first_step(w=other), first_step(w=reference))
    assert accuracy.gradient == pytest.approx(1 / math.sqrt(2**20 + 3))


def test_a_missing_gradient_counts_as_zero() -> None:
    reference = first_step(w=torch.ones(5), noise=torch.full((1,), 1e-9), v=torch.ones(2))
    accuracy = compare_first_steps(first_step(v=torch.ones(2)), reference)
    assert accuracy.worst_gradient == "w"
    assert accuracy.worst_gradient_error == 1.0
    assert accuracy.without_gradient == ["w"]


def test_a_gradient_that_should_not_be_there_is_an_infinite_error() -> None:
    accuracy = compare_first_steps(first_step(w=torch.ones(5)), first_step())
    assert accuracy.gradient == math.inf


def test_nan_is_the_worst_gradient() -> None:
    reference = first_step(a=torch.ones(2), b=torch.ones(2), c=torch.ones(2))
    step = first_step(a=torch.zeros(2), b=torch.tensor([1.0, math.nan]), c=torch.ones(2))
    accuracy = compare_first_steps(step, reference)
    assert accuracy.worst_gradient == "b"
    assert math.isnan(accuracy.gradient or 0.0)


def test_rounding_noise_around_zero_is_not_the_worst_gradient() -> None:
    reference = first_step(key_bias=torch.full((4,), 1e-9), w=torch.ones(100))
    step = first_step(key_bias=torch.full((4,), -5e-6), w=torch.full((100,), 1.01))
    accuracy = compare_first_steps(step, reference)
    assert accuracy.worst_gradient == "w"


def test_gradients_in_another_layout_are_told_and_not_compared() -> None:
    accuracy = compare_first_steps(first_step(w=torch.ones(6)), first_step(w=torch.ones(2, 3)))
    assert accuracy.gradient is None
    assert "another shape" in accuracy.notes[0]


def test_outputs_of_other_shapes_are_told_and_not_compared() -> None:
    other = FirstStep([torch.ones(4, 3)], torch.tensor(2.0), {})
    accuracy = compare_first_steps(other, first_step())
    assert accuracy.output is None
    assert "output" in accuracy.notes[0]


def test_a_saved_step_is_read_back(tmp_path: Path) -> None:
    step = first_step(w=torch.randn(5))
    step.save(tmp_path / "step.pt")
    loaded = FirstStep.load(tmp_path / "step.pt")
    assert torch.equal(loaded.gradients["w"], step.gradients["w"])
    assert torch.equal(loaded.output[0], step.output[0])
    assert torch.equal(loaded.loss, step.loss)


def test_change_norms() -> None:
    before = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])}
    after = {"w": torch.tensor([4.0, 6.0]), "b": torch.tensor([5.0])}
    assert change_norms(after, before) == {"w": 5.0, "b": 0.0}


def test_dropout_is_off_and_batch_norm_is_not() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.1)))
    model[2].eval()
    with dropout_off(model):
        assert model[0].training
        assert not model[1].training
    assert [module.training for module in model.modules()] == [True, True, True, False, False]
