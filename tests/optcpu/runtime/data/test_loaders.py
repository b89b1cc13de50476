"""Loaders of training and validation data."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.data import TensorDataset

from optcpu.runtime.data.loaders import evaluation_batches
from tests.optcpu.runtime.data.samples import Augmented


class TestEvaluation:
    def test_it_is_the_same_each_time(self) -> None:
        batches = evaluation_batches(Augmented(), 4)
        first, second = list(batches()), list(batches())
        assert [len(batch) for batch in first] == [4, 4, 4, 4, 4, 3]
        assert torch.cat(first)[:, 0].tolist() == list(range(23))
        assert torch.equal(torch.cat(first), torch.cat(second))

    def test_also_when_the_last_was_left_off(self) -> None:
        batches = evaluation_batches(TensorDataset(torch.arange(9)), 4)
        next(iter(batches()))
        assert len(list(batches())) == 3

    def test_loaders_and_lists_are_taken_as_they_are(self) -> None:
        batches = [torch.ones(1)]
        assert evaluation_batches(batches, 4)() is batches

    def test_what_can_be_gone_through_once_is_refused(self) -> None:
        with pytest.raises(TypeError, match="only"):
            evaluation_batches(iter([1]), 4)


def test_a_signal_to_the_whole_group_does_not_end_a_loading_process_but_a_second_one_does() -> None:
    """In a process of its own: PyTorch raises the news of a dead worker wherever the main thread is."""
    program = """
import os, signal, torch
from torch.utils.data import Dataset
from optcpu.runtime.data.loaders import make_loader

class ItsProcess(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.tensor(os.getpid())

batches = iter(make_loader(ItsProcess(), batch_size=2, workers=1))
worker = int(next(batches)[0])
for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(worker, number)
for _ in range(5):  # more than were fetched ahead
    next(batches)
print("outlived", flush=True)
os.kill(worker, signal.SIGTERM)
list(batches)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["outlived"], done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize("how", ["persistent", "iterable", "trainer"])
def test_a_program_with_workers_ends(how: str) -> None:
    """Python tells them to by SIGTERM, and waits: they must not take that for a signal to the group."""
    program = f"""
import torch, optcpu
from torch.utils.data import IterableDataset, TensorDataset
from optcpu.runtime.data.loaders import make_loader

class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.randn(40, 4))

if __name__ == "__main__":
    samples = TensorDataset(torch.randn(40, 4), torch.randint(2, (40,)))
    if {how!r} == "trainer":
        settings = dict(compile=False, progress=False, batch_size=4, workers=1)
        trainer = optcpu.Trainer(torch.nn.Linear(4, 2), samples, epochs=2, optimizer="sgd", **settings)
        assert trainer.train().steps == 20
        assert torch.multiprocessing.active_children() == []
    loader = make_loader(samples if {how!r} == "persistent" else Stream(), 4, workers=1)
    batches = iter(loader)
    next(batches)
    print("is done", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "is done\n"), done.stderr
