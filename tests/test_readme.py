"""What the README shows works as it is written there; so does every example."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from optcpu.cli import _parser
from optcpu.runtime.config import parse_override, read_config
from optcpu.runtime.jobs import BUILT_IN

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ALONE = [
    path for path in EXAMPLES if path.name != "llm_c.py"
]  # which needs llm.c; see test_llm_c.py


def _sections() -> dict[str, str]:
    """The Python code of each section that has some, its blocks one after the other."""
    sections = {}
    for section in re.split(r"^#{1,2} ", README, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        blocks = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
        if blocks:
            sections[title] = "\n".join(blocks)
    return sections


SECTIONS = _sections()


def _shell_lines() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


# A part that falls back to eager would still run; here it has to be compiled.
_STRICT = """
import runpy, sys, warnings
from optcpu.errors import FallbackWarning
warnings.simplefilter("error", FallbackWarning)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def _run(script: Path, cwd: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _STRICT, str(script)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_python_code(title: str, tmp_path: Path) -> None:
    code = SECTIONS[title]
    installed = any(e.name == "optcpu" for e in entry_points(group="torch_dynamo_backends"))
    if 'backend="optcpu"' in code and not installed:
        pytest.skip("torch.compile finds the backend only where optcpu is installed")
    script = tmp_path / "readme.py"
    script.write_text(code)
    _run(script, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("example", ALONE, ids=[path.name for path in ALONE])
def test_example(example: Path, tmp_path: Path) -> None:
    _run(example, tmp_path)


def test_has_code_to_run() -> None:
    assert len(SECTIONS) >= 4


@pytest.mark.parametrize("line", [line for line in _shell_lines() if re.search(r"\boptcpu ", line)])
def test_commands_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if line.startswith("pip"):
        line = line.partition(" && ")[2]
    words = shlex.split(line, comments=True)
    arguments = _parser().parse_args(words[words.index("optcpu") + 1 :])
    assert arguments.run is not None
    if "--config" in words:
        monkeypatch.chdir(ROOT)
        overrides = dict(parse_override(text) for text in arguments.overrides)
        assert read_config(Path(arguments.config), overrides).job in BUILT_IN


def test_install_commands_name_what_is_there() -> None:
    installs = [line for line in _shell_lines() if line.startswith("pip install")]
    assert [line.partition(" && ")[2] for line in installs] == [
        "optcpu compare",
        'pytest -m "not slow"',
        "",
        "",
    ]
    project = (ROOT / "pyproject.toml").read_text()
    for line in installs:
        extras = re.search(r'"\.\[(.*?)\]"', line)
        assert extras is not None
        for extra in extras.group(1).split(","):
            assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE)
        constraints = re.search(r"-c (\S+)", line)
        assert constraints is not None
        assert (ROOT / constraints.group(1)).exists()


def test_constraints_pin_every_library_that_the_extras_name() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    declared = project.partition("dependencies = [")[2].partition("[project.scripts]")[0]
    ipex = re.compile(r"^ipex = .*$", flags=re.MULTILINE)  # that one needs another torch
    names = set(re.findall(r'"([\w-]+)[><=~]=', ipex.sub("", declared)))
    assert names <= set(_pinned("constraints.txt"))


def test_both_constraints_differ_in_what_ipex_needs_alone() -> None:
    usual, beside_ipex = _pinned("constraints.txt"), _pinned("constraints-ipex.txt")
    differing = dict(beside_ipex.items() - usual.items())
    assert differing == {"torch": "2.8.0", "intel-extension-for-pytorch": "2.8.0"}
    assert usual.keys() <= beside_ipex.keys()


def _pinned(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / name).read_text(), flags=re.MULTILINE))
