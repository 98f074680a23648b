"""The documentation says what is: its guide runs, and its reference has every public name."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lmfuse
from lmfuse import functional, generation, hf, modules, quantization
from lmfuse.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """From top to bottom, as a reader would paste it."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "guide.md").read_text(), re.S)
    assert len(blocks) >= 3
    names: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, "guide.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "{'norm1': 'rms_norm', 'norm2': 'rms_norm'}"


@pytest.mark.parametrize("package", [lmfuse, functional, modules, generation, quantization, hf])
def test_the_reference_has_every_name(package: Any) -> None:
    """Each lies in a module that a page takes in, and in its list of members if it has one."""
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    taken = dict(re.findall(r"^::: (\S+)\n((?:    .*\n)*)", pages, re.M))
    for name in package.__all__:
        found = getattr(package, name)
        if isinstance(found, ModuleType):
            continue
        assert found.__module__ in taken, name
        members = taken[found.__module__]
        assert "members" not in members or re.search(rf"\b{found.__name__}\b", members), name


def test_every_command_is_listed() -> None:
    text = (DOCS / "cli.md").read_text()
    assert all(f"`lmfuse {command}" in text for command in COMMANDS)
