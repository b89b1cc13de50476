from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from training import small_data

from optcpu.measure.batches import call_model, default_loss
from optcpu.runtime import Job, Trainer
from optcpu.runtime.data.loading import Feed
from optcpu.runtime.jobs import BUILT_IN, job


@pytest.mark.parametrize("name", ["digits-cnn", "mlp", "synthetic"])
def test_built_in_jobs_can_be_trained_and_validated(name: str) -> None:
    what = job(name)
    batch = tuple(Feed(what.train_data, batch_size=4, workers=0).take()[0])
    loss = (what.loss or default_loss)(call_model(what.model, batch), batch)
    assert torch.isfinite(loss)
    assert len(what.train_data) > 3 * len(what.validation_data)
    assert name in BUILT_IN


@pytest.mark.slow
def test_gpt2_job() -> None:
    what = job("gpt2-small")
    batch = tuple(Feed(what.train_data, batch_size=2, workers=0).take()[0])
    assert batch[0].shape == batch[1].shape == (2, 64)
    assert torch.equal(batch[0][:, 1:], batch[1][:, :-1])
    assert what.loss is not None
    loss = what.loss(call_model(what.model, batch), batch).item()
    assert 10 < loss < 12  # ln 50257 = 10.8


@pytest.mark.slow
def test_51_million_parameters_learn_digits() -> None:
    what = job("mlp")
    result = Trainer(
        what.model,
        what.train_data,
        validation_data=what.validation_data,
        metrics=what.metrics,
        epochs=4,
        batch_size=128,
        lr=3e-4,
        scheduler="cosine",
        validate_every=48,
        progress=False,
        threads=2,
    ).train()
    assert result.metrics["accuracy"] > 0.85


def test_training_and_validation_share_no_sample() -> None:
    what = job("gpt2-small")
    assert set(what.train_data.indices).isdisjoint(what.validation_data.indices)


def test_the_seed_makes_the_weights() -> None:
    def first(seed: int) -> torch.Tensor:
        return next(job("synthetic", seed).model.parameters())

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("own_job")
    monkeypatch.setitem(sys.modules, "own_job", module)
    return module


def test_own_jobs(own: ModuleType) -> None:
    model = nn.Linear(6, 3)
    own.__dict__["two"] = lambda: (model, small_data())
    own.__dict__["four"] = lambda seed: (model, small_data(), None, default_loss)
    own.__dict__["whole"] = lambda: Job(model, [], metrics=["accuracy"])
    assert job("own_job:two").model is model
    assert job("own_job:four").loss is default_loss
    assert job("own_job:whole").metrics == ["accuracy"]


def test_wrong_jobs_are_told(own: ModuleType, tmp_path: Path) -> None:
    own.__dict__["three"] = lambda: 3
    with pytest.raises(ValueError, match="no job is called 'digits'; did you mean 'digits-cnn'"):
        job("digits")
    with pytest.raises(TypeError, match=r"own_job:three must return a Job, .*; it returned a int"):
        job("own_job:three")
    with pytest.raises(ValueError, match="has no attribute 'thre'; did you mean 'three'"):
        job("own_job:thre")
