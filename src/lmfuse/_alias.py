"""What the import name `intel_extension_for_pytorch` needs beside the names it hands on.

That package holds no logic; the little there is, is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from typing import Any

from lmfuse import __version__

# The release of Intel Extension for PyTorch whose calls lmfuse follows. Scripts compare it with the
# version they need; what comes after the plus sign says whose it is, and PEP 440 ignores it there.
VERSION = f"2.10.0+lmfuse.{__version__}"


def refuse_beside_ipex() -> None:
    """Raises ImportError if Intel Extension for PyTorch itself is installed.

    Both own the folder `intel_extension_for_pytorch`: whichever came second has overwritten files
    of the first, so that neither can be trusted.
    """
    try:
        theirs = metadata.version("intel_extension_for_pytorch")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"Intel Extension for PyTorch {theirs} and lmfuse {__version__} are both installed, and "
        "both own the folder intel_extension_for_pytorch, where each may have overwritten the "
        "other. Keep one. For lmfuse: pip uninstall intel_extension_for_pytorch lmfuse, then "
        "pip install lmfuse. Or, with both installed: import lmfuse instead."
    )


def names(
    package: str, late: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The module-level `__getattr__` and `__dir__` of the alias package `package`.

    Args:
        package: its `__name__`.
        late: name -> the lmfuse module that has it, for names that import transformers: they are
            looked up when somebody asks for them.
    """
    late = late or {}

    def get(name: str) -> Any:
        if name in late:
            return getattr(import_module(late[name]), name)
        raise AttributeError(
            f"{package} has no attribute {name!r}: lmfuse {__version__} serves the CPU part of "
            "ipex.llm, as far as its README lists it under 'Coming from IPEX'"
        )

    def names_of() -> list[str]:
        return sorted({*vars(import_module(package)), *late})

    return get, names_of
