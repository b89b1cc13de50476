"""``DynamicFreezer``: stop training the first layers of a model once they have converged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from optcpu.runtime.freezing import effects
from optcpu.runtime.freezing import rule as rules
from optcpu.runtime.freezing.blocks import Block, find_blocks
from optcpu.runtime.freezing.cache import split
from optcpu.runtime.freezing.gradients import GradientObserver
from optcpu.runtime.freezing.payback import Costs, Payback, share_saved

logger = logging.getLogger("optcpu.freezer")


@dataclass(frozen=True)
class FreezeEvent:
    """Something that the freezer did, or decided not to do.

    Attributes:
        step: optimizer steps that had been made.
        kind: ``"freeze"``, ``"unfreeze"``, or ``"decline"`` for a freeze that would not have paid.
        blocks: names of the blocks concerned.
        fraction: of the parameters that are frozen from then on, 0 to 1.
        reason: in words, with the figures that decided.
    """

    step: int
    kind: Literal["freeze", "unfreeze", "decline"]
    blocks: tuple[str, ...]
    fraction: float
    reason: str

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.kind} {', '.join(self.blocks)}; "
            f"{100 * self.fraction:.1f} % of the parameters are frozen: {self.reason}"
        )


class DynamicFreezer:
    """Freezes a growing prefix of a model's blocks by AutoFreeze's rule (arXiv 2102.01386).

    Call :meth:`step` behind each ``optimizer.step()``; the rest of the loop stays as it is. The norm of
    each block's gradients is added up over a window of optimizer steps. Blocks in which it changed less,
    relative to the window before, than a percentile of all active blocks' changes qualify; those in
    front of the first that does not are frozen. They leave the backward pass, the update and the
    optimizer's memory, and the model compiles anew with its next call.

    Frozen blocks stay in the forward pass as they are: dropout goes on, and so do the running statistics
    of batch norms (``eval_frozen=True`` stops both). A weight that a later block uses as well (GPT-2's
    embedding is its head) belongs to that block and stays trained; then the backward pass goes on
    through the frozen blocks and a freeze saves a third of their work, not two. Parameters that did not
    require gradients from the start are never touched. Gradients are seen as ``optimizer.step()`` sees
    them, clipped ones clipped.

    In a distributed run each process has a freezer and the first one's figures decide for all.
    ``DistributedDataParallel`` must be made anew whenever :meth:`step` returns an event that is no
    ``"decline"``, since it waits for the gradients of the parameters that it began with.

    Args:
        model: in training, optimized by :func:`optcpu.optimize`, compiled by ``torch.compile`` or plain.
        optimizer: of its parameters; the outermost, if one wraps another.
        window: optimizer steps from one decision to the next.
        percentile: above 0, at most 100; a higher one freezes faster.
        patience: how many windows in a row a block has to qualify in.
        max_freezes: how often blocks may be frozen, since each time compiles; None for any number.
        total_steps: optimizer steps of the whole run. If given, a freeze that would not save the time of
            its compilation in the steps that remain is not made. That decision depends on measured times,
            and so may differ between two runs, unless both of the next two are given.
        step_seconds: of a step without anything frozen; by default the median of the recent steps.
        compile_seconds: what a freeze costs; by default what compiling took so far, once.
        unfreeze_after: windows after the last freeze after which all blocks are trained again, with new
            optimizer state; None never does that. :meth:`unfreeze` does it at any time.
        blocks: modules or their names in the order of the forward pass, in place of those found by
            :func:`optcpu.runtime.freezing.blocks.declared`. What is in none of them, and the last one,
            is never frozen.
        eval_frozen: put frozen blocks into evaluation mode. After ``model.train()`` call
            :meth:`keep_modes`; :meth:`step` does so, too.
        observe_every: look at the gradients in the first of so many steps; looking reads them once,
            1 to 5 % of the step of an MLP.

    Attributes:
        events: all :class:`FreezeEvent` so far; they are logged to ``"optcpu.freezer"`` as well.
        blocks: what may be frozen, in the order of the forward pass.

    Raises:
        TypeError: ``model`` is no module, or ``optimizer`` no optimizer.
        ValueError: an argument is out of its range, there is no such block, fewer than two blocks can be
            frozen, or the optimizer holds no parameter of the model.
        OptcpuError: the optimizer updates during the backward pass, where no gradient is left to see.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        window: int = 50,
        percentile: float = 50.0,
        patience: int = 2,
        max_freezes: int | None = 3,
        total_steps: int | None = None,
        step_seconds: float | None = None,
        compile_seconds: float | None = None,
        unfreeze_after: int | None = None,
        blocks: Sequence[str | nn.Module] | None = None,
        eval_frozen: bool = False,
        observe_every: int = 5,
    ) -> None:
        _check_kinds(model, optimizer)
        self.rule = rules.Rule(window, percentile, patience, max_freezes, unfreeze_after)
        rules.check_integer("observe_every", observe_every, 1)
        if total_steps is not None:
            rules.check_integer("total_steps", total_steps, 1)
        rules.check_seconds("step_seconds", step_seconds)
        rules.check_seconds("compile_seconds", compile_seconds)
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.optimizer = optimizer
        self.blocks = find_blocks(self.model, _updated(self.model, optimizer), blocks)
        self.total_steps = total_steps
        self.eval_frozen = eval_frozen
        self.events: list[FreezeEvent] = []
        self._called = model
        self._parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self._progress = rules.Progress.start(len(self.blocks.blocks))
        self._observer = GradientObserver(optimizer, self.blocks.blocks, observe_every)
        self._costs = Costs(model, self.blocks, step_seconds, compile_seconds)
        self._ticked = 0
        self._declined: set[int] = set()
        self._put_to_eval: list[nn.Module] = []
        self._tell_what_stays_trained()

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._observer.steps

    @property
    def frozen_blocks(self) -> tuple[Block, ...]:
        """The blocks that are frozen now, in the order of the forward pass."""
        return self.blocks.blocks[: self._progress.frozen]

    @property
    def frozen_fraction(self) -> float:
        """How much of the parameters that were trained at first is frozen now, 0 to 1."""
        return sum(p.numel() for p in _parameters(self.frozen_blocks)) / self._parameters

    @property
    def decides(self) -> bool:
        """Whether a window is complete, so that the next :meth:`step` may change what is trained."""
        return self.steps != self._ticked and self._observer.position >= self.rule.window

    def step(self) -> FreezeEvent | None:
        """Decide, if a window is complete; to be called behind ``optimizer.step()``.

        Where no optimizer step was made since the last call (between micro-batches, or because the step
        was skipped) nothing happens.

        Returns:
            What was done or declined, None in nearly all steps.
        """
        if self.steps == self._ticked:
            return None
        decides = self.decides
        self._costs.tick(self.steps - self._ticked)
        self._ticked = self.steps
        self.keep_modes()
        return self._decide() if decides else None

    def freeze(self, count: int, reason: str = "asked for") -> FreezeEvent:
        """Freeze the first ``count`` blocks now, whatever the rule says.

        Raises:
            ValueError: that many are frozen already, or none would be left.
        """
        frozen, most = self._progress.frozen, len(self.blocks.blocks) - 1
        if not isinstance(count, int) or not frozen < count <= most:
            raise ValueError(
                f"count must be an integer above {frozen} (frozen already) and at most {most} (the last "
                f"block is never frozen), not {count!r}"
            )
        new = self.blocks.blocks[frozen:count]
        effects.synchronise(_parameters(new), self.optimizer)
        self._set_frozen(count)
        self._progress = rules.after_freeze(self._progress, count)
        return self._enter("freeze", new, reason)

    def unfreeze(self, reason: str = "asked for") -> FreezeEvent | None:
        """Train all blocks again, with new optimizer state, and watch them from the beginning.

        How many freezes are left stays as it is.

        Returns:
            What was done; None if nothing was frozen.
        """
        frozen = self.frozen_blocks
        if not frozen:
            return None
        self._set_frozen(0)
        self._progress = rules.after_unfreeze(self._progress)
        self._observer.begin_window()
        return self._enter("unfreeze", frozen, reason)

    def split(self) -> tuple[nn.Sequential, nn.Sequential]:
        """The frozen prefix and the rest of a ``Sequential`` model, which share its modules.

        For :class:`optcpu.runtime.freezing.cache.PrefixCache`, where the same samples come again
        unchanged.

        Raises:
            ValueError: the model is no ``Sequential``, or no whole module at its front is frozen.
        """
        return split(self.model)

    def keep_modes(self) -> None:
        """With ``eval_frozen=True``, put frozen blocks into evaluation mode; ``model.train()`` ends it."""
        if not self.eval_frozen:
            return
        for module in effects.modules_in_training(self.frozen_blocks):
            module.training = False
            self._put_to_eval.append(module)

    def close(self) -> None:
        """Look at the optimizer no more; what is frozen stays so."""
        self._observer.close()

    def state_dict(self) -> dict[str, Any]:
        """All that decisions depend on but times, as numbers, strings, lists and dicts, fit for JSON."""
        return {
            "blocks": [block.name for block in self.blocks.blocks],
            "progress": _listed(self._progress),
            "observer": self._observer.state_dict(),
            "ticked": self._ticked,
            "declined": sorted(self._declined),
            "events": [_listed(event) for event in self.events],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave: freeze what was frozen, and compile anew.

        Load model and optimizer as well, in any order. Decisions are those of a run that was not
        interrupted, but for the times that ``total_steps`` weighs, which are measured anew unless given.

        Raises:
            ValueError: the state is of other blocks than this model's.
        """
        names = [block.name for block in self.blocks.blocks]
        if list(state["blocks"]) != names:
            raise ValueError(
                f"the state is of a freezer with blocks {list(state['blocks'])}, but this one has {names}: "
                "load it into the model it was made for, with the same blocks=[...]"
            )
        progress = rules.Progress(**_tupled(state["progress"]))
        self._set_frozen(progress.frozen)
        self._progress = progress
        self._observer.load_state_dict(state["observer"])
        self._ticked = state.get("ticked", self.steps)  # checkpoints once were without
        declined = state["declined"]
        self._declined = {declined} if isinstance(declined, int) else set(declined)  # one, once
        self.events = [FreezeEvent(**_tupled(event)) for event in state["events"]]
        self.keep_modes()

    def _decide(self) -> FreezeEvent | None:
        before = self._progress
        seconds = [self._costs.step_seconds(before.frozen), self._costs.compile_seconds()]
        *norms, step_seconds, compile_seconds = _decided_by_the_first_process(
            [*self._observer.mean_norms(), *seconds]
        )
        self._progress = rules.after_window(before, norms, self.rule)
        self._observer.begin_window()
        if rules.is_time_to_unfreeze(self._progress, self.rule):
            return self.unfreeze(
                f"{self.rule.unfreeze_after} windows have gone by since the last freeze"
            )
        count = rules.proposed(self._progress, self.rule)
        if count == before.frozen:
            return None
        reason = rules.reason(before, norms, count, self.rule)
        if self.total_steps is None:
            return self.freeze(count, reason)
        payback = Payback(
            compile_seconds,
            step_seconds,
            share_saved(self.blocks, before.frozen, count),
            max(self.total_steps - self.steps, 0),
        )
        if payback.seconds > 0:
            return self.freeze(count, f"{reason}; {payback}")
        if count in self._declined:
            return None  # told already; what remains has become less
        self._declined.add(count)
        return self._enter("decline", self.blocks.blocks[before.frozen : count], f"{payback}")

    def _set_frozen(self, count: int) -> None:
        """Freeze or unfreeze, so that the first ``count`` blocks are frozen."""
        frozen = self._progress.frozen
        effects.unfreeze(_parameters(self.blocks.blocks[count:frozen]), self.optimizer)
        effects.freeze(_parameters(self.blocks.blocks[:count]), self.optimizer)
        self._observer.frozen = count
        if count < frozen and self.model.training:
            for module in self._put_to_eval:
                module.training = True
            self._put_to_eval = []
        if count != frozen:
            effects.compile_anew(self._called)
        self._costs.restart()

    def _enter(
        self, kind: Literal["freeze", "unfreeze", "decline"], blocks: Sequence[Block], reason: str
    ) -> FreezeEvent:
        names = tuple(block.name for block in blocks)
        event = FreezeEvent(self.steps, kind, names, self.frozen_fraction, reason)
        self.events.append(event)
        self.keep_modes()
        logger.info("%s", event)
        return event

    def _tell_what_stays_trained(self) -> None:
        tied = [block.name for block in self.blocks.blocks if block.tied]
        if tied:
            logger.info(
                "weights used in or in front of %s belong to a later block as well and stay trained, so "
                "that the backward pass goes on through frozen blocks: a freeze saves a third of their "
                "work, where untied weights would save two",
                ", ".join(tied),
            )
        if self.blocks.outside:
            logger.info(
                "%d parameters are trained but in no block of this optimizer's: they are never frozen",
                sum(p.numel() for p in self.blocks.outside),
            )


def _parameters(blocks: Sequence[Block]) -> list[nn.Parameter]:
    return [parameter for block in blocks for parameter in block.parameters]


def _check_kinds(model: object, optimizer: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}"
        )
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model is wrapped in DistributedDataParallel, which waits for the gradients of all "
            "parameters that it began with: give model.module, and wrap it anew after each freeze"
        )


def _updated(model: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of ``model`` that ``optimizer`` updates."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    updated = [p for p in model.parameters() if id(p) in held]
    if not updated:
        raise ValueError(
            f"the optimizer holds no parameter of this {type(model).__name__}: make it from "
            "model.parameters() of the same model"
        )
    return updated


def _listed(record: rules.Progress | FreezeEvent) -> dict[str, Any]:
    """A record with lists for its tuples, as JSON has them."""
    entries = asdict(record).items()
    return {name: list(entry) if isinstance(entry, tuple) else entry for name, entry in entries}


def _tupled(entries: dict[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`_listed`."""
    return {
        name: tuple(entry) if isinstance(entry, list) else entry for name, entry in entries.items()
    }


def _decided_by_the_first_process(figures: list[float]) -> list[float]:
    """``figures`` of process 0 of a distributed run; otherwise as they are."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return figures
    shared = torch.tensor(figures, dtype=torch.float64)
    torch.distributed.broadcast(shared, src=0)
    agreed: list[float] = shared.tolist()
    return agreed
