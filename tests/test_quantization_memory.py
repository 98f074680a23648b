"""How much memory quantizing takes, and loading what was quantized, on a model of 135 MB."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

_MEASURE = """
import re, sys, torch, transformers, lmfuse
import transformers.models.llama.modeling_llama

def status(key):
    with open("/proc/self/status") as file:
        return int(re.search(key + r":\\s+(\\d+)", file.read())[1]) * 1024

def size(model):
    return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())

def load(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how)

torch.set_num_threads(2)
lmfuse.quantize(torch.nn.Linear(64, 64))  # what the first call of anything allocates
config = lmfuse.WeightOnlyConfig(bits=4, group_size=128, compute="bf16")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = status("VmRSS")
how, source, target = sys.argv[1:]
if how == "quantize":
    model = lmfuse.quantize(load(source), config, inplace=True)
elif how == "while loading":
    model = load(source, quantization_config=config)
else:
    model = load(source)
print(status("VmHWM") - before, size(model))
if target:
    model.save_pretrained(target)
"""


def measure(how: str, source: Path, target: Path | None = None) -> tuple[int, int]:
    """By how much the peak is above what was there before, and the size of the quantized model."""
    command = [sys.executable, "-c", _MEASURE, how, str(source), str(target or "")]
    # What is freed is given back at once: glibc keeps 5 to 50 MB of it, as threads happen to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, size = map(int, done.stdout.split()[-2:])
    return peak, size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=2048,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


def test_memory(folder: Path, tmp_path: Path) -> None:
    """Beside the models: one layer, of 8 MB, and the slices of it in float32."""
    source = (folder / "model.safetensors").stat().st_size
    beside = 16 << 20
    peak, size = measure("quantize", folder)
    assert source > 130 << 20 > 3 * size
    assert peak < source + size + beside
    peak, size = measure("while loading", folder, tmp_path)
    assert peak < source + size + beside
    peak, size = measure("quantized already", tmp_path)
    assert peak < 2 * size + beside  # a file that is mapped counts, until its tensors are copied
