"""One self-contained web page of an inspection."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources
from os import PathLike
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from optcpu import files
from optcpu.inspection import pack

if TYPE_CHECKING:
    from optcpu.inspection.result import Inspection

_SCRIPTS = (
    "dom.js",
    "data.js",
    "blocks.js",
    "cells.js",
    "pane.js",
    "search.js",
    "details.js",
    "summary.js",
    "main.js",
)


def save(inspection: Inspection, path: str | PathLike[str]) -> None:
    """Write the page; see :meth:`Inspection.save`."""
    target = page_path(path)
    files.write(target, to_html(inspection).encode(), "save")


def page_path(path: str | PathLike[str]) -> Path:
    """``path``, if a page can have that name.

    Raises:
        ValueError: its suffix is that of another kind of file.
    """
    return files.path_for(path, "save", "a web page", ".html", ".htm")


def to_html(inspection: Inspection) -> str:
    """The page: markup, style, script and data in one, with no reference to anything outside."""
    style = _part("page.css")
    script = "\n".join(['"use strict";', "(() => {", *map(_part, _SCRIPTS), "})();"])
    title = f"{inspection.model}: what optcpu made of it"
    return Template(_part("page.html")).substitute(
        policy=_policy(style, script),
        title=html.escape(title),
        heading=html.escape(inspection.model),
        style=style,
        script=script,
        data=_embedded(pack.to_dict(inspection)),
    )


def _part(name: str) -> str:
    return (
        resources.files("optcpu.inspection")
        .joinpath("web")
        .joinpath(name)
        .read_text(encoding="utf-8")
    )


def _embedded(data: Any) -> str:
    """JSON that can stand in a script element, whatever text is in it."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(style: str, script: str) -> str:
    """Run this page's own script and nothing else, and load nothing."""
    return (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
