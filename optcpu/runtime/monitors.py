"""The metrics that early stopping and the best checkpoint watch: whether validation gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from optcpu.errors import OptcpuError
from optcpu.runtime.options import TrainerOptions
from optcpu.runtime.validation import AccumulatingMetric, Metric, names_of


def check_monitors(
    options: TrainerOptions, metrics: Mapping[str, Metric], *, validates: bool
) -> None:
    """Refuse to watch what no validation can give.

    Which results an accumulating metric has that gives several is known when it has given them:
    :func:`check_results` looks at that.

    Args:
        options: of the run.
        metrics: of validation.
        validates: whether there are validations.

    Raises:
        ValueError: there is none, or it does not give that.
    """
    known = names_of(metrics)
    groups = tuple(f"{n}." for n, m in metrics.items() if isinstance(m, AccumulatingMetric))
    for name, monitor in _monitors(options).items():
        if not validates:
            raise ValueError(f"{name} = {monitor!r} needs validation_data")
        if monitor not in known and not monitor.startswith(groups):
            raise ValueError(
                f"{name} is {monitor!r}, but validation gives {', '.join(known)}: add it to metrics"
            )


def check_results(options: TrainerOptions, results: Iterable[str]) -> None:
    """Refuse results of validation without what is watched.

    Raises:
        OptcpuError: naming it, and what there is.
    """
    names = list(results)
    for name, monitor in _monitors(options).items():
        if monitor not in names:
            raise OptcpuError(
                f"{name} is {monitor!r}, but validation gave {', '.join(names)}. Remedy: watch one of "
                "these, and train again; a run with checkpoints goes on with this validation"
            )


def _monitors(options: TrainerOptions) -> dict[str, str]:
    """The metrics that are watched, by the names of the settings that say so."""
    stopping, checkpoints = options.early_stopping, options.checkpoints
    monitors = {
        "early_stopping.monitor": None if stopping is None else stopping.monitor,
        "checkpoints.best": None if checkpoints is None else checkpoints.best,
    }
    return {name: monitor for name, monitor in monitors.items() if monitor is not None}
