"""Levels: detection, the environment variable, switching, threads."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import lmfuse
from helpers import assert_same_bits
from lmfuse.functional import isa as levels
from lmfuse.isa import LEVELS

# What /proc/cpuinfo calls the bits that each level needs beyond the one before.
FLAGS = {
    "avx2": {"avx", "avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "avx512_bf16": {"avx512_bf16", "avx512_vnni", "avx512vbmi"},
    "amx": {"amx_tile", "amx_bf16", "amx_int8"},
}


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "LMFUSE_ISA"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_detection_agrees_with_the_kernel() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    expected = ["generic"]
    for level, needed in FLAGS.items():
        if not needed <= flags:
            break
        expected.append(level)
    assert lmfuse.available_isas() == tuple(expected)


def test_the_best_is_active_unless_the_environment_says_otherwise() -> None:
    code = "import lmfuse; print(lmfuse.isa())"
    assert run(code).stdout.split() == [lmfuse.available_isas()[-1]]
    assert run(code, LMFUSE_ISA="").stdout.split() == [lmfuse.available_isas()[-1]]
    for name in lmfuse.available_isas():
        assert run(code, LMFUSE_ISA=name).stdout.split() == [name]


def test_environment_names_no_level() -> None:
    done = run("import lmfuse", LMFUSE_ISA="avx9")
    assert done.returncode == 1
    assert "ValueError: environment variable LMFUSE_ISA: isa is 'avx9'" in done.stderr
    assert "must be one of generic, avx2, avx512, avx512_bf16, amx" in done.stderr


def test_level_that_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with AVX2 and no more."""
    before = lmfuse.isa()
    monkeypatch.setattr(levels, "best", lambda: 1)
    monkeypatch.setattr(levels, "use", lambda level: level <= 1)
    assert lmfuse.available_isas() == ("generic", "avx2")
    message = "isa is 'amx', but this machine can run only generic, avx2"
    with pytest.raises(ValueError, match=message):
        lmfuse.set_isa("amx")
    with pytest.raises(ValueError, match=message), lmfuse.use_isa("amx"):
        pass
    assert lmfuse.isa() == before
    monkeypatch.setenv("LMFUSE_ISA", "amx")
    from lmfuse.isa import _from_environment

    with pytest.raises(ValueError, match=f"environment variable LMFUSE_ISA: {message}"):
        _from_environment()


@pytest.mark.parametrize("level", [-1, 5, 255, 256, 2**32, -(2**32)])
def test_the_library_refuses_what_is_no_level(level: int) -> None:
    before = lmfuse.isa()
    assert not levels.use(level)
    assert lmfuse.isa() == before


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="isa is 'sse', but must be one of generic, avx2"):
        lmfuse.set_isa("sse")


def test_use_isa_restores(isa: str) -> None:
    assert lmfuse.isa() == isa
    for name in lmfuse.available_isas():
        with lmfuse.use_isa(name):
            assert lmfuse.isa() == name
            with contextlib.suppress(KeyError), lmfuse.use_isa("generic"):
                assert lmfuse.isa() == "generic"
                raise KeyError
            assert lmfuse.isa() == name
        assert lmfuse.isa() == isa


def test_levels_are_those_of_the_library() -> None:
    assert LEVELS.index(lmfuse.isa()) == levels.active()
    assert levels.best() < len(LEVELS)


def test_level_holds_in_all_threads_and_calls_may_overlap(isa: str) -> None:
    x, w = torch.randn(64, 300), torch.randn(300)
    expected = lmfuse.functional.rms_norm(x, w)
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda _: lmfuse.isa(), range(8)))
        results = list(pool.map(lambda _: lmfuse.functional.rms_norm(x, w), range(32)))
    assert names == [isa] * 8
    for result in results:
        assert_same_bits(result, expected)
