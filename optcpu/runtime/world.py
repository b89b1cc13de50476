"""The processes that train one model together: one alone, or those that torchrun started."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optcpu.errors import OptcpuError

_BUCKET_BYTES = 25 * 2**20  # as in PyTorch's DistributedDataParallel
_TIMEOUT = timedelta(minutes=30)


class World:
    """This process among those that train together.

    Gradients are summed by this class and not by PyTorch's DistributedDataParallel: a model that is
    compiled as one graph gives all gradients at once, so that nothing is gained by watching them one by
    one; and that class takes neither BF16 gradients of FP32 weights nor parameters that freeze.

    Args:
        rank: the number of this process.
        size: how many there are.
        local_rank: the number of this process among those on this machine.
        local_size: how many these are.
        compress: send gradients as BF16, half the bytes.

    Attributes:
        bytes_sent: of gradients and weights that this process has given to others so far.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        *,
        compress: bool = False,
    ) -> None:
        self.rank, self.size, self.compress = rank, size, compress
        self.local_rank, self.local_size = local_rank, local_size
        self.bytes_sent = 0

    @classmethod
    def join(cls, *, compress: bool = False) -> World:
        """The world that torchrun has made, or this process alone.

        Raises:
            OptcpuError: the other processes cannot be reached.
        """
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
                return cls()
            try:
                dist.init_process_group("gloo", timeout=_TIMEOUT)
            except (RuntimeError, ValueError, dist.DistError) as error:
                raise OptcpuError(
                    f"cannot join the other processes ({error}); start all of them with torchrun, and "
                    "see that MASTER_ADDR and MASTER_PORT can be reached"
                ) from error
            atexit.register(_leave)
        local_rank, local_size = (
            int(os.environ.get(name, default))
            for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
        )
        return cls(
            dist.get_rank(), dist.get_world_size(), local_rank, local_size, compress=compress
        )

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def sum_numbers(self, *numbers: float) -> tuple[float, ...]:
        """The sum of each number over all processes."""
        if self.size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64)
        self._all_reduce([tensor])
        return tuple(tensor.tolist())

    def sum_gradients(self, trained: Iterable[nn.Parameter]) -> None:
        """Make the gradient of each parameter its sum over all processes.

        A parameter that has a gradient in some processes counts as having a zero one in the others.
        """
        if self.size == 1:
            return
        parameters = [p for p in trained if p.requires_grad]
        found = torch.tensor([_has_gradient(p) for p in parameters], dtype=torch.float32)
        self._all_reduce([found])
        gradients = []
        for parameter, (used, wide) in zip(parameters, found.tolist(), strict=True):
            if not used:
                continue
            # The same in all processes, which would differ by rounding, and in what they send at a time.
            dtype = parameter.dtype if wide else torch.bfloat16
            if parameter.grad is None:
                parameter.grad = torch.zeros(parameter.shape, dtype=dtype)
            elif parameter.grad.is_sparse:
                raise OptcpuError(
                    "sparse gradients cannot be added up over several processes: make the embedding "
                    "with sparse=False"
                )
            elif parameter.grad.dtype != dtype:
                parameter.grad = parameter.grad.to(dtype)
            gradients.append(parameter.grad)
        self.sum_tensors(gradients)

    @torch.no_grad()
    def sum_tensors(self, tensors: list[Tensor]) -> None:
        """Make each tensor its sum over all processes, in FP32 or FP64, or in BF16 to save bytes."""
        self._reduce(tensors, torch.bfloat16 if self.compress else torch.float32, 1)

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Make each tensor its mean over all processes, in FP32 or FP64 whatever ``compress`` says.

        Integers, which are not trained, are left as they are.
        """
        if self.size > 1:
            trained = [t.detach() for t in tensors if t.is_floating_point() or t.is_complex()]
            self._reduce(trained, torch.float32, self.size)

    def _reduce(self, tensors: list[Tensor], sent_as: torch.dtype, divisor: int) -> None:
        real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        double = [t for t in real if t.dtype == torch.float64]
        self._reduce_as(torch.float64, double, divisor)
        self._reduce_as(sent_as, [t for t in real if t.dtype != torch.float64], divisor)

    def _reduce_as(self, sent_as: torch.dtype, tensors: list[Tensor], divisor: int) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1).to(sent_as) for tensor in bucket])
            self._all_reduce([flat])
            self.bytes_sent += flat.nbytes
            pieces = flat.div_(divisor).split([tensor.numel() for tensor in bucket])
            for tensor, piece in zip(bucket, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))

    def gather(self, mine: Any) -> list[Any]:
        """What each process gives, by rank."""
        if self.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.size
        self._guarded(lambda: dist.all_gather_object(everyone, mine))
        return everyone

    def gather_at_first(self, mine: Any) -> list[Any]:
        """In the first process what each gives, by rank; elsewhere an empty list."""
        if self.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.size if self.first else []
        self._guarded(lambda: dist.gather_object(mine, everyone or None, dst=0))
        return everyone

    def from_first(self, mine: Any) -> Any:
        """What the first process gives."""
        shared = [mine]
        if self.size > 1:
            self._guarded(lambda: dist.broadcast_object_list(shared, src=0))
        return shared[0]

    @torch.no_grad()
    def share_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Make each tensor that of the first process."""
        for tensor in tensors:
            if self.size > 1 and tensor.numel():
                plain = tensor.detach().clone(memory_format=torch.contiguous_format)
                sent = plain.reshape(-1).view(torch.uint8)  # as not every dtype can be sent
                self._guarded(lambda sent=sent: dist.broadcast(sent, src=0))  # type: ignore[misc]
                if not self.first:
                    tensor.copy_(plain)

    def _all_reduce(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self._guarded(lambda tensor=tensor: dist.all_reduce(tensor))  # type: ignore[misc]

    def _guarded(self, call: object) -> None:
        assert callable(call)
        try:
            call()
        except RuntimeError as error:
            raise LostProcess(
                f"process {self.rank} of {self.size} cannot reach the others any more "
                f"({str(error).splitlines()[0]}): one of them has ended. Start the job again: it goes on "
                "from the newest checkpoint"
            ) from error


def _leave() -> None:
    """End the threads that send and receive while Python still runs.

    One that lets a tensor go after that needs Python, and ends the process with SIGABRT.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


class LostProcess(OptcpuError):
    """Another process of a distributed run has ended or cannot be reached."""


def _has_gradient(parameter: nn.Parameter) -> tuple[bool, bool]:
    """Whether it has one, and one of its own dtype, where one of a stored weight may be BF16."""
    gradient = parameter.grad
    return gradient is not None, gradient is not None and gradient.dtype == parameter.dtype


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
