"""What :func:`optcpu.optimize` is given, looked at before anything changes."""

from __future__ import annotations

import numbers

import torch
from torch import nn


def check_model(model: object) -> None:
    """Refuse what cannot be trained on a CPU from FP32 parameters.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a parameter is not on the CPU, not FP32, or not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            continue
        if parameter.device.type != "cpu":
            raise ValueError(
                f"parameter {name!r} is on {parameter.device}; optcpu trains on the CPU: "
                "call model.cpu() first"
            )
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}; optcpu keeps FP32 master weights and makes "
                "lower precisions itself: call model.float() first"
            )
        if not torch.isfinite(parameter.detach()).all():
            raise ValueError(
                f"parameter {name!r} holds NaN or infinity; such a model cannot be trained: "
                "initialise it again or load an earlier checkpoint"
            )


def check_flag(name: str, given: object, *, or_none: bool = False) -> None:
    """Refuse what is no flag: a word such as ``"no"`` would count as True.

    Raises:
        TypeError: ``given`` is not True or False (or None, where that is a choice).
    """
    if not (isinstance(given, bool) or (or_none and given is None)):
        choices = "True, False or None" if or_none else "True or False"
        raise TypeError(f"{name} must be {choices}, not {given!r}")


def checked_share(name: str, given: object) -> float:
    """``given`` as a share of a whole.

    Raises:
        TypeError: it is no number.
        ValueError: it does not lie between 0 and 1.
    """
    if not isinstance(given, numbers.Real) or isinstance(given, bool):
        raise TypeError(f"{name} must be a number between 0 and 1, not {given!r}")
    share = float(given)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, not {given!r}")
    return share
