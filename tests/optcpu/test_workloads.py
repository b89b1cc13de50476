from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from optcpu import data, workloads
from optcpu.workloads import BUILT_IN, Workload, workload

Write = Callable[[str], str]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module of the user's and give its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> str:
        header = "import torch\nfrom torch import nn\n"
        (tmp_path / "jobs_of_mine.py").write_text(header + textwrap.dedent(source))
        sys.modules.pop("jobs_of_mine", None)
        return "jobs_of_mine"

    yield write
    sys.modules.pop("jobs_of_mine", None)


def _one_step(job: Workload) -> float:
    batch = job.batches[0]
    assert job.loss is not None
    loss = job.loss(job.model(*batch[:-1]), batch)
    loss.backward()
    for name, parameter in job.model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    return loss.item()


class TestBuiltIn:
    def test_mlp(self) -> None:
        job = workload("mlp")
        pixels, labels = job.batches[0]
        assert pixels.shape == (128, 784)
        assert pixels.min() >= 0
        assert 0.2 < pixels.max() <= 1
        assert labels.max() < 1000
        assert (job.unit, job.units_per_batch) == ("samples", 128)
        # ln 1000 = 6.9 is the loss of a guess.
        assert _one_step(job) == pytest.approx(6.9, abs=0.1)

    @pytest.mark.slow
    def test_gpt2_small(self) -> None:
        job = workload("gpt2-small", batch_size=1)
        inputs, targets = job.batches[0]
        assert inputs.shape == targets.shape == (1, 64)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert job.model(inputs).shape == (1, 64, 50257)
        assert (job.unit, job.units_per_batch) == ("tokens", 64)
        # ln 50257 = 10.8 is the loss of a guess.
        assert _one_step(job) == pytest.approx(10.8, abs=0.4)

    def test_gpt2_small_keeps_its_width_with_byte_tokens(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        corpus = data.Corpus(torch.arange(1000, dtype=torch.int32) % 256, 256, "bytes")
        monkeypatch.setattr(workloads.data, "code_corpus", lambda: corpus)
        with torch.device("meta"):
            monkeypatch.setattr(workloads.data, "token_batches", lambda *a, **k: [])
            job = workload("gpt2-small")
        assert job.model.lm_head.weight.shape == (50257, 768)
        assert "byte tokens" in job.description

    def test_digits_cnn_learns(self) -> None:
        job = workload("digits-cnn", batch_size=64)
        assert job.units_per_batch == 64
        assert job.loss is not None
        optimizer = torch.optim.AdamW(job.model.parameters(), lr=1e-2)
        losses = []
        for batch in job.batches:
            loss = job.loss(job.model(batch[0]), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2

    @pytest.mark.parametrize(
        ("name", "input_shape", "classes", "units"),
        [
            ("encoder", (1, 512), 1000, ("tokens", 512)),
            ("small-cnn", (256, 1, 28, 28), 10, ("samples", 256)),
            ("resnet18", (32, 3, 64, 64), 10, ("samples", 32)),
            ("vit-tiny", (8, 3, 224, 224), 10, ("samples", 8)),
            ("lstm", (32, 64), 256, ("tokens", 32 * 64)),
        ],
    )
    def test_the_others_of_the_suite(
        self, name: str, input_shape: tuple[int, ...], classes: int, units: tuple[str, int]
    ) -> None:
        job = workload(name)
        assert job.name == name
        assert job.batches[0][0].shape == input_shape
        assert (job.unit, job.units_per_batch) == units
        assert _one_step(job) == pytest.approx(math.log(classes), abs=0.5), "that of a guess"

    def test_seed_decides_weights_and_data(self) -> None:
        one, same, other = (workload("digits-cnn", batch_size=8, seed=s) for s in (1, 1, 2))
        assert torch.equal(one.model[0].weight, same.model[0].weight)
        assert torch.equal(one.batches[0][0], same.batches[0][0])
        assert not torch.equal(one.model[0].weight, other.model[0].weight)
        assert not torch.equal(one.batches[0][0], other.batches[0][0])

    def test_global_generator_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        workload("digits-cnn", batch_size=8)
        assert torch.equal(torch.get_rng_state(), before)

    def test_all_are_named_in_the_error(self) -> None:
        with pytest.raises(ValueError, match=r"'gpt2-smal'; did you mean 'gpt2-small'\?") as caught:
            workload("gpt2-smal")
        assert all(name in str(caught.value) for name in BUILT_IN)

    def test_batch_size_must_be_positive(self) -> None:
        with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
            workload("digits-cnn", batch_size=0)

    def test_batch_larger_than_the_data(self) -> None:
        with pytest.raises(ValueError, match="larger than the data set of 1438 samples"):
            workload("digits-cnn", batch_size=5000)


class TestOwn:
    def test_workload(self, own: Write) -> None:
        module = own(
            """
            from optcpu.workloads import Workload
            def job():
                return Workload("mine", nn.Linear(2, 1), [torch.ones(3, 2)], None, "rows", 3, "x")
            """
        )
        assert workload(f"{module}:job").unit == "rows"

    def test_model_and_batch(self, own: Write) -> None:
        module = own("def job(): return nn.Linear(2, 1), (torch.ones(3, 2), torch.zeros(3, 1))")
        job = workload(f"{module}:job")
        assert job.loss is None
        assert len(job.batches) == 1
        assert (job.unit, job.units_per_batch) == ("samples", 3)
        assert job.name == "jobs_of_mine:job"

    def test_model_batches_and_loss(self, own: Write) -> None:
        module = own(
            """
            def loss(output, batch): return output.sum()
            def job(): return nn.Linear(2, 1), [{"input": torch.ones(n, 2)} for n in (4, 5)], loss
            """
        )
        job = workload(f"{module}:job")
        assert len(job.batches) == 2
        assert job.units_per_batch == 4
        assert job.loss is not None

    def test_bare_model_with_a_batch_function(self, own: Write) -> None:
        module = own(
            """
            def job(): return nn.Linear(2, 1)
            def batch(batch_size=7): return torch.ones(batch_size, 2)
            """
        )
        assert workload(f"{module}:job").units_per_batch == 7
        assert workload(f"{module}:job", batch_size=9).units_per_batch == 9

    def test_batch_size_and_seed_are_given_to_parameters_of_that_name(self, own: Write) -> None:
        module = own(
            "def job(batch_size=2, *, seed): return nn.Linear(2, 1), torch.ones(batch_size, seed)"
        )
        assert workload(f"{module}:job", batch_size=5, seed=3).batches[0].shape == (5, 3)

    def test_weights_depend_on_the_seed(self, own: Write) -> None:
        module = own("def job(): return nn.Linear(2, 1), torch.ones(1, 2)")
        one, same, other = (workload(f"{module}:job", seed=s).model.weight for s in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_class_is_a_factory_too(self, own: Write) -> None:
        module = own(
            """
            class Net(nn.Linear):
                def __init__(self): super().__init__(2, 1)
            def batch(): return torch.ones(6, 2)
            """
        )
        assert isinstance(workload(f"{module}:Net").model, nn.Module)

    def test_missing_module(self) -> None:
        with pytest.raises(ValueError, match="no module 'not_there' for 'not_there:job'"):
            workload("not_there:job")
        with pytest.raises(ValueError, match=r"no module 'json\.missing'"):
            workload("json.missing:job")

    def test_file_instead_of_a_module(self) -> None:
        with pytest.raises(ValueError, match=r"is a file, not a module; write train\.net:factory"):
            workload("./train/net.py:factory")

    @pytest.mark.parametrize("name", [":job", "module:", "a..b:job"])
    def test_incomplete_name(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"package\.module:factory"):
            workload(name)

    def test_module_that_lacks_an_import(self, own: Write) -> None:
        module = own("import not_installed_here")
        with pytest.raises(ValueError, match=r"cannot be imported: .*not_installed_here"):
            workload(f"{module}:job")

    def test_module_with_an_error(self, own: Write) -> None:
        module = own("1 / 0")
        with pytest.raises(ValueError, match="cannot be imported: ZeroDivisionError"):
            workload(f"{module}:job")
        module = own("def job(:")
        with pytest.raises(ValueError, match="cannot be imported: SyntaxError"):
            workload(f"{module}:job")

    def test_missing_attribute(self, own: Write) -> None:
        module = own("def job(): ...")
        with pytest.raises(ValueError, match=r"no attribute 'jbo'; did you mean 'job'\?"):
            workload(f"{module}:jbo")

    def test_no_function(self, own: Write) -> None:
        module = own("job = nn.Linear(2, 1)\nnumber = 3")
        with pytest.raises(TypeError, match="must be a function, got a Linear"):
            workload(f"{module}:job")
        with pytest.raises(TypeError, match="must be a function, got a int"):
            workload(f"{module}:number")

    @pytest.mark.parametrize(
        ("returned", "described"),
        [
            ("None", "returned a NoneType"),
            ("(nn.Linear(2, 1),)", r"a tuple of \(Linear\)"),
            ("(torch.ones(1), nn.Linear(2, 1))", r"a tuple of \(Tensor, Linear\)"),
            ("(nn.Linear(2, 1), torch.ones(1), 3, 4)", "a tuple of"),
        ],
    )
    def test_wrong_return(self, own: Write, returned: str, described: str) -> None:
        module = own(f"def job(): return {returned}")
        with pytest.raises(TypeError, match=f"must return a Workload.*{described}"):
            workload(f"{module}:job")

    def test_loss_that_cannot_be_called(self, own: Write) -> None:
        module = own("def job(): return nn.Linear(2, 1), torch.ones(1, 2), 'mse'")
        with pytest.raises(TypeError, match=r"loss of .* must be callable, got a str"):
            workload(f"{module}:job")

    def test_batch_without_a_tensor(self, own: Write) -> None:
        module = own("def job(): return nn.Linear(2, 1), 'text'")
        with pytest.raises(TypeError, match="batch of type str"):
            workload(f"{module}:job")

    def test_bare_model_without_a_batch(self, own: Write) -> None:
        module = own("def job(): return nn.Linear(2, 1)")
        with pytest.raises(TypeError, match=r"no batch to train it on; .* function batch\(\)"):
            workload(f"{module}:job")

    def test_batch_size_that_nothing_takes(self, own: Write) -> None:
        module = own("def job(): return nn.Linear(2, 1), torch.ones(1, 2)")
        with pytest.raises(ValueError, match="no parameter batch_size"):
            workload(f"{module}:job", batch_size=4)

    def test_parameter_without_a_value(self, own: Write) -> None:
        module = own("def job(path, depth): return nn.Linear(2, 1), torch.ones(1, 2)")
        with pytest.raises(TypeError, match="needs a value for path, depth"):
            workload(f"{module}:job")
