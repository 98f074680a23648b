"""What this machine and installation are, for `lmfuse env` and for every stored measurement."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import lmfuse
from lmfuse.isa import LEVELS

# The flags of /proc/cpuinfo that each level needs beyond the one before; see csrc/kernels/isa.cpp.
_FLAGS = {
    "generic": (),
    "avx2": ("avx", "avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512dq", "avx512bw", "avx512vl"),
    "avx512_bf16": ("avx512_bf16", "avx512_vnni", "avx512vbmi"),
    "amx": ("amx_tile", "amx_bf16", "amx_int8"),
}


@dataclass(frozen=True)
class Level:
    """An instruction set: can it be used, is it, and if it cannot, why."""

    name: str
    available: bool
    active: bool
    missing: str


@dataclass(frozen=True)
class Machine:
    """Versions, processor, memory (bytes), instruction sets and the ops of the compiled library."""

    versions: dict[str, str]
    platform: str
    cpu: str
    cores: int
    cpus: int
    threads: int
    caches: dict[str, str]
    memory: int
    levels: list[Level]
    ops: list[str]


def describe() -> Machine:
    """Looks at the machine; what the operating system does not tell is left empty or 0."""
    info = _cpuinfo()
    return Machine(
        versions=_versions(),
        platform=platform.platform(),
        cpu=info.get("model name", "") or platform.processor() or platform.machine(),
        cores=_cores(),
        cpus=_usable(),
        threads=torch.get_num_threads(),
        caches=_caches(),
        memory=_memory(),
        levels=_levels(set(info.get("flags", "").split())),
        ops=_ops(),
    )


def _versions() -> dict[str, str]:
    found = {"lmfuse": lmfuse.__version__, "Python": platform.python_version()}
    found["torch"] = torch.__version__
    for name in ("transformers", "intel_extension_for_pytorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    found: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return found
    for line in text.split("\n\n", 1)[0].splitlines():
        name, _, value = line.partition(":")
        found[name.strip()] = value.strip()
    return found


def _usable() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cores() -> int:
    """Physical cores: processors that share one list their siblings alike."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return len({file.read_text() for file in files})


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / f).read_text().strip() for f in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def _levels(flags: set[str]) -> list[Level]:
    levels = []
    needed: list[str] = []
    for name in LEVELS:
        needed += _FLAGS[name]
        available = name in lmfuse.available_isas()
        lacking = [flag for flag in needed if flag not in flags]
        missing = ""
        if not available and lacking:
            missing = f"the processor does not show {', '.join(lacking)}"
        elif not available:
            missing = "the operating system does not save its registers, or refuses them"
        levels.append(Level(name, available, name == lmfuse.isa(), missing))
    return levels


def _ops() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("lmfuse::") for n in names if n.startswith("lmfuse::"))
