"""The old import name: the objects of lmfuse, nothing patched, and honest beside the real IPEX."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

import intel_extension_for_pytorch as ipex
import lmfuse
import lmfuse.modules
from intel_extension_for_pytorch.llm import functional, modules
from intel_extension_for_pytorch.llm.functional import fusions


def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter, with `path` searched first."""
    lines = [f"import sys; sys.path[:0] = {[str(p) for p in path]}", code]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (ipex.llm.modules, lmfuse.modules),
        (ipex.llm.functional, lmfuse.functional),
        (ipex.llm.functional.fusions, lmfuse.functional),
    ],
    ids=["modules", "functional", "fusions"],
)
def test_every_public_name_is_the_object_of_lmfuse(old, new):
    assert new.__all__
    for name in new.__all__:
        assert getattr(old, name) is getattr(new, name)
        assert name in dir(old)


def test_paths_import_as_they_read():
    assert modules is ipex.llm.modules
    assert functional is ipex.llm.functional
    assert fusions is ipex.llm.functional.fusions


def mlp():
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)).eval()


def packed(model):
    return isinstance(model[0], lmfuse.modules.Linear)


def test_optimize_takes_the_arguments_of_ipex():
    model = mlp()
    assert packed(ipex.optimize(model))
    assert ipex.optimize(model, torch.bfloat16, None, "O1")[0].weight.dtype is torch.bfloat16
    assert not packed(ipex.optimize(model, level="O0"))
    assert packed(ipex.optimize(model, level="O0", weights_prepack=True))
    assert not packed(ipex.optimize(model, weights_prepack=False))
    assert not packed(model)
    assert ipex.optimize(model, inplace=True) is model
    traced = torch.jit.trace(mlp(), torch.zeros(1, 8))
    assert ipex.optimize(traced) is traced
    with pytest.raises(ValueError, match="level is 'O2'"):
        ipex.optimize(model, level="O2")
    with pytest.raises(ValueError, match="optimizer must be None"):
        ipex.optimize(model, optimizer=torch.optim.SGD(model.parameters()))


def test_options_without_effect_warn_once():
    with pytest.warns(UserWarning, match="ignores: conv_bn_folding.*; optimize_lstm") as caught:
        ipex.optimize(mlp(), conv_bn_folding=True, optimize_lstm=True)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ipex.optimize(
            mlp(),
            concat_linear=True,
            sample_input=torch.zeros(1, 8),
            replace_dropout_with_identity=True,
            conv_bn_folding=False,
        )


def test_llm_optimize_takes_the_arguments_of_ipex():
    model = mlp()
    assert packed(ipex.llm.optimize(model))
    ours = ipex.llm.optimize(model, None, torch.bfloat16, True, "cpu", deployment_mode=False)
    assert ours is model
    assert model[0].weight.dtype is torch.bfloat16
    again = ipex.llm.optimize(model, dtype=torch.float, cache_weight_for_large_batch=True)
    assert again[0].weight.dtype is torch.bfloat16  # float32 means: as it is
    traced = torch.jit.trace(mlp(), torch.zeros(1, 8))
    assert ipex.llm.optimize(traced) is traced
    for name, value in {
        "optimizer": object(),
        "device": "xpu",
        "qconfig_summary_file": "recipe.json",
        "low_precision_checkpoint": {},
    }.items():
        with pytest.raises(ValueError, match=f"{name} .*must be"):
            ipex.llm.optimize(model, **{name: value})
    with pytest.raises(TypeError, match="get_weight_only_quant_qconfig_mapping"):
        ipex.llm.optimize(model, quantization_config=object())
    qconfig = ipex.quantization.get_weight_only_quant_qconfig_mapping()
    quantized = ipex.llm.optimize(mlp(), quantization_config=qconfig)
    assert quantized[0].weight.dtype is torch.uint8


def test_version_says_which_release_of_ipex_and_whose():
    release, _, local = ipex.__version__.partition("+")
    assert tuple(int(part) for part in release.split(".")) >= (2, 10, 0)
    assert local == f"lmfuse.{lmfuse.__version__}"


@pytest.mark.parametrize(
    "module", [ipex, ipex.llm, ipex.llm.modules, ipex.llm.functional, ipex.llm.functional.fusions]
)
def test_a_missing_name_is_an_attribute_error_in_words(module):
    with pytest.raises(AttributeError, match=r"has no attribute 'xpu_matmul'.*README"):
        _ = module.xpu_matmul
    assert not hasattr(module, "xpu_matmul")


# What an import could patch: every attribute of every module that was there before, of every class
# in them, and torch's overridden kernels, which torch reports on stderr.
PATCHES = """
import torch, transformers, transformers.generation.utils, transformers.modeling_utils
import transformers.models.llama.modeling_llama, transformers.tokenization_utils_base

def seen():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("torch", "transformers"):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                for inner, member in list(vars(value).items()):
                    found[name, key, inner] = id(member)
    return found

before = seen()
import intel_extension_for_pytorch as ipex
ipex.llm.modules, ipex.llm.functional.rms_norm
after = seen()
volatile = {"__warningregistry__", "__abstractmethods__", "_abc_impl", "__weakref__"}
changed = [k for k in before if k[-1] not in volatile and after.get(k) != before[k]]
print(len(before), changed)
"""


def test_importing_patches_nothing():
    done = run(PATCHES)
    assert done.returncode == 0, done.stderr
    count, changed = done.stdout.split(" ", 1)
    assert int(count) > 10_000
    assert changed.strip() == "[]"
    assert "Overriding" not in done.stderr


def test_importing_leaves_transformers_alone():
    done = run("import intel_extension_for_pytorch; print('transformers' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_beside_the_real_ipex_it_says_so(tmp_path):
    info = tmp_path / "intel_extension_for_pytorch-2.8.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: intel_extension_for_pytorch\nVersion: 2.8.0\n"
    )
    done = run("import lmfuse; import intel_extension_for_pytorch", tmp_path)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: Intel Extension for PyTorch 2.8.0 and lmfuse")
    assert "pip uninstall intel_extension_for_pytorch lmfuse" in error


def test_no_distribution_claims_the_name_of_ipex():
    """Other libraries ask for this metadata before they call into IPEX's internals."""
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("intel_extension_for_pytorch")
