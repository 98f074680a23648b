"""The compiled library: no weak symbol, only the stable ABI, one wheel for every Python."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

import lmfuse

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "Release"
ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")


def library() -> Path:
    spec = find_spec("lmfuse._lmfuse")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def output(*command: object) -> str:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True
    ).stdout


def objects() -> list[Path]:
    """The kernels' objects of the build in this repository, as the build itself lists them."""
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    found = [BUILD / c["output"] for c in commands if "/kernels/" in c["file"]]
    sources = {Path(c["file"]).name for c in commands if "/kernels/" in c["file"]} - {"isa.cpp"}
    assert len(found) == len(sources) * len(ISAS) + 1
    return found


def test_no_weak_symbol_in_any_kernel_object() -> None:
    """A linker keeps one copy of a weak function: one from an AVX-512 object would then run on
    every machine. `u` is GNU's unique, `V` and `W` are weak."""
    for path in objects():
        symbols = [line.split() for line in output("nm", path).splitlines()]
        weak = [" ".join(s) for s in symbols if s[-2] in "WVwvu"]
        assert not weak, f"{path.name}: {weak}"


def test_kernels_call_nothing_from_libstdcxx() -> None:
    """Only libc, libm and each other: whatever else they called would not be of their level."""
    for path in objects():
        for line in output("nm", "--undefined-only", "--demangle", path).splitlines():
            name = line.split(maxsplit=1)[1]
            assert "std::" not in name, f"{path.name}: {name}"
            assert "operator new" not in name, f"{path.name}: {name}"


def test_each_level_has_its_flags() -> None:
    """generic has none of x86; each higher level those of the one below."""
    flags: dict[str, set[str]] = {}
    for command in json.loads((BUILD / "compile_commands.json").read_text()):
        words = shlex.split(command["command"])
        for word in words:
            if word.startswith("-DLMFUSE_ISA="):
                here = {w for w in words if w.startswith("-m")}
                assert flags.setdefault(word.removeprefix("-DLMFUSE_ISA="), here) == here
        if "/kernels/" in command["file"]:
            assert not any("torch" in word for word in words if word.startswith(("-I", "-isystem")))
    assert list(flags) == list(ISAS)
    assert not flags["generic"]
    for lower, higher in pairwise(ISAS):
        assert flags[lower] < flags[higher]


def test_only_the_stable_abi() -> None:
    """Everything from libtorch is a C function of the stable ABI, which every torch >= 2.10 has."""
    torch_symbols = []
    for line in output("nm", "-D", "--undefined-only", "--demangle", library()).splitlines():
        name = line.split(maxsplit=1)[1]
        if re.search(r"\b(c10|at|torch|caffe2)::", name):
            pytest.fail(f"not stable: {name}")
        if name.startswith(("aoti_torch_", "torch_")):
            torch_symbols.append(name)
            continue
        # The rest must be versioned symbols of the C and C++ runtimes, or the linker's own.
        own = name.startswith(("__gmon_start__", "_ITM_"))
        assert own or re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name), name
    assert torch_symbols


def test_exports_nothing_that_could_clash() -> None:
    linker = {"__bss_start", "_edata", "_end", "_init", "_fini"}
    for line in output("nm", "-D", "--defined-only", "--demangle", library()).splitlines():
        kind, name = line.split(maxsplit=2)[1:]
        # Weak ones are inline functions of torch's headers, the same in every library.
        assert kind in "WVuw" or name in linker or "lmfuse" in name, line


def test_needs_only_torch_and_the_runtimes() -> None:
    dynamic = output("readelf", "-d", library())
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert needed <= {
        "libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6",
        "ld-linux-x86-64.so.2",
    }  # fmt: skip
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_wheel_tag() -> None:
    """As installed: py3, any ABI, one platform."""
    from importlib.metadata import distribution

    wheel = distribution("lmfuse").read_text("WHEEL")
    assert wheel is not None
    assert re.findall(r"^Tag: (.*)$", wheel, re.M) == [
        next(iter(re.findall(r"py3-none-(?:linux|manylinux\w*)_x86_64", wheel)))
    ]
    assert distribution("lmfuse").version == lmfuse.__version__
