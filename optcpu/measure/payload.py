"""What every worker starts from: the model, its batches, loss and optimizer, written to a file.

cloudpickle carries classes and functions of the caller's script or notebook by value, so a worker
never runs the caller's script.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optcpu.errors import OptcpuError
from optcpu.measure.accuracy import dropout_off
from optcpu.measure.batches import (
    Batch,
    Loss,
    as_batches,
    call_model,
    default_loss,
    describe_call,
    signature,
    to_fp32,
)
from optcpu.measure.variants import OptimizerFactory, default_optimizer
from optcpu.measure.work import Work, flop_counter, state_values
from optcpu.random_state import random_state_kept

PAYLOAD_FILE = "payload.pt"


@dataclass
class Payload:
    """One training job.

    Attributes:
        model: in training mode, FP32, on the CPU.
        batches: at least one.
        loss: ``loss(output, batch)`` gives a scalar.
        optimizer: makes the optimizer for the parameters that it is given.
        script_globals: after loading, what the job uses of the module ``__main__`` that it was
            saved in: a script or a notebook.
    """

    model: nn.Module
    batches: list[Batch]
    loss: Loss
    optimizer: OptimizerFactory
    script_globals: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the job to ``path``.

        Raises:
            OptcpuError: if a part of it cannot be pickled; the message names the part.
        """
        parts = {key: value for key, value in vars(self).items() if key != "script_globals"}
        try:
            torch.save(
                {**parts, "of_script": _function_of_script()}, path, pickle_module=cloudpickle
            )
        except Exception as error:
            culprit = _name_unpicklable(parts)
            if culprit is None:
                raise OptcpuError(
                    f"the job cannot be written to {path.parent}: {type(error).__name__}: {error}. "
                    "Is there room for the model? TMPDIR chooses another folder."
                ) from error
            raise OptcpuError(
                f"{culprit} cannot be sent to a measuring process: "
                f"{type(error).__name__}: {error}. Each variant runs in a process of its own, so "
                "model, batch, loss and optimizer must be picklable: keep open files, locks, "
                "generators and the like out of the model, or drop them in its __getstate__."
            ) from error

    @classmethod
    def load(cls, path: Path) -> Payload:
        """Read back what ``save`` wrote. Runs code from the file: only for files of one's own."""
        parts = torch.load(path, weights_only=False)
        script_globals = parts.pop("of_script").__globals__
        return cls(**parts, script_globals=script_globals)


def _function_of_script() -> FunctionType:
    """A function that shares its globals with everything that the caller's script defines.

    cloudpickle gives functions of one module one dict of globals again, but no name to find it by.
    """
    return FunctionType((lambda: None).__code__, vars(sys.modules["__main__"]))


def _name_unpicklable(parts: dict[str, Any]) -> str | None:
    """The smallest part that cannot be pickled, in words; None if every one can."""
    model = parts["model"]
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_modules", "_parameters", "_buffers") and not _picklable(value):
                path = f"{name}.{key}" if name else key
                return f"the attribute {path!r} of the model ({type(value).__name__})"
    for part, value in parts.items():
        if not _picklable(value):
            names = {"optimizer": "the optimizer factory", "loss": "the loss function"}
            return names.get(part, f"the {part}")
    return None


def _picklable(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:
        return False
    return True


def checked_payload(
    model: nn.Module,
    batch: Any,
    loss: Loss | None,
    optimizer: OptimizerFactory | None,
) -> Payload:
    """The job, with defaults filled in, after every check that needs no training step.

    Raises:
        TypeError: for a model that is not a module, and arguments that cannot be called.
        ValueError: for a model that optcpu cannot train, or without batches.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        hint = f" Make an instance of it: {model.__name__}(...)." if isinstance(model, type) else ""
        raise TypeError(f"model must be a torch.nn.Module, not {what}.{hint}")
    for name, function in (("loss", loss), ("optimizer", optimizer)):
        if function is not None and not callable(function):
            remedy = {
                "loss": "a function loss(output, batch) that returns a scalar tensor",
                "optimizer": "a function that makes the optimizer, as in "
                "lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)",
            }[name]
            raise TypeError(f"{name} must be {remedy}, not {type(function).__name__}.")
    # A model that the caller has compiled is measured as the plain model inside it.
    plain = getattr(model, "_orig_mod", model)
    _check_parameters(plain)
    return Payload(plain, as_batches(batch), loss or default_loss, optimizer or default_optimizer)


def _check_parameters(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, nn.UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} is not initialised yet: call the model on a batch once before."
            )
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{name!r} is on {tensor.device}; optcpu trains on the CPU: "
                "call model.cpu() before."
            )
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float64):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"parameter {name!r} is {dtype}; the variants start from FP32 parameters: call "
                "model.float() before."
            )
        if not torch.isfinite(parameter).all():
            raise ValueError(
                f"parameter {name!r} has values that are NaN or infinite: every figure after it "
                "would be meaningless. Initialise it, or load a sound checkpoint."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of the model requires a gradient: there is nothing to train."
        )


@dataclass(frozen=True)
class Trial:
    """What one eager FP32 step told about a job.

    Attributes:
        random: two passes over the same batch give different outputs.
        random_without_dropout: they do so even with dropout switched off.
        work: of a step on the first batch.
    """

    random: bool
    random_without_dropout: bool
    work: Work


def try_out(payload: Payload, seed: int) -> Trial:
    """Run one eager step of a job that may be thrown away, and the forward pass of every shape.

    Raises:
        ValueError: if the model cannot be trained on its batches; the message says why.
    """
    model = payload.model
    model.train()
    with random_state_kept():
        torch.manual_seed(seed)
        with flop_counter() as counted:
            first_output = _check_step(payload)
        seen = {signature(payload.batches[0])}
        with torch.no_grad():
            for batch in payload.batches:
                if signature(batch) not in seen:
                    seen.add(signature(batch))
                    _check_loss(payload, _forward(payload, batch), batch)
            batch = payload.batches[0]
            torch.manual_seed(seed + 1)
            is_random = not _same(first_output, _forward(payload, batch))
            still_random = False
            if is_random:
                with dropout_off(model):
                    still_random = not _same(_forward(payload, batch), _forward(payload, batch))
        optimizer = _check_optimizer(payload)
    trained = [p for p in payload.model.parameters() if p.requires_grad]
    work = Work(
        counted.get_total_flops(),
        sum(p.numel() for p in trained),
        state_values(optimizer, trained),
        {
            str(op).split(".")[-1]: flops
            for op, flops in counted.get_flop_counts()["Global"].items()
        },
    )
    return Trial(is_random, still_random, work)


def _check_step(payload: Payload) -> Any:
    batch = payload.batches[0]
    output = _forward(payload, batch)
    loss = _check_loss(payload, output, batch)
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on any parameter that requires a gradient, so there is "
            "nothing to train: look for torch.no_grad() or .detach() in the model or the loss."
        )
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss of the first batch is {loss.item()} in eager FP32 already: no variant can "
            "be compared with that. Check the batch for NaN, and the scale of the inputs."
        )
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ValueError(
            f"the backward pass of the model failed in eager FP32: {type(error).__name__}: {error}"
        ) from error
    for name, parameter in payload.model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            raise ValueError(
                f"the gradient of {name!r} is NaN or infinite in eager FP32 already: no variant "
                "can be compared with that."
            )
    return output


def _check_optimizer(payload: Payload) -> Optimizer:
    try:
        optimizer = payload.optimizer(payload.model.parameters())
        optimizer.step()
    except Exception as error:
        raise ValueError(
            f"making the optimizer or its first step failed: {type(error).__name__}: {error}. "
            "optimizer is a function of the parameters, as in "
            "lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)."
        ) from error
    return optimizer


def _forward(payload: Payload, batch: Batch) -> Any:
    try:
        return call_model(payload.model, batch)
    except Exception as error:
        raise ValueError(
            f"{describe_call(batch)} failed in eager FP32: {type(error).__name__}: {error}. "
            "A batch is a tensor, a tuple (*inputs, target), or a dict of keyword arguments."
        ) from error


def _check_loss(payload: Payload, output: Any, batch: Batch) -> Tensor:
    if payload.loss is default_loss:
        loss: Any = default_loss(output, batch)
    else:
        try:
            loss = payload.loss(output, batch)
        except Exception as error:
            raise ValueError(
                f"loss(output, batch) failed: {type(error).__name__}: {error}. It is given the "
                "model's output and the whole batch, the target included."
            ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(
            f"the loss must be a scalar tensor, not {what}: reduce it, with .mean() say."
        )
    return loss


def _same(one: Any, other: Any) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in zip(to_fp32(one), to_fp32(other), strict=True)
    )
