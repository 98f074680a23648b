"""Published checkpoints as state dicts of our own: each tensor is repacked when it is asked for.

transformers then loads them as it loads what lmfuse saved: see `quantizer`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmfuse.functional import expert_rows, unpack_quantized
from lmfuse.hf import quantizer as _registered  # noqa: F401
from lmfuse.quantization.config import WeightOnlyConfig
from lmfuse.quantization.published import pack_awq, pack_gptq

_GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is added to stored zero points


class Lazy:
    """A tensor that is made when transformers slices it; the loader asks for no more than this."""

    def __init__(self, make: Callable[[], Tensor], dtype: str = "U8") -> None:
        self._make, self._dtype = make, dtype

    def get_dtype(self) -> str:
        """As safetensors says it."""
        return self._dtype

    def __getitem__(self, index: object) -> Tensor:
        return self._make()


def load(name: str | os.PathLike[str], how: WeightOnlyConfig, kwargs: dict[str, Any]) -> Any:
    """See `lmfuse.hf.from_pretrained`."""
    auto = transformers.AutoModelForCausalLM
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(
        name, **_where(kwargs)
    )
    said = getattr(config, "quantization_config", None)
    said = said if said is None or isinstance(said, dict) else said.to_dict()
    method = None if said is None else said.get("quant_method")
    if said is None or method not in ("gptq", "awq"):
        return auto.from_pretrained(name, config=config, **kwargs)
    folder = _folder(name, kwargs)
    tensors = _tensors(folder)
    state, layers = _published(tensors, _reader(method, said))
    if not layers:
        raise ValueError(f"{folder} says that it is quantized by {method}, but has no qweight")
    model = load_state(config, state, how, layers, kwargs)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def load_gguf(
    name: str | os.PathLike[str], file: str, how: WeightOnlyConfig, kwargs: dict[str, Any]
) -> Any:
    """See `lmfuse.hf.from_pretrained`."""
    from lmfuse.hf import gguf

    path = Path(name) / file
    if not path.is_file():
        from transformers.utils.hub import cached_file

        found = cached_file(str(name), file, **_where(kwargs))
        path = Path(str(found))
    return gguf.load(path, how, kwargs)


def load_state(
    config: Any,
    state: Mapping[str, Any],
    how: WeightOnlyConfig,
    layers: list[str],
    kwargs: dict[str, Any],
) -> Any:
    """A model of `config`, with weights out of `state`, in which `layers` are quantized."""
    # What these layers are is in their bytes; of the rest of the config only `how` is meant.
    said = dataclasses.replace(how, layers=dict.fromkeys(layers, how.compute))
    config.quantization_config = said.to_dict()
    names = config.architectures or ()
    kind: Any = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    if kind is None:
        kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    kwargs = {k: v for k, v in kwargs.items() if k not in _WHERE}
    kwargs.setdefault("dtype", config.dtype or torch.bfloat16)
    return kind.from_pretrained(None, config=config, state_dict=dict(state), **kwargs)


_WHERE = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def _where(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: kwargs[k] for k in _WHERE if k in kwargs}


def _folder(name: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Path:
    if Path(name).is_dir():
        return Path(name) / str(kwargs.get("subfolder", ""))
    from huggingface_hub import snapshot_download

    where = {k: v for k, v in _where(kwargs).items() if k != "subfolder"}
    found = snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json"], **where)
    return Path(found) / str(kwargs.get("subfolder", ""))


def _tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of the safetensors files of a folder, none of them read yet."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for file in files:
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index} names {file!r}, which is no file of its folder")
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no safetensors files, and lmfuse reads no others")
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            opened: Any = safe_open(folder / file, framework="pt")
            for key in opened.keys():  # noqa: SIM118  (no dict)
                tensors[key] = opened.get_slice(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} is not a sound safetensors file: {error}") from None
    return tensors


Reader = Callable[[Callable[[str], "Tensor | None"]], Tensor]


def _reader(method: str, said: Mapping[str, Any]) -> Reader:
    """What makes bytes of the parts of a weight, as its config says."""
    bits = said.get("bits", said.get("w_bit", 4))
    group = said.get("group_size", said.get("q_group_size"))
    if method == "awq":
        version = str(said.get("version", "gemm")).lower()
        if version != "gemm" or bits != 4:
            raise ValueError(
                f"the checkpoint is AWQ {version!r} of {bits} bits, but lmfuse reads 'gemm' of 4"
            )
        return lambda part: pack_awq(
            _present("qweight", part), _present("scales", part), part("qzeros"), group
        )
    form = str(said.get("checkpoint_format") or "gptq")
    if form not in _GPTQ_FORMATS:
        raise ValueError(
            f"the checkpoint is GPTQ of the format {form!r}, but lmfuse reads "
            f"{' and '.join(_GPTQ_FORMATS)}"
        )
    offset = _GPTQ_FORMATS[form]
    return lambda part: pack_gptq(
        _present("qweight", part),
        _present("scales", part),
        part("qzeros"),
        part("g_idx"),
        bits,
        group,
        offset,
    )


def _present(name: str, part: Callable[[str], Tensor | None]) -> Tensor:
    found = part(name)
    if found is None:
        raise ValueError(f"it has no {name}")
    return found


_PARTS = ("qweight", "scales", "qzeros", "g_idx")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")
_STACKED = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def _published(tensors: Mapping[str, Any], read: Reader) -> tuple[dict[str, Any], list[str]]:
    """The state dict with a `weight` for each `qweight`, and the names of those layers; of experts,
    which are published one by one, with what `QuantizedExperts` holds, and their names."""
    layers = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    mine = set(layers)
    single = set(layers)
    state: dict[str, Any] = {}
    mixtures = _mixtures(layers)
    for owner, count in mixtures.items():
        for name, parts in _STACKED.items():
            each = [f"{owner}.{e}.{part}" for e in range(count) for part in parts]
            if any(f"{layer}.bias" in tensors for layer in each):
                raise ValueError(f"{owner}: its experts have biases, which lmfuse does not stack")
            makes = [_repacked(layer, tensors, read) for layer in each]
            state[f"{owner}.{name}"] = Lazy(partial(_stacked, owner, makes))
            single -= set(each)
    layers = [name for name in layers if name in single]
    for name in layers:
        state[f"{name}.weight"] = Lazy(_repacked(name, tensors, read))
    layers += mixtures
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if part not in _PARTS or name not in mine:
            state[key] = tensor
    return state, layers


def _mixtures(layers: Iterable[str]) -> dict[str, int]:
    """Which of the layers are experts, none of them missing: owner -> how many."""
    found: dict[str, set[tuple[int, str]]] = {}
    for match in filter(None, map(_EXPERT.fullmatch, layers)):
        found.setdefault(match[1], set()).add((int(match[2]), match[3]))
    parts = [part for each in _STACKED.values() for part in each]
    counts = {owner: len(some) // len(parts) for owner, some in found.items()}
    return {
        owner: count
        for owner, count in counts.items()
        if found[owner] == {(e, part) for e in range(count) for part in parts}
    }


def _stacked(owner: str, makes: list[Callable[[], Tensor]]) -> Tensor:
    """The bytes of some layers alike, one below the other, each from a new panel on."""
    each = [unpack_quantized(make()) for make in makes]
    if any(q.g_idx is not None for q in each):
        raise ValueError(
            f"{owner}: the columns of its experts are in an order of their own (desc_act), in "
            "which lmfuse keeps no experts"
        )

    def joined(name: str) -> Tensor | None:
        some = [getattr(q, name) for q in each]
        if some[0] is None:
            return None
        return expert_rows(torch.stack(some))

    tensors: Any = {name: joined(name) for name in ("codes", "scales", "zeros", "offsets")}
    return dataclasses.replace(each[0], **tensors).pack()


def _repacked(name: str, tensors: Mapping[str, Any], read: Reader) -> Callable[[], Tensor]:
    def part(which: str) -> Tensor | None:
        found = tensors.get(f"{name}.{which}")
        return None if found is None else found[...]

    def make() -> Tensor:
        try:
            return read(part)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None

    return make
