from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from training import Losses, assert_equal, small_data, small_model, small_trainer, tensors_of

import optcpu
from optcpu import Trainer
from optcpu.compiled_call import compiled_call
from optcpu.errors import OptcpuError
from optcpu.optim.weights import StoredWeight
from optcpu.runtime import Callback


@pytest.mark.slow
def test_the_shortest_use() -> None:
    model = nn.Linear(6, 3)
    loader = DataLoader(small_data(), batch_size=4)
    before = model.weight.detach().clone()
    result = Trainer(model, loader, epochs=5, accumulation_steps=8).train()
    assert (result.steps, result.epochs, result.samples) == (5, 5, 110)
    assert not torch.equal(model.weight, before)


def test_it_is_the_loop_that_one_would_write_by_hand() -> None:
    batches = [tuple(batch) for batch in DataLoader(small_data(), batch_size=4)]
    losses = Losses()
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    trainer = small_trainer(
        model, batches, optimizer=optimizer, lr=None, scheduler=scheduler, callbacks=[losses]
    )
    trainer.train()

    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    expected = []
    torch.manual_seed(0)
    for _ in range(2):
        for group in (batches[:4], batches[4:]):
            total, sum_ = sum(len(batch[1]) for batch in group), 0.0
            for inputs, targets in group:
                loss = nn.functional.cross_entropy(model(inputs), targets)
                (loss * (len(targets) / total)).backward()
                sum_ += loss.item() * (len(targets) / total)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            expected.append(sum_)
    assert losses.losses == expected
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_it_is_compiled_with_its_optimizer() -> None:
    trainer = small_trainer(compile=True, steps=2)
    assert compiled_call(trainer.model) is not None
    assert isinstance(trainer.optimizer, optcpu.optim.AdamW)
    losses, eager = Losses(), Losses()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small_trainer(model, compile=True, callbacks=[losses], precision="fp32").train()
    optcpu.restore(model)
    model.load_state_dict(start)
    small_trainer(model, callbacks=[eager]).train()
    assert losses.losses == pytest.approx(eager.losses, rel=1e-5)


def test_accumulation_by_names_of_optimizers() -> None:
    for name in ("adamw", "adam", "sgd", "lamb"):
        trainer = small_trainer(
            optimizer={"name": name, "lookahead": {"k": 2}, "weight_decay": 0.1}, lr=0.01
        )
        before = tensors_of(trainer)
        assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.1
        assert trainer.train().steps == 4
        assert not torch.equal(before["model.0.weight"], tensors_of(trainer)["model.0.weight"])


def test_validation_sees_what_was_trained() -> None:
    trainer = small_trainer(validation_data=small_data(8, seed=5), metrics=["accuracy"])
    result = trainer.train()
    assert result.metrics == trainer.validate()
    assert set(result.metrics) == {"loss", "accuracy"}
    assert trainer.model.training


def test_a_dataset_is_shuffled_by_its_seed() -> None:
    first, second, other = (small_trainer(seed=seed) for seed in (3, 3, 4))
    for trainer in (first, second, other):
        trainer.train()
    assert_equal(tensors_of(first), tensors_of(second))
    assert not torch.equal(tensors_of(first)["model.0.weight"], tensors_of(other)["model.0.weight"])


def test_update_in_backward_is_the_same() -> None:
    plain, early = small_trainer(), small_trainer(update_in_backward=True)
    plain.train()
    early.train()
    assert_equal(tensors_of(plain), tensors_of(early))


def test_learning() -> None:
    trainer = small_trainer(
        nn.Linear(6, 3),
        small_data(512),
        batch_size=32,
        accumulation_steps=1,
        epochs=20,
        validation_data=small_data(256, seed=8),
        metrics=["accuracy"],
        scheduler={"name": "cosine", "warmup_steps": 10},
    )
    assert trainer.train().metrics["accuracy"] > 0.95


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"metrics": ["acc"]}, ValueError, "no metric 'acc'"),
        ({"early_stopping": {}}, ValueError, "early_stopping.monitor = 'loss' needs validation_d"),
        (
            {"early_stopping": {"monitor": "f1"}, "validation_data": small_data()},
            ValueError,
            "early_stopping.monitor is 'f1', but validation gives loss",
        ),
        ({"optimizer": 3}, TypeError, "optimizer must be a torch.optim.Optimizer, its settings"),
        ({"optimizer": {"name": "adamm"}}, ValueError, "optimizer.name is 'adamm'"),
        ({"scheduler": 3}, TypeError, "scheduler must be one of PyTorch's"),
        ({"scheduler": "cosin"}, ValueError, "schedule.name is 'cosin'"),
        (
            {"loss": nn.CrossEntropyLoss()},
            TypeError,
            r"lambda output, batch: criterion\(output, batch",
        ),
        (
            {"loss": torch.nn.functional.cross_entropy},
            TypeError,
            r"lambda output, batch: F.cross_entropy\(output, batch",
        ),
        ({"loss": "mse"}, TypeError, "loss must be a function, not str"),
        (
            {"checkpoints": {"every_steps": 2}},
            ValueError,
            "checkpoints.folder is missing: it is required",
        ),
        ({"size_of": 3}, TypeError, "size_of must be a function, not int"),
        ({"collate_fn": 3}, TypeError, "collate_fn must be a function, not int"),
        ({"callbacks": Callback()}, TypeError, "callbacks must be a list of them"),
        ({"metrics": ["accuracy"]}, ValueError, "need validation_data"),
        ({"validate_every": 3}, ValueError, "need validation_data"),
        ({"optimizer": {"lr": 0.1}, "lr": 0.2}, ValueError, "lr is 0.2, and optimizer.lr is 0.1"),
        ({"callbacks": [print]}, TypeError, "callbacks must be optcpu.runtime.Callback objects"),
        ({"epoch": 3}, ValueError, "no setting 'epoch'; did you mean 'epochs'"),
        ({"data": torch.ones(3, 6)}, TypeError, "tensors are no stream of batches"),
        ({"data": []}, ValueError, "the training data are empty"),
        ({"data": TensorDataset(torch.ones(0, 6))}, ValueError, "no samples|empty"),
        ({"freezer": lambda m, o: 3}, TypeError, "freezer must make a DynamicFreezer"),
    ],
)
def test_wrong_arguments_are_told(given: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        small_trainer(**given)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    model, other = nn.Linear(6, 3), nn.Linear(6, 3)
    optimizer, foreign = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    given: dict[str, Any] = {"optimizer": optimizer, "lr": None}
    with pytest.raises(ValueError, match="the optimizer has none of the model's parameters"):
        small_trainer(model, optimizer=foreign, lr=None)
    schedulers = torch.optim.lr_scheduler
    with pytest.raises(ValueError, match="the scheduler is of another optimizer"):
        small_trainer(model, scheduler=schedulers.StepLR(foreign, 1), **given)
    with pytest.raises(ValueError, match="follows the loss of validation: give validation_data"):
        small_trainer(model, scheduler=schedulers.ReduceLROnPlateau, **given)
    with pytest.raises(ValueError, match=r"OneCycleLR has 3 optimizer steps to its end, .* has 4"):
        small_trainer(
            model, scheduler=lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=3), **given
        )
    chain = schedulers.ChainedScheduler([schedulers.OneCycleLR(optimizer, 0.1, total_steps=3)])
    with pytest.raises(ValueError, match="OneCycleLR has 3 optimizer steps"):
        small_trainer(model, scheduler=chain, **given)
    with pytest.raises(ValueError, match="give either scheduler or schedule"):
        small_trainer(model, scheduler="cosine", schedule="linear")
    optimizer.add_param_group({"params": list(other.parameters())})
    small_trainer(model, **given)
    with pytest.raises(ValueError, match="2 of the optimizer's parameters belong neither to the"):
        small_trainer(model, checkpoints="never-written", **given)


def test_a_model_that_is_compiled_otherwise_is_refused() -> None:
    model = nn.Linear(6, 3)
    optcpu.optimize(model, precision="fp32")
    small_trainer(model, compile=True)
    small_trainer(model, compile=True, precision="fp32")
    for given in (
        {"compile": False},
        {"dynamic": True},
        {"precision": "bf16"},
        {"activation_memory": 0.5},
        {"passes": []},
    ):
        with pytest.raises(OptcpuError, match=r"compiled already, with .*: call optcpu.restore"):
            small_trainer(model, **{"compile": True, **given})


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients are FP32 anyway")
@pytest.mark.parametrize(("accumulation", "expected"), [(32, None), (33, torch.float32)])
def test_gradients_of_many_micro_batches_are_added_up_in_fp32(
    accumulation: int, expected: torch.dtype | None
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this processor has no BF16")
        trainer = small_trainer(precision="bf16", accumulation_steps=accumulation, compile=True)
    stored = [p for p in trainer.model.parameters() if isinstance(p, StoredWeight)]
    assert stored
    assert {p.grad_dtype for p in stored} == {expected}


def test_a_model_that_is_none_or_has_nothing_to_train() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not str"):
        Trainer("model", small_data(), epochs=1)  # type: ignore[arg-type]
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    with pytest.raises(
        ValueError, match=r"the trainer averages gradients itself: give model\.module"
    ):
        small_trainer(wrapped)
    with pytest.raises(ValueError, match="there is nothing to train"):
        small_trainer(nn.Linear(6, 3).requires_grad_(False))


def test_a_label_out_of_range_is_told() -> None:
    data = TensorDataset(torch.randn(4, 6), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="the target has class 3, but the output has 3 classes"):
        small_trainer(data=data).train()


def test_a_size_that_is_none_is_told() -> None:
    with pytest.raises(TypeError, match=r"size_of must give the number of samples.* not None"):
        small_trainer(size_of=lambda batch: None).train()
    with pytest.raises(TypeError, match=r"an integer, not 0\.5"):
        small_trainer(size_of=lambda batch: 0.5).train()
    counted = small_trainer(size_of=lambda batch: (batch[1] >= 0).sum(), epochs=1)
    assert counted.train().samples == 22
    with pytest.raises(ValueError, match="a micro-batch counts 0 samples"):
        small_trainer(size_of=lambda batch: 0).train()


def test_a_loss_that_trains_nothing_is_told() -> None:
    with pytest.raises(TypeError, match="the loss depends on no parameter that is trained"):
        small_trainer(loss=lambda output, batch: output.detach().sum()).train()


def test_nothing_to_validate_on() -> None:
    with pytest.raises(OptcpuError, match="give the trainer validation_data"):
        small_trainer().validate()


def test_called_again_it_goes_on() -> None:
    stopping, whole = small_trainer(callbacks=[_StopsAfter(1)]), small_trainer()
    assert [stopping.train().steps for _ in range(3)] == [1, 4, 4]
    whole.train()
    assert_equal(tensors_of(stopping), tensors_of(whole))


class _StopsAfter(Losses):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        super().on_step_end(trainer, metrics)
        if len(self.losses) == self._steps:
            trainer.stop()


def test_the_number_of_threads_is_put_back() -> None:
    torch.set_num_threads(1)
    small_trainer(threads=2).train()
    assert torch.get_num_threads() == 1


def test_processes_that_find_other_checkpoints_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = small_trainer(checkpoints=tmp_path)
    monkeypatch.setattr(trainer._world, "gather", lambda step: [step, 4])
    with pytest.raises(OptcpuError, match=r"other checkpoints \(of the steps \[None, 4\], by proc"):
        trainer.train()


def test_living_loading_processes_are_warned_of_where_a_run_may_go_on(tmp_path: Path) -> None:
    loader = DataLoader(small_data(), batch_size=4, num_workers=1, persistent_workers=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_trainer(data=loader)
    with pytest.warns(UserWarning, match="persistent_workers=True: where a run is interrupted"):
        small_trainer(data=loader, checkpoints=tmp_path)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_callback_puts_into_evaluation_mode_stays_in_it(compiled: bool) -> None:
    class KeepsStatistics(Callback):
        def on_train_begin(self, trainer: Trainer) -> None:
            trainer.model[:2].eval()

    def statistics(**given: Any) -> Tensor:
        model = small_model()
        model[:2].requires_grad_(False)
        precision = "fp32" if compiled else "auto"
        small_trainer(
            model, validation_data=small_data(9), compile=compiled, precision=precision, **given
        ).train()
        assert model[1].training
        return model[1].running_mean

    assert statistics().any()
    assert not statistics(callbacks=[KeepsStatistics()]).any()
