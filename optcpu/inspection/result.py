"""The result of :func:`optcpu.inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING

from optcpu.inspection import code, difference, export, page, report, summary
from optcpu.inspection.model import GraphBreak, GraphReport, Region, Stage
from optcpu.layout import WeightLayout
from optcpu.record import Fallback

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Inspection:
    """What optcpu made of one call of a model; ``print`` shows the summary.

    Attributes:
        model: the model's class.
        modules: class of each module that appears in a graph, by its dotted path.
        precision: ``"bf16"`` or ``"fp32"``.
        passes: names of the passes, in their order.
        training: whether the model was in training mode.
        torch_version: the compiler's version.
        regions: the captured parts of the model.
        breaks: where capture stopped.
        fallbacks: what ran eagerly or without a rewrite in this inspection.
        earlier_fallbacks: the same of the optimized model before.
        notes: what a reader must know, in sentences.
        layouts: how each weight of two dimensions or more is laid out, and why.
    """

    model: str
    modules: Mapping[str, str]
    precision: str
    passes: tuple[str, ...]
    training: bool
    torch_version: str
    regions: tuple[Region, ...]
    breaks: tuple[GraphBreak, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    earlier_fallbacks: tuple[Fallback, ...] = ()
    notes: tuple[str, ...] = field(default=())
    layouts: tuple[WeightLayout, ...] = ()

    @property
    def graphs(self) -> list[GraphReport]:
        """The graphs of all regions."""
        return [graph for region in self.regions for graph in region.graphs]

    def counts(self) -> dict[str, int]:
        """How often each pass fired, over all graphs, in the order of the passes."""
        return {total.name: total.total for total in self.totals()}

    def totals(self) -> list[summary.PassTotal]:
        """What each pass did, over all graphs."""
        return summary.totals(self.graphs)

    def casts_left(self) -> dict[str, dict[str, int]]:
        """Casts in the final graphs by kind of graph and direction."""
        return {kind: dict(casts) for kind, casts in summary.casts_left(self.graphs).items()}

    def fused(self) -> list[summary.Fused]:
        """Fused operators in the final graphs."""
        return summary.fused(self.graphs)

    def stays_wide(self) -> list[summary.StaysWide]:
        """What computes in FP32 in the final graphs, and why."""
        return summary.stays_wide(self.graphs, self.precision, self.passes)

    def laid_out(self) -> dict[tuple[str, str], list[str]]:
        """The names of the weights by layout and reason."""
        names: dict[tuple[str, str], list[str]] = {}
        for weight in self.layouts:
            names.setdefault((weight.layout, weight.reason), []).append(weight.name)
        return names

    def stages(self, region: int = 0) -> list[str]:
        """Names of a region's stages, in the order they came about."""
        return list(self._region(region).stages())

    def stage(self, name: str | None = None, region: int = 0) -> Stage:
        """One stage of one region.

        Args:
            name: one of :meth:`stages`, or the name of a graph for its final stage, or ``"captured"``.
                The default is the final forward.
            region: its index.

        Raises:
            ValueError: there is no such stage or region.
        """
        found = self._region(region).stages()
        chosen = name if name is not None else _default_stage(found)
        stage = found.get(chosen) or found.get(f"{chosen}/final")
        if stage is None:
            raise ValueError(
                f"region {region} has no stage {chosen!r}; it has {', '.join(map(repr, found))}"
            )
        return stage

    def code(self, stage: str | None = None, region: int = 0) -> str:
        """One stage as readable code: a node a line, with its dtype, shape and source line.

        Args:
            stage, region: as in :meth:`stage`.

        Raises:
            ValueError: there is no such stage or region.
        """
        return code.text_of(self.stage(stage, region))

    def output_code(self, graph: str = "forward", region: int = 0) -> str:
        """What Inductor generated for a graph.

        Args:
            graph: ``"forward"``, ``"backward"`` or ``"inference"``.
            region: its index.

        Raises:
            ValueError: there is no such graph or region, or no code was generated for it.
        """
        for candidate in self._region(region).graphs:
            if candidate.name == graph and candidate.output_code:
                return candidate.output_code
        raise ValueError(
            f"no generated code of graph {graph!r} of region {region} was kept; "
            "inspect with codegen=True"
        )

    def diff(self, before: str, after: str, region: int = 0, context: int = 3) -> str:
        """What changed between two stages, as ``diff -u`` would print it.

        Args:
            before, after, region: as in :meth:`stage`.
            context: unchanged lines around each change.

        Raises:
            ValueError: there is no such stage or region.
        """
        return difference.unified(self.stage(before, region), self.stage(after, region), context)

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """Everything as JSON; also written to ``path`` if one is given.

        Raises:
            ValueError: ``path`` ends in another suffix than ``.json``.
            OptcpuError: the file cannot be written.
        """
        return export.to_json(self, path)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one self-contained web page that shows everything and needs no network.

        An existing file is replaced only once the new one is complete.

        Raises:
            ValueError: ``path`` ends in another suffix than ``.html`` or ``.htm``.
            OptcpuError: the file cannot be written. Nothing is lost: save elsewhere.
        """
        page.save(self, path)

    def __rich__(self) -> RenderableType:
        return report.render(self)

    def __str__(self) -> str:
        return report.to_text(self)

    def __repr__(self) -> str:
        return f"<Inspection of {self.model}: {len(self.regions)} regions, {self.precision}>"

    def _region(self, index: int) -> Region:
        if not 0 <= index < len(self.regions):
            count = len(self.regions)
            raise ValueError(
                f"there is no region {index!r}: {count} {'was' if count == 1 else 'were'} captured"
            )
        return self.regions[index]


def _default_stage(stages: Mapping[str, Stage]) -> str:
    for name in ("forward/final", "inference/final"):
        if name in stages:
            return name
    return "captured"
