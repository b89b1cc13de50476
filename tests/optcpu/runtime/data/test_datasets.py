"""Samples that are a function of their index, and a task that can be learnt."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optcpu.runtime.data.datasets import SyntheticDataset

DIGEST = """
import hashlib, torch
from optcpu.runtime.data.datasets import SyntheticDataset
torch.set_num_threads(1)
inputs, labels = SyntheticDataset(5000, 33, 7, seed=4, noise=0.2).batch(range(4000))
digest = hashlib.sha256(inputs.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
"""


def shares(dataset: SyntheticDataset) -> Tensor:
    """How often each class comes, as a multiple of its fair share."""
    labels = dataset.batch(range(len(dataset)))[1]
    return (
        torch.bincount(labels, minlength=dataset.num_classes) * dataset.num_classes / len(dataset)
    )


class TestSamples:
    @settings(max_examples=30)
    @given(
        indices=st.lists(st.integers(0, 999), min_size=1, max_size=40),
        shape=st.one_of(st.integers(1, 40), st.lists(st.integers(1, 5), min_size=1, max_size=3)),
        classes=st.integers(2, 12),
        noise=st.sampled_from([0.0, 0.3, 1.0]),
    )
    def test_alone_and_in_any_batch_they_have_the_same_bits(
        self, indices: list[int], shape: Any, classes: int, noise: float
    ) -> None:
        dataset = SyntheticDataset(1000, shape, classes, seed=1, noise=noise)
        inputs, labels = dataset.batch(indices)
        assert inputs.shape == (len(indices), *dataset.shape)
        assert inputs.dtype == torch.float32
        assert labels.dtype == torch.int64
        samples = dataset.__getitems__(indices)
        for place, index in enumerate(indices):
            alone, label = dataset[index]
            assert torch.equal(alone, inputs[place])
            assert torch.equal(samples[place][0], alone)
            assert label.shape == ()
            assert label == labels[place] == samples[place][1]

    def test_every_process_has_the_same_with_any_number_of_threads(self) -> None:
        other = subprocess.run(
            [sys.executable, "-c", f"{DIGEST}print(digest)"],
            capture_output=True,
            text=True,
            check=True,
        )
        here: dict[str, str] = {}
        exec(DIGEST.replace("num_threads(1)", "num_threads(2)"), here)
        assert other.stdout.strip() == here["digest"]

    def test_size_changes_no_sample_and_seed_all(self) -> None:
        small, large = SyntheticDataset(10, 20, 3), SyntheticDataset(10**12, 20, 3)
        assert torch.equal(small[9][0], large[9][0])
        assert not torch.equal(small[9][0], SyntheticDataset(10, 20, 3, seed=1)[9][0])
        assert large[10**12 - 1][0].isfinite().all()

    def test_copies_are_the_same_and_small(self) -> None:
        dataset = SyntheticDataset(10**9, 100, 10, seed=2)
        stored = pickle.dumps(dataset)
        assert len(stored) < 10_000
        assert torch.equal(pickle.loads(stored)[12345][0], dataset[12345][0])

    def test_generators_are_left_alone(self) -> None:
        before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
        SyntheticDataset(100, (3, 4), 20, noise=0.5).batch(range(50))
        after = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])

    def test_inputs_are_normally_distributed_and_independent(self) -> None:
        inputs = SyntheticDataset(20_000, 10, 2).batch(range(20_000))[0].double()
        assert inputs.mean().abs() < 0.01
        assert abs(inputs.var() - 1) < 0.01
        assert abs((inputs**4).mean() - 3) < 0.1
        assert abs((inputs.abs() < 1.96).double().mean() - 0.95) < 0.005
        assert (torch.corrcoef(inputs.T) - torch.eye(10)).abs().max() < 0.03
        neighbours = torch.corrcoef(torch.stack([inputs[1:].ravel(), inputs[:-1].ravel()]))
        assert neighbours[0, 1].abs() < 0.01

    def test_negative_indices_count_from_the_end(self) -> None:
        dataset = SyntheticDataset(10, 4, 2)
        assert torch.equal(dataset[-1][0], dataset[9][0])
        assert torch.equal(dataset[-10][0], dataset[np.int64(0)][0])

    @pytest.mark.parametrize("index", [10, -11])
    def test_there_are_no_others(self, index: int) -> None:
        with pytest.raises(IndexError, match=f"index {index} is out of range .* 10 samples"):
            SyntheticDataset(10, 4, 2)[index]

    def test_it_ends_when_iterated_over(self) -> None:
        dataset = SyntheticDataset(3, 4, 2)
        assert len([sample for sample in dataset]) == len(dataset) == 3  # noqa: C416

    def test_an_index_is_an_integer(self) -> None:
        with pytest.raises(TypeError):
            SyntheticDataset(10, 4, 2)[1.0]  # type: ignore[index]


class TestLabels:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize(("width", "classes"), [(784, 10), (10, 10), (4, 3), (2, 2), (1, 2)])
    def test_classes_are_equally_likely(self, width: int, classes: int, seed: int) -> None:
        found = shares(SyntheticDataset(20_000, width, classes, seed=seed))
        assert (found - 1).abs().max() < 0.12

    @pytest.mark.parametrize(("width", "classes"), [(8, 10), (4, 30), (16, 100), (3, 5)])
    def test_more_classes_than_dimensions_all_come(self, width: int, classes: int) -> None:
        found = shares(SyntheticDataset(50_000, width, classes))
        assert found.min() > 0.4
        assert found.max() < 2

    def test_noise_replaces_its_share_of_labels_by_any(self) -> None:
        clean, noisy = (SyntheticDataset(20_000, 20, 4, noise=noise) for noise in (0.0, 0.4))
        inputs, labels = clean.batch(range(20_000))
        same, replaced = noisy.batch(range(20_000))
        assert torch.equal(inputs, same)
        changed = (labels != replaced).double().mean().item()
        assert changed == pytest.approx(0.4 * 3 / 4, abs=0.015)
        others = (replaced - labels)[labels != replaced] % 4
        assert (torch.bincount(others)[1:] / len(others) - 1 / 3).abs().max() < 0.03

    def test_a_small_network_learns_them_on_samples_it_has_not_seen(self) -> None:
        assert held_out_accuracy(noise=0.0) > 0.93

    def test_noise_limits_what_can_be_learnt(self) -> None:
        best = 1 - 0.3 * 9 / 10
        assert best - 0.1 < held_out_accuracy(noise=0.3) < best + 0.02


def held_out_accuracy(noise: float) -> float:
    dataset = SyntheticDataset(60_000, 32, 10, seed=1, noise=noise)
    torch.set_num_threads(1)  # it is small
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=400)
    for step in range(400):
        inputs, labels = dataset.batch(range(step * 128, (step + 1) * 128))
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    inputs, labels = dataset.batch(range(52_000, 60_000))
    return (model(inputs).argmax(dim=1) == labels).double().mean().item()


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"size": 0}, "size must be at least 1, got 0"),
            ({"input_dim": 0}, "input_dim must be at least 1"),
            ({"input_dim": (3, -1)}, "input_dim must be at least 1, got -1"),
            ({"num_classes": 1}, "num_classes must be at least 2"),
            ({"noise": -0.1}, r"in 0\.\.1, got -0\.1"),
            ({"noise": 1.1}, r"in 0\.\.1"),
            ({"noise": float("nan")}, r"in 0\.\.1, got nan"),
        ],
    )
    def test_values(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SyntheticDataset(**{"size": 10, "input_dim": 4, "num_classes": 2, **arguments})

    @pytest.mark.parametrize(
        "arguments",
        [
            {"size": 10.0},
            {"input_dim": "4"},
            {"input_dim": ()},
            {"num_classes": True},
            {"seed": 0.5},
        ],
    )
    def test_types(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(TypeError):
            SyntheticDataset(**{"size": 10, "input_dim": 4, "num_classes": 2, **arguments})
