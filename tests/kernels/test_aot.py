"""Every kernel compiles for the GPUs we mean, within its budget of registers and shared memory and without spills."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import aot_report
import pytest
import torch
import triton
from fastlatent_kernels import OPS

HERE = Path(__file__).parent
BUDGETS = json.loads(aot_report.BUDGETS.read_text())
UNITS = {str(unit.relative_to(aot_report.CUDA_SOURCES)) for unit in aot_report.CUDA_SOURCES.rglob("*.cu")}
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024}  # CUDA C++ programming guide


@pytest.fixture(scope="module")
def usage(tmp_path_factory) -> dict[str, dict[str, dict]]:
    file = tmp_path_factory.mktemp("aot") / "usage.json"
    subprocess.run([sys.executable, HERE / "aot_report.py", "--json", file], check=True,
                   env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(HERE.parents[1] / "kernels")})
    return json.loads(file.read_text())


def test_no_kernel_spills_or_lacks_the_instructions_of_its_design(usage):
    wrong = []
    for name, by_architecture in usage.items():
        for architecture, used in by_architecture.items():
            wrong += [f"{name} {architecture}: no {instruction}" for instruction in used["missing"]]
            if used["spilled_bytes"]:
                wrong.append(f"{name} {architecture}: {used['spilled_bytes']} bytes spilled")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("compiler", "version"), [("triton", triton.__version__), ("nvcc", aot_report.nvcc_version())])
def test_compiled_kernels_stay_within_their_budget(usage, compiler, version):
    if version != BUDGETS[compiler]:
        pytest.skip(f"the budget is of {compiler} {BUDGETS[compiler]}, here is {version}")
    of_compiler = lambda names: {name for name in names if name.endswith(".cu") == (compiler == "nvcc")}
    assert of_compiler(usage) == of_compiler(BUDGETS["kernels"])
    over = []
    for name in of_compiler(usage):
        assert usage[name].keys() == BUDGETS["kernels"][name].keys()
        for architecture, budget in BUDGETS["kernels"][name].items():
            over += [f"{name} {architecture}: {what} {usage[name][architecture][what]}, budget {most}"
                     for what, most in budget.items() if usage[name][architecture][what] > most]
    assert not over, "\n".join(over)


def test_budgets_fit_the_machines():
    for name, by_architecture in BUDGETS["kernels"].items():
        for architecture, budget in by_architecture.items():
            assert budget["registers"] <= 255 and budget["shared_bytes"] <= SHARED_LIMITS[architecture], name


def test_every_kernel_is_compiled_ahead_of_time():
    for op in OPS.values():
        if "triton" not in op.order:
            continue
        compiled = {entry.kernel.__name__ for entry in importlib.import_module(f"{op.__module__}.triton_impl").AOT}
        here = {name for path in Path(importlib.import_module(op.__module__).__file__).parent.glob("*.py")
                for name in re.findall(r"^@triton.jit\ndef (\w*kernel)\(", path.read_text(), re.MULTILINE)}
        assert here == compiled and here, op.name


def test_every_unit_is_built():
    listed = re.findall(r"csrc/cuda/(\S+\.cu)", (HERE.parents[1] / "CMakeLists.txt").read_text())
    assert set(listed) == UNITS != set()


def test_the_report_sees_spills_and_what_is_missing(tmp_path, monkeypatch):
    """A unit held to few registers must spill, and the report must say so; as that it multiplies no matrices."""
    (tmp_path / "spill.cu").write_text("""
__global__ void __launch_bounds__(1024, 2) spill(float* x) {
  float kept[96];
  for (int i = 0; i < 96; i++) kept[i] = x[i * 4096 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 96; i++) x[i * 4096 + threadIdx.x] = kept[95 - i] * kept[i];
}""")
    if aot_report.nvcc_version() is None:
        pytest.skip("needs nvcc")
    (tmp_path / "most.h").write_text("namespace fastlatent { constexpr int kMost = 4321; }")
    monkeypatch.setattr(aot_report, "CUDA_SOURCES", tmp_path)
    monkeypatch.setattr(aot_report, "UNITS", {"spill.cu": aot_report.Unit(("HGMMA", "LDG"), ("kMost", "most.h"))})
    used = aot_report.measure_unit("spill.cu", "sm_90a")
    assert used.registers <= 32 and used.spilled_bytes > 0
    assert used.missing == ("HGMMA",) and used.shared_bytes == 4321


def test_the_cuda_module_imports_without_gpu_and_links_neither_runtime_nor_torch():
    if aot_report.nvcc_version() is None:
        pytest.skip("needs nvcc: without it the module is not built")
    module = importlib.import_module("fastlatent_kernels._cuda")
    said = subprocess.run(["readelf", "--dynamic", module.__file__], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", said)
    assert "libc.so.6" in needed and not [name for name in needed if re.search("cuda|torch|c10", name)]
    if not torch.cuda.is_available():
        arguments = module.GaussianForward()
        arguments.rows = 1
        with pytest.raises(RuntimeError, match="CUDA"):
            module.gaussian_reparam_forward(arguments, 0, 0)
