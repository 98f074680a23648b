"""The memory that a long prompt takes besides its tensors, in a process of its own.

A peak is for life: what ran before would hide it. Run as a module, this is that process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from lmfuse import functional

LENGTH, HEADS, KV_HEADS, DIM = 32768, 4, 1, 128


def beyond_prompt() -> int | None:
    """Bytes at the peak of a causal prompt, bfloat16 [1, LENGTH, HEADS, DIM], besides q, k, v, out.

    The size of a score for each query and key would be 4 GB for each head. None where the
    operating system does not tell.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status has no {field}")


def _measure() -> int:
    q, k, v = (torch.randn(1, LENGTH, h, DIM).bfloat16() for h in (HEADS, KV_HEADS, KV_HEADS))
    functional.attention(q[:, :512], k[:, :512], v[:, :512], causal=True)  # threads start
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here on
    before = _status("VmRSS")
    out = functional.attention(q, k, v, causal=True)
    return _status("VmHWM") - before - out.nbytes


if __name__ == "__main__":
    print(_measure())
