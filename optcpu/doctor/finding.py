"""What a check tells."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: What was looked at.
        status: ``"ok"``; ``"note"`` for something optional; ``"warning"`` for what costs speed;
            ``"error"`` for what makes optcpu unusable.
        detail: What was found.
        remedy: What to do about it; empty if there is nothing to do.
    """

    check: str
    status: Status
    detail: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """The fields by name, for JSON."""
        return asdict(self)
