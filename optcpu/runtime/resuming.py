"""Which checkpoint a run goes on from."""

from __future__ import annotations

from optcpu.errors import OptcpuError
from optcpu.runtime.checkpoint.folder import CheckpointFolder
from optcpu.runtime.checkpoint.format import Checkpoint
from optcpu.runtime.world import World


def checkpoint_to_go_on_from(
    folder: CheckpointFolder | None, world: World, resume: str
) -> Checkpoint | None:
    """The newest checkpoint in ``folder``; None to begin anew.

    Args:
        folder: None where no checkpoints are written.
        world: the processes that train together.
        resume: the setting of that name.

    Raises:
        OptcpuError: the processes find others, or ``resume`` forbids or demands one.
    """
    saved = None if folder is None else folder.load()
    steps = world.gather(None if saved is None else saved.step)
    if len(set(steps)) > 1:
        raise OptcpuError(
            f"the processes find other checkpoints (of the steps {steps}, by process): the folder must "
            "be on a disk that all machines share"
        )
    if saved is None and resume == "must":
        where = folder and folder.path
        raise OptcpuError(f"resume is 'must', but {where} holds no checkpoint")
    if saved is not None and resume == "never":
        raise OptcpuError(
            f"resume is 'never', but {saved.path.parent} holds a checkpoint of step {saved.step}: "
            "choose another folder, or remove it"
        )
    return saved
