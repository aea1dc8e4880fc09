"""Compiles every Triton kernel and CUDA unit for GPUs that are not there, and says what each would cost on them.

    python tests/kernels/aot_report.py            # the table
    python tests/kernels/aot_report.py --write    # and the budget, budgets.json: a commit that raises a number says why

Compiled code depends on the version of the compiler, so the budget names it. Needs a process of its own: kernels
decorated for Triton's interpreter cannot be compiled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

CUDA_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
BUDGETS = Path(__file__).with_name("budgets.json")
ARCHITECTURES = {"sm_80": 80, "sm_90a": 90, "sm_100a": 100}
SPECIAL = "sm_90a"  # where Compile.requires and Unit.requires must hold


class Unit(NamedTuple):
    """What a CUDA unit says of itself that its binary does not."""

    requires: tuple[str, ...]  # instructions
    dynamic_shared: tuple[str, str]  # a constant of a launch's most dynamic shared memory in bytes, and its header


UNITS = {"sm90/vocab_head.cu": Unit(("HGMMA", "UTMALDG"), ("kMostShared", "sm90/head_tile.h"))}


class Usage(NamedTuple):
    """What one kernel needs on one architecture."""

    registers: int
    shared_bytes: int
    spilled_bytes: int  # stack and local memory
    missing: tuple[str, ...] = ()  # instructions that the kernel's design has and its code has not


def triton_kernels() -> dict[str, object]:
    """Every kernel of every op, by `op/kernel-label`."""
    from fastlatent_kernels import OPS

    entries = {}
    for op in OPS.values():
        if "triton" in op.order:
            for entry in importlib.import_module(f"{op.__module__}.triton_impl").AOT:
                assert f"{op.name}/{entry.name}" not in entries, f"two kernels are called {op.name}/{entry.name}"
                entries[f"{op.name}/{entry.name}"] = entry
    return entries


def measure_triton(name: str, architecture: str) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    entry = triton_kernels()[name]
    names = entry.kernel.arg_names
    assert set(names) == entry.signature.keys() | entry.constexprs.keys(), f"{name}: takes {names}"
    assert not entry.signature.keys() & entry.constexprs.keys()
    signature = {n: entry.signature.get(n, "constexpr") for n in names}
    constexprs = {(names.index(n),): getattr(value, "value", value) for n, value in entry.constexprs.items()}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in entry.signature.items()
                  if kind.startswith(("*", "i")) and n not in entry.unaligned}
    compiled = triton.compile(
        ASTSource(fn=entry.kernel, signature=signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", ARCHITECTURES[architecture], 32),
        options={"num_warps": entry.num_warps, "num_stages": entry.num_stages})
    assert f".target {architecture}" in compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = resources(file.name)
        code = cuobjdump("-sass", file.name) if architecture == SPECIAL and entry.requires else ""
    missing = tuple(x for x in entry.requires if x not in code) if architecture == SPECIAL else ()
    # the driver allots a kernel's dynamic shared memory at launch: the binary does not hold it
    return usage._replace(shared_bytes=compiled.metadata.shared, missing=missing)


def measure_unit(name: str, architecture: str) -> Usage:
    """Compile a CUDA unit with nvcc; the largest needs of any kernel in it."""
    unit = UNITS.get(name)
    with tempfile.TemporaryDirectory() as folder:
        said = subprocess.run(
            ["nvcc", "-cubin", "-res-usage", "-std=c++17", "-O3", f"-arch={architecture}", "-o", f"{folder}/unit.cubin",
             str(CUDA_SOURCES / name)], check=True, capture_output=True, text=True).stderr
        code = "" if unit is None else cuobjdump("-sass", f"{folder}/unit.cubin")
    largest = {what: max(map(int, re.findall(pattern, said)), default=0) for what, pattern in (
        ("registers", r"Used (\d+) registers"), ("shared_bytes", r"(\d+) bytes smem"),
        ("spilled_bytes", r"(\d+) bytes (?:stack frame|spill stores|spill loads)"))}
    assert largest["registers"], f"nvcc reports no kernel in {name}:\n{said}"
    if unit is None:
        return Usage(**largest)
    largest["shared_bytes"] += constant(*unit.dynamic_shared)
    missing = [x for x in unit.requires if x not in code]
    # what ptxas does where it cannot prove that nothing touches the sums of products still under way
    missing += ["wgmma left asynchronous"] * ("wgmma.mma_async instructions are serialized" in said)
    return Usage(**largest, missing=tuple(missing))


def constant(name: str, header: str) -> int:
    """A number that a header of the CUDA sources defines."""
    with tempfile.TemporaryDirectory() as folder:
        program = f'#include "{header}"\n#include <cstdio>\nint main() {{ printf("%d", fastlatent::{name}); }}'
        compiler = [os.environ.get("CXX", "c++"), "-std=c++17", f"-I{CUDA_SOURCES}", "-x", "c++", "-"]
        subprocess.run([*compiler, "-o", f"{folder}/print"], input=program, text=True, check=True)
        return int(subprocess.run([f"{folder}/print"], check=True, capture_output=True, text=True).stdout)


def resources(cubin: str) -> Usage:
    """Of the one kernel in a binary."""
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", cuobjdump("-res-usage", cubin))
    registers, stack, shared, local = map(int, found)
    return Usage(registers, shared, stack + local)


def cuobjdump(*arguments: str) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([tools / "cuobjdump", *arguments], check=True, capture_output=True, text=True).stdout


def architectures(unit: Path) -> list[str]:
    return [SPECIAL] if unit.parent.name == "sm90" else list(ARCHITECTURES)


def measure(task: tuple[str, str]) -> Usage:
    name, architecture = task
    return (measure_unit if name.endswith(".cu") else measure_triton)(name, architecture)


def measure_all(wanted: str) -> dict[str, dict[str, Usage]]:
    """Usage by kernel or unit and architecture, of those whose name contains `wanted`."""
    tasks = [(name, architecture) for name in triton_kernels() for architecture in ARCHITECTURES]
    if nvcc_version() is not None:
        tasks += [(str(unit.relative_to(CUDA_SOURCES)), architecture) for unit in sorted(CUDA_SOURCES.rglob("*.cu"))
                  for architecture in architectures(unit)]
    tasks = [task for task in tasks if wanted in task[0]]
    usage: dict[str, dict[str, Usage]] = {}
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=get_context("fork")) as pool:
        for (name, architecture), used in zip(tasks, pool.map(measure, tasks), strict=True):
            usage.setdefault(name, {})[architecture] = used
            print(f"{name:<52}{architecture:<10}{used.registers:>5} registers{used.shared_bytes:>8} B shared"
                  f"{used.spilled_bytes:>6} B spilled  {' '.join(f'no {x}' for x in used.missing)}", flush=True)
    return usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wanted", nargs="?", default="", help="only names that contain this")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--write", action="store_true", help="make what was measured the budget")
    args = parser.parse_args()
    import triton

    usage = {name: {architecture: used._asdict() for architecture, used in by_architecture.items()}
             for name, by_architecture in sorted(measure_all(args.wanted).items())}
    if args.json:
        args.json.write_text(json.dumps(usage))
    if args.write:
        budget = {} if not args.wanted else json.loads(BUDGETS.read_text())["kernels"]
        for name, by_architecture in usage.items():
            budget[name] = {architecture: {"registers": used["registers"], "shared_bytes": used["shared_bytes"]}
                            for architecture, used in by_architecture.items()}
        lines = [f"    {json.dumps(name)}: {json.dumps(budget[name])}" for name in sorted(budget)]
        BUDGETS.write_text(f'{{\n  "triton": "{triton.__version__}", "nvcc": "{nvcc_version()}",\n  "kernels": {{\n'
                           + ",\n".join(lines) + "\n  }\n}\n")


def nvcc_version() -> str | None:
    """None where there is no nvcc: CUDA units are then left out."""
    if shutil.which("nvcc") is None:
        return None
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("kernels decorated for the interpreter cannot be compiled: run it with TRITON_INTERPRET=0")
    main()
