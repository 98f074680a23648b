"""The command line. Each command is a function in the module of its name, imported when it is
called, so that `lmfuse env` need not wait for what `lmfuse run` imports."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer

from lmfuse.cli._mistakes import Group

COMMANDS = ("run", "chat", "explain", "quantize", "bench", "demo", "env")


class _Commands(Group):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        command = typer.Typer(add_completion=False)
        command.command(cmd_name)(getattr(import_module(f"lmfuse.cli.{cmd_name}"), cmd_name))
        return typer.main.get_command(command)


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def _lmfuse() -> None:
    """Fused language-model modules for CPUs, for stock PyTorch and transformers."""


def main() -> None:
    """The entry point of `lmfuse` and `python -m lmfuse`."""
    app(prog_name="lmfuse")
