"""A user's mistake is one line on standard error that says what to do, and an exit code."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

# What typer raises for mistakes; it brings a click of its own, or uses the one installed.
_ClickException: Any = typer.BadParameter.__mro__[2]


def one_line(error: Any) -> str:
    """What `error` says, and where to read on if it does not say what to give instead."""
    text = " ".join(error.format_message().split()).replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    if (isinstance(error, typer.BadParameter) and "Missing" not in text) or context is None:
        return f"Error: {text}"
    return f"Error: {text} See {context.command_path} --help"


class _OneLine:
    """Mixin of typer's commands."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """As typer's, but prints mistakes in one line."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)  # type: ignore[misc]
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)  # type: ignore[misc]
        except _ClickException as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                typer.secho(one_line(error), err=True, fg=typer.colors.RED)
            sys.exit(error.exit_code)
        except (typer.Abort, KeyboardInterrupt):
            sys.exit(130)
        sys.exit(code if isinstance(code, int) else 0)


class Command(_OneLine, TyperCommand):
    """A program of one command."""


class Group(_OneLine, TyperGroup):
    """A program of several."""
