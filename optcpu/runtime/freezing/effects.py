"""What freezing does to parameters, optimizer, modes and compiled code, and how it is undone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from optcpu.compiled_call import compiled_call
from optcpu.optim.lookahead import Lookahead
from optcpu.runtime.freezing.blocks import Block


def freeze(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> None:
    """Take ``parameters`` out of training; their values stay, bit for bit, whatever the optimizer does.

    They have no gradient and no optimizer state any more. Lookahead's slow weights become what the
    weights are, so that it does not move them either.
    """
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
        optimizer.state.pop(parameter, None)
        if isinstance(optimizer, Lookahead):
            optimizer.restart([parameter])


def unfreeze(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> None:
    """Let ``parameters`` be trained again; their optimizer state begins anew."""
    for parameter in parameters:
        parameter.requires_grad_(True)
        if isinstance(optimizer, Lookahead):
            optimizer.restart([parameter])


def synchronise(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> None:
    """Let Lookahead's slow weights catch up, as at the end of its k steps: nothing learnt is lost."""
    if isinstance(optimizer, Lookahead):
        optimizer.synchronise(parameters)


def modules_in_training(blocks: Iterable[Block]) -> list[nn.Module]:
    """All modules of ``blocks`` that are in training mode."""
    modules = (inner for block in blocks for outer in block.modules for inner in outer.modules())
    return [module for module in modules if module.training]


def compile_anew(model: nn.Module) -> None:
    """Forget what was compiled of ``model`` and the modules in it.

    PyTorch's guards may overlook that ``requires_grad`` has changed (pytorch#139476), and go on with
    code for other gradients. What :func:`optcpu.optimize` compiled is forgotten alone; where
    ``torch.compile`` was used, all that this process has compiled, since PyTorch has nothing finer that
    reaches the parts between graph breaks.
    """
    plain = False
    for module in model.modules():
        call = compiled_call(module)
        if call is not None:
            call.compile_anew()
        plain = plain or is_plainly_compiled(module)
    if plain:
        torch._dynamo.reset()


def is_compiled(model: nn.Module) -> bool:
    """Whether ``model`` or a module in it is compiled."""
    return any(compiled_call(m) is not None or is_plainly_compiled(m) for m in model.modules())


def is_plainly_compiled(module: nn.Module) -> bool:
    """Whether ``module`` was compiled by ``torch.compile`` or its own method ``compile()``."""
    if isinstance(module, torch._dynamo.OptimizedModule):
        return True
    return module._compiled_call_impl is not None and compiled_call(module) is None


def compile_seconds_so_far() -> float:
    """How long this process has spent compiling; 0 where PyTorch does not tell."""
    times: dict[str, float] = getattr(torch._dynamo.utils, "calculate_time_spent", dict)()
    return float(times.get("total_wall_time", 0.0))
