"""Settings of PyTorch's compiler for the time of a call, in which it may compile."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch._dynamo import config as dynamo_config
from torch.fx.experimental import _config as shape_config


def with_hooks_guarded(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, in which Dynamo compiles anew what it has compiled when a module gets or loses a hook.

    By default it leaves that out, to save the time of looking.
    """
    return _with(dynamo_config, "skip_nnmodule_hook_guards", False, call)


def with_sizes_apart(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, in which Dynamo takes two sizes that happen to be equal for two.

    By default it takes them for one, such as that of a batch for the number of features that is fixed. The
    code then is for this size alone, other code is made when the batch has another, and used for both from
    then on: what a step computes, to the bit, would depend on the batches that a process has seen.
    """
    return _with(shape_config, "use_duck_shape", False, call)


class _FailuresOfFakeTensors(logging.Filter):
    """Leaves out what PyTorch logs of an operator that fails while a graph is captured.

    Attributes:
        hidden: whether it does.
    """

    hidden = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is kept."""
        return not (
            self.hidden and str(record.msg).startswith("failed while attempting to run meta")
        )


_failures = _FailuresOfFakeTensors()
logging.getLogger("torch._subclasses.fake_tensor").addFilter(_failures)


def with_errors_told_once(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, in which an operator that cannot be done raises its error, and logs no traceback before.

    An input of the wrong shape would be told of in twenty lines of PyTorch's own code.
    """
    return _with(_failures, "hidden", True, call)


def _with(config: Any, name: str, value: object, call: Callable[..., Any]) -> Callable[..., Any]:
    def call_with_setting(*args: Any, **kwargs: Any) -> Any:
        before = getattr(config, name)
        setattr(config, name, value)  # config.patch takes ten times as long
        try:
            return call(*args, **kwargs)
        finally:
            setattr(config, name, before)

    return call_with_setting
