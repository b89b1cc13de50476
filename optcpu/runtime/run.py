"""Everything that belongs to a training run, and its state as a checkpoint holds it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optcpu.errors import OptcpuError, warn
from optcpu.measure.batches import Loss
from optcpu.optim.lookahead import Lookahead
from optcpu.runtime.buffers import BufferKeeper, give_memory_to_expanded
from optcpu.runtime.callbacks import Callback
from optcpu.runtime.checkpoint.rng import rng_state, set_rng_state
from optcpu.runtime.clock import Clock
from optcpu.runtime.data.loading import Feed
from optcpu.runtime.freezing.freezer import DynamicFreezer
from optcpu.runtime.optimizers import load_state
from optcpu.runtime.plan import Plan
from optcpu.runtime.position import Position
from optcpu.runtime.schedule import Schedule, too_short
from optcpu.runtime.settings import Settings
from optcpu.runtime.step import (
    MicroBatches,
    buffers_of,
    gradients_by_name,
    restore_gradients,
    trained_parameters,
)
from optcpu.runtime.stopping import Stopper
from optcpu.runtime.unsaved import Unsaved
from optcpu.runtime.world import World
from passes import gemm


@dataclass
class Run:
    """The parts of a run that have a state.

    Attributes:
        model: as the user gave it, compiled or not.
        loss: of its output; one that is a module is trained, too.
        optimizer: of their parameters.
        scheduler: of the learning rate.
        feed: the training data.
        world: the processes that train together.
        freezer: None without freezing.
        stopper: None without early stopping.
        callbacks: the user's.
        clock: where the time went.
        position: how far the run is.
        plan: how long it is to be.
        own_optimizer_states: whether each process has an optimizer state of its own.
        pending: a step whose micro-batches are used in part.
        unsaved: what model and loss know beyond their ``state_dict()``.
        given: what was set for optimizer and scheduler when the run began.
        buffers: what running statistics were before the step in progress.
    """

    model: nn.Module
    loss: Loss
    optimizer: Optimizer
    scheduler: LRScheduler
    feed: Feed
    world: World
    freezer: DynamicFreezer | None
    stopper: Stopper | None
    callbacks: Sequence[Callback]
    plan: Plan
    unsaved: Unsaved
    given: Settings
    own_optimizer_states: bool = False
    clock: Clock = field(default_factory=Clock)
    position: Position = field(default_factory=Position)
    pending: MicroBatches | None = None
    buffers: BufferKeeper = field(init=False)

    def __post_init__(self) -> None:
        self.buffers = BufferKeeper(self.model, self.loss)

    def data_state(self) -> dict[str, Any]:
        """Where data and random generators of this process stand."""
        return {"feed": self.feed.state_dict(), **self._random_state()}

    def _random_state(self) -> dict[str, Any]:
        return {"rng": rng_state(), "generators": self.unsaved.generators()}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        set_rng_state(state["rng"])
        self.unsaved.set_generators(state.get("generators", {}))

    def state_dict(self, *, alone: bool = False) -> dict[str, Any]:
        """The state of the whole run, in this process; tensors are not copied.

        Args:
            alone: do not ask the other processes for where their data and generators stand.
        """
        pending = self.pending
        if pending is None or pending.done == 0:
            mine = self.data_state() if pending is None else pending.before
            return self._state(mine, alone=alone) | {"pending": None}
        gradients = gradients_by_name(trained_parameters(self.model, self.loss))
        # No file holds sparse gradients.
        is_begun_anew = any(gradient.is_sparse for gradient in gradients.values())
        # Weights and buffers of one moment, to be rolled back to or taken as the best.
        with self.buffers.put_back_meanwhile() as now:
            mine = pending.before if is_begun_anew else self.data_state()
            state = self._state(mine, alone=alone)
            _copy_all_but(self.model.named_parameters(remove_duplicate=False), state["model"])
            if isinstance(self.loss, nn.Module):
                _copy_all_but(self.loss.named_parameters(remove_duplicate=False), state["loss"])
            _copy_all_but([], state["unsaved_buffers"])
        noted = {
            "before": pending.before,
            "sizes": pending.sizes,
            "done": pending.done,
            "loss": pending.loss,
            "gradients": gradients,
            "buffers_so_far": now,
        }
        return state | {"pending": None if is_begun_anew else noted}

    def _state(self, mine: dict[str, Any], *, alone: bool) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict() if isinstance(self.loss, nn.Module) else {},
            "unsaved_buffers": self.unsaved.buffers(),
            "trained": self.unsaved.trained(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_kind": _kind(self.optimizer),
            "optimizer_groups": self._optimizer_groups(),
            "given": asdict(self.given),
            "scheduler": self.scheduler.state_dict(),
            "scheduler_kind": _kind_of_scheduler(self.scheduler),
            "freezer": None if self.freezer is None else self.freezer.state_dict(),
            "stopper": None if self.stopper is None else self.stopper.state_dict(),
            "callbacks": self._callback_states(),
            "clock": self.clock.state_dict(),
            "position": asdict(self.position),
            "plan": self.plan.state_dict(),
            "kernels": gemm.choices(),
            "processes": [mine] if alone else self.world.gather_at_first(mine | self._own_state()),
        }

    def _own_state(self) -> dict[str, Any]:
        """What this process has, and the first one has otherwise."""
        if self.world.first:
            return {}
        state: dict[str, Any] = {"buffers": buffers_of(self.model, self.loss)}
        if self.own_optimizer_states:
            state["optimizer"] = self.optimizer.state_dict()
        return state

    def _callback_states(self) -> list[tuple[str, dict[str, Any]]]:
        """Of those callbacks that have one, empty as it may be, with their kinds."""
        return [
            (type(one).__name__, one.state_dict())
            for one in self.callbacks
            if type(one).state_dict is not Callback.state_dict
        ]

    def load_weights(self, state: dict[str, Any]) -> None:
        """Model, loss, optimizer and freezer as they were.

        Raises:
            OptcpuError: they are of another model or optimizer.
        """
        kind = _kind(self.optimizer)
        if state["optimizer_kind"] != kind:
            raise OptcpuError(
                f"the checkpoint is of a run with {state['optimizer_kind']}, this one has {kind}: give the "
                "trainer that optimizer, or another folder for checkpoints (model.safetensors in the "
                "checkpoint has the weights)"
            )
        if self.freezer is not None and state["freezer"] is not None:
            self.freezer.load_state_dict(state["freezer"])
        give_memory_to_expanded(self.model, self.loss)  # else nothing can be loaded into them
        try:
            self.model.load_state_dict(state["model"])
            if isinstance(self.loss, nn.Module):
                self.loss.load_state_dict(state["loss"])
        except RuntimeError as error:
            raise OptcpuError(
                f"the checkpoint is of another model ({' '.join(str(error).split())}): choose another "
                "folder for checkpoints, or give the trainer that model"
            ) from error
        self.unsaved.set_buffers(state.get("unsaved_buffers", {}))
        if not self.has_groups_of(state):
            groups = self._optimizer_groups()
            raise OptcpuError(
                "the checkpoint is of an optimizer with other groups of parameters "
                f"({_told(state['optimizer_groups'])}; now {_told(groups)}): give the trainer an optimizer "
                "like that one, or another folder for checkpoints"
            )
        processes = state["processes"]
        own = processes[self.world.rank] if len(processes) == self.world.size else {}
        self._set_buffers(own.get("buffers", {}))
        load_state(self.optimizer, own.get("optimizer", state["optimizer"]))
        self.optimizer.zero_grad(set_to_none=True)

    def has_groups_of(self, state: dict[str, Any]) -> bool:
        """Whether the optimizer has the groups of parameters that it had in ``state``."""
        groups: list[list[str]] = state["optimizer_groups"]
        return groups == self._optimizer_groups()

    @torch.no_grad()
    def _set_buffers(self, saved: dict[str, Tensor]) -> None:
        buffers = buffers_of(self.model, self.loss)
        for name in saved.keys() & buffers.keys():
            if saved[name].shape == buffers[name].shape:
                buffers[name].copy_(saved[name])

    def _optimizer_groups(self) -> list[list[str]]:
        """The names of the parameters in each group, by whose places their state is saved."""
        names = {id(p): name for name, p in trained_parameters(self.model, self.loss).items()}
        return [
            [names.get(id(p), "") for p in group["params"]] for group in self.optimizer.param_groups
        ]

    def load_state_dict(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """The whole run as it was.

        Returns:
            What :meth:`state_dict` noted of a step that was begun: its micro-batches have to be drawn
            anew, before :meth:`restore_generators` is called. Else None.

        Raises:
            OptcpuError: the checkpoint is of a run that had other parts.
        """
        if (state["freezer"] is None) != (self.freezer is None):
            there, here = ("without", "has") if self.freezer is not None else ("with", "has no")
            raise OptcpuError(
                f"the checkpoint is of a run {there} freezing, and this run {here} a freezer: give the "
                "trainer the settings of that run, or another folder for checkpoints"
            )
        kind = _kind_of_scheduler(self.scheduler)
        if state.get("scheduler_kind", kind) != kind:  # checkpoints once were without
            raise OptcpuError(
                f"the checkpoint is of a run with {state['scheduler_kind']}, this one has {kind}: give the "
                "trainer that scheduler, or another folder for checkpoints (model.safetensors in the "
                "checkpoint has the weights)"
            )
        gemm.adopt(state["kernels"])
        self.load_weights(state)
        self.scheduler.load_state_dict(state["scheduler"])
        if "trained" in state:  # checkpoints once were without
            self.unsaved.set_trained(state["trained"])
        now = Settings.within(self.optimizer, self.scheduler)
        # Checkpoints once were without those given.
        self.given = self.given.following(Settings(**state["given"]) if "given" in state else now)
        self._load_callbacks(state["callbacks"])
        self.clock.load_state_dict(state["clock"])
        self.position = Position(**state["position"])
        self._load_stopper(state["stopper"])
        pending: dict[str, Any] | None = state["pending"]
        self._load_data(state["processes"] if pending is None else [pending["before"]])
        self._load_plan(state.get("plan"))
        # Several processes begin the step anew: their micro-batches are others than those used.
        return pending if self.world.size == 1 else None

    def _load_callbacks(self, states: list[tuple[str, dict[str, Any]]]) -> None:
        """Each state goes to the next callback of its kind; those added since begin anew."""
        left = list(self.callbacks)
        for kind, state in states:
            callback = next((one for one in left if type(one).__name__ == kind), None)
            if callback is None and not state:
                continue
            if callback is None:
                raise OptcpuError(
                    f"the checkpoint has the state of a callback {kind}, which this run has not: give the "
                    "trainer that callback, or another folder for checkpoints"
                )
            left.remove(callback)
            if state or callback.state_dict():  # else both are empty, and some cannot take that
                callback.load_state_dict(state)

    def _load_stopper(self, state: dict[str, Any] | None) -> None:
        """A run that had stopped early goes on where early stopping is now set otherwise."""
        if self.stopper is not None and state is not None:
            self.stopper.load_state_dict(state)
        settings = None if self.stopper is None else self.stopper.state_dict()["options"]
        if state is None or state["options"] != settings:
            self.position.stop_reason = None

    def _load_plan(self, state: dict[str, Any] | None) -> None:
        """What follows the length of the run follows the one that it has now."""
        feed = self.feed
        left = 0 if feed.length is None else feed.length - feed.batches_done
        freezer, before = self.freezer, self.plan.total
        self.plan = self.plan.after(state, self.position.step, self.position.epoch, left)
        if isinstance(self.scheduler, Schedule):
            self.scheduler.end_at(self.plan.total)
        self._refuse_a_short_scheduler()
        # A user's own freezer may count on another length.
        if freezer is not None and before is not None and freezer.total_steps == before:
            freezer.total_steps = self.plan.total or before

    def _refuse_a_short_scheduler(self) -> None:
        """One of PyTorch goes on as the checkpoint has it, whatever its length is to be now."""
        if self.plan.total is None or self.position.stop_reason is not None:
            return
        told = too_short(self.scheduler, self.plan.total - self.position.step)
        if told is not None:
            raise OptcpuError(
                f"{told}, as the checkpoint's scheduler goes on. Remedy: train no longer than that; or "
                "take another folder for checkpoints, and begin with the weights of the old ones (in "
                "model.safetensors)"
            )

    def resume_step(
        self, pending: dict[str, Any], step: MicroBatches | None, data: dict[str, Any]
    ) -> bool:
        """Go on in the middle of a step whose micro-batches have been drawn anew.

        With other micro-batches, of another ``batch_size`` say, it is made from its beginning.

        Args:
            pending: what was noted of it.
            step: the micro-batches.
            data: what :meth:`data_state` gave then.

        Returns:
            Whether it is gone on with.
        """
        self.pending = step
        if step is None or step.sizes != pending.get("sizes"):
            return False
        step.done, step.loss = pending["done"], pending["loss"]
        restore_gradients(trained_parameters(self.model, self.loss), pending["gradients"])
        self.buffers.write(pending["buffers_so_far"])
        self._set_random_state(data)
        return True

    def _own(self, processes: list[dict[str, Any]]) -> dict[str, Any]:
        if self.world.rank < len(processes):
            return processes[self.world.rank]
        warn(
            f"the checkpoint knows where {len(processes)} of the {self.world.size} processes stood: the "
            "others draw random numbers of their own from here on"
        )
        torch.manual_seed(torch.initial_seed() + self.world.rank + self.position.step)
        return {"feed": processes[0]["feed"], **self._random_state()}

    def _load_data(self, processes: list[dict[str, Any]]) -> None:
        saved = self._own(processes)
        self._set_random_state(saved)
        self.feed.load_state_dict(saved["feed"])
        self._set_random_state(saved)

    def put_back(self, drawn: dict[str, Any]) -> None:
        """Take nothing of what was drawn after :meth:`data_state` gave ``drawn``."""
        self.feed.put_back(drawn["feed"])
        self._set_random_state(drawn)


def _copy_all_but(kept: Iterable[tuple[str, Tensor]], state: dict[str, Any]) -> None:
    """Copy what ``state`` has in place of itself, but for tensors with the names of ``kept``."""
    names = {name for name, _ in kept}
    for name, value in state.items():
        if name not in names:
            state[name] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _told(groups: list[list[str]]) -> str:
    """Groups of names, short enough for a message."""
    shown = [", ".join([*names[:3], "..."] if len(names) > 3 else names) for names in groups[:3]]
    return " | ".join([*shown, "..."] if len(groups) > 3 else shown)


def _kind(optimizer: Optimizer) -> str:
    if isinstance(optimizer, Lookahead):
        return f"Lookahead around {_kind(optimizer.optimizer)}"
    return type(optimizer).__name__


def _kind_of_scheduler(scheduler: LRScheduler) -> str:
    inner = getattr(scheduler, "_schedulers", ())
    parts = f" of {', '.join(map(_kind_of_scheduler, inner))}" if inner else ""
    return f"{type(scheduler).__name__}{parts}"
