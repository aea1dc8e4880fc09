"""The parts of the battery: which commands each runs, on a GPU and, at small sizes, on a CPU.

A part is a generator of steps, so that what comes between two commands is done between them. Standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benches import gpu_needs
from benches.gpu_steps import Step

ROOT = Path(__file__).parents[1]
MODEL = "qwen2.5-1.5b"
"""The shape with random weights that the benchmarks are about."""

SMALL = "smollm2-135m-instruct"
"""The model that learns something, where it was carried."""

ENGINES = "hf,loop,generate"
"""What draws in the rollout's benchmark: ours, the loop its rate is promised against, and transformers' own."""

VLLM_ENGINES = "vllm,hf,loop"
"""The same where vLLM draws too."""

MODES = "discrete,hrpo_topk,hrpo_full"
"""Plain tokens, which latents are to be nearly as fast as, and latents of the likeliest tokens and of all."""

BY_VALUE = ("policy_gradient_head", "vocab_head", "hrpo_gate", "topk_mixture", "hrpo_gate_decode", "gaussian_reparam",
            "token_logprob", "topk_gumbel", "soft_embedding")
"""Ops in the order in which they are measured; the others follow."""

LONGEST = "policy_gradient_head"
"""Whose rival takes minutes to compile: measured without it first, and with it when the others have been."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a battery runs: `store` outlives a call, `out` is what comes back of one."""

    device: str
    out: Path
    store: Path

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def python(self) -> Path:
        """That of the environment the build made, else this one."""
        own = self.store / "venv" / "bin" / "python"
        return own if own.is_file() else Path(sys.executable)

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    @property
    def random_model(self) -> Path:
        return self.store / "models" / (MODEL if self.is_cuda else "tiny")

    @property
    def has_small_model(self) -> bool:
        return (self.store / "cache" / SMALL / "COMPLETE").is_file()

    def module(self, name: str, module: str, *words: str | Path, limit_s: float, **options) -> Step:
        return Step(name, (self.python, "-m", module, *words), limit_s, **options)


def build(at: Place) -> Iterator[Step]:
    """An environment of our own over this Python's packages, the extension in it, and the model with random weights.

    What an earlier call built of the same sources is kept, and only imported.
    """
    stamp, sources = at.store / "built", digest(at)
    is_new = not (stamp.is_file() and stamp.read_text() == sources)
    if is_new:
        stamp.unlink(missing_ok=True)
        yield from install(at)
    code = ("import pathlib, fastlatent_kernels._C, fastlatent.trainer\n"
            f"pathlib.Path({str(stamp)!r}).write_text({sources!r})")
    yield Step("imports", (at.python, "-c", code), 90)
    if at.is_cuda:  # not in the stamp: what could not be compiled will not be the next time
        yield Step("imports CUDA kernels", (at.python, "-c", "import fastlatent_kernels._cuda"), 60)
    yield from install_vllm(at)
    if is_new:
        yield at.module("doctor", "fastlatent.doctor", limit_s=90)
    if not (at.random_model / "config.json").is_file():
        yield at.module("random model", "benches.random_model", at.random_model.name, at.random_model, limit_s=180)


def pip_install(at: Place) -> tuple[str | Path, ...]:
    return (sys.executable, "-m", "pip", "--python", at.store / "venv" / "bin" / "python", "install", "--no-index", "--no-deps",
            "--quiet")


def install(at: Place) -> Iterator[Step]:
    venv, pip = at.store / "venv", pip_install(at)
    yield Step("environment", (sys.executable, "-m", "venv", "--without-pip", "--clear", venv), 60)
    link_packages(venv)
    if wheels := gpu_needs.wheels_to_install(at.store):
        yield Step("wheels", (*pip, *wheels), 120)

    def extension(name: str, cuda: str, limit_s: float, retry: Step | None = None) -> Step:
        return Step(name, (*pip, "--no-build-isolation", f"--config-settings=build-dir={at.store / 'build'}",
                           f"--config-settings=cmake.define.FASTLATENT_CUDA={cuda}", "--editable", ROOT), limit_s, retry=retry)

    if not at.is_cuda:
        yield extension("extension", "OFF", 420)
        return
    # all but the CUDA kernels, Triton's among them, can do without it
    yield extension("extension", "ON", 300, extension("extension, no CUDA", "OFF", 120))


def install_vllm(at: Place) -> Iterator[Step]:
    """Where it was carried and is not there yet. By itself: nothing but its own part is to miss it, and it may arrive later."""
    stamp, wheels = at.store / "venv" / "vllm", gpu_needs.vllm_to_install(at.store)
    names = "\n".join(file.name for file in wheels)
    if not wheels or (stamp.is_file() and stamp.read_text() == names):
        return
    yield Step("vllm", (*pip_install(at), *wheels), 150)
    # torch first: it loads what vLLM's own libraries are linked with
    libraries = "import vllm._C_stable_libtorch, vllm.cumem_allocator, vllm.vllm_flash_attn._vllm_fa3_C\n" if at.is_cuda else ""
    code = (f"import pathlib, sys, torch\nfrom vllm import LLM\nfrom fastlatent.vllm_plugin import surface\n{libraries}"
            "if gone := surface.missing('v2'):\n    sys.exit(f'vllm lacks {gone}')\n"
            f"pathlib.Path({str(stamp)!r}).write_text({names!r})\nprint(*surface.installed())")
    yield Step("vllm imports", (at.python, "-c", code), 120)


def digest(at: Place) -> str:
    """Of all that an install is made of; vLLM, which is installed after it and whenever it arrives, is no part of that."""
    names = [file.name for file in gpu_needs.wheels_to_install(at.store)]
    out = hashlib.sha256("\n".join((at.device, sys.version, str(ROOT), *names)).encode())
    for path in (ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *sorted((ROOT / "csrc").rglob("*"))):
        if path.is_file():
            out.update(path.read_bytes())
    return out.hexdigest()


def small_model(at: Place) -> Iterator[Step]:
    """Convert the model that was carried; not in the build, for its second half may arrive after that."""
    if at.is_cuda and not at.has_small_model and gpu_needs.is_here(gpu_needs.SMALL_MODEL, at.store):
        yield at.module("small model", "fastlatent.models", limit_s=180)


def link_packages(venv: Path) -> None:
    """Let a new environment see the packages of this Python, but run no hooks of editable installs among them."""
    if not (venv / "bin").is_dir():
        return  # it could not be made, and the steps that need it will say so
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text("\n".join(packages) + "\n")


def tests(at: Place) -> Iterator[Step]:
    """Every kernel against float64, in float32 and bfloat16, the noise bit for bit, and every backend at all."""
    # a file that needs what could not be built must not keep the others from running
    pytest = ("pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", "no:warnings", "--continue-on-collection-errors")
    # eight at a time: compiling Triton's kernels takes longest
    several = ("-n", "8") if at.is_cuda and importlib.util.find_spec("xdist") else ()
    if at.is_cuda:
        one_pass = "tests/kernels/test_vocab_head_cuda.py"  # where it fails, it ends all that its process does on the GPU
        yield at.module("kernels", *pytest, *several, "-m", "gpu", "tests/kernels", f"--ignore={one_pass}", limit_s=280)
        yield at.module("noise", *pytest, "tests/kernels/test_triton_support.py", limit_s=120)
        yield at.module("trainer", *pytest, "-m", "gpu", "tests/test_gpu.py", "tests/test_bench_kernels.py",
                        "tests/test_profiling.py", limit_s=200)
        yield at.module("one-pass head", *pytest, "-m", "gpu", one_pass, limit_s=100)
    else:
        yield at.module("kernels", *pytest, "tests/kernels/test_ops.py", "-k",
                        "float64 and group_advantage-reference and cpu", limit_s=120)
    yield at.module("every backend", "benches.every_kernel", "--device", at.device, limit_s=200,
                    env={} if at.is_cuda else {"TRITON_INTERPRET": "0"})


def vllm(at: Place) -> Iterator[Step]:
    """Rollouts in stock vLLM: the law in CUDA graphs, the promised rates, a run that learns, and what its scheduler does."""
    if reason := no_vllm(at):
        yield Step("vllm", (), 0, refusal=reason)
        return
    # one sleeps in a process, and an illegal address ends all that is on a GPU: two processes
    tests = ("pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", "no:warnings", "tests/test_gpu_vllm.py", "-k")
    rates = ("benches.rollout", "--out", at.results, "--ends", "equal", "--engine", VLLM_ENGINES)
    if not at.is_cuda:
        yield at.module("tests", *tests, "step and cpu", limit_s=120)
        yield at.module("tiny", *rates, "--model", at.random_model, "--mode", MODES, "--batch", "8", "--rounds", "1",
                        limit_s=240)
        yield from learn(at, "hrpo_quickstart, vllm", 240, "engine.name=vllm", "engine.kv_cache_gib=0.1")
        return
    yield from small_model(at)
    yield at.module("replay", *tests, "replay", "-m", "gpu", limit_s=180)
    # as many engines as modes in one process; where they cannot be, fewer
    long = ("--rounds", "3", "--batch")
    one = at.module(f"{MODEL}, one mode", *rates, "--model", at.random_model, "--mode", "hrpo_topk", *long, "64", limit_s=90)
    two = at.module(f"{MODEL}, two modes", *rates, "--model", at.random_model, "--mode", "discrete,hrpo_topk", *long, "64",
                    limit_s=120, retry=one)
    yield at.module(MODEL, *rates, "--model", at.random_model, "--mode", MODES, *long, "64,256", limit_s=240, retry=two)
    yield at.module("scheduler, weights, sleep", *tests, "not replay", "-m", "gpu", limit_s=150)
    yield from learn(at, "hrpo_quickstart, vllm", 120, "engine.name=vllm")
    if at.has_small_model:
        yield at.module(SMALL, *rates, "--mode", MODES, *long, "64", limit_s=90)


def no_vllm(at: Place) -> str:
    """Why the environment that the build made has no vLLM for this device; empty where it has one."""
    code = ("import importlib.util, sys\n"
            "if importlib.util.find_spec('vllm') is None:\n    print('vLLM is not here')\n    sys.exit()\n"
            "import torch\nfrom fastlatent.vllm_plugin import surface\n"
            "print(surface.no_build(torch.device(sys.argv[1])) or '')")
    return subprocess.run([at.python, "-c", code, at.device], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def train(at: Place) -> Iterator[Step]:
    """hrpo_quickstart with its reward: the small model where it was carried, else random weights and few steps."""
    yield from small_model(at)
    yield from learn(at, "hrpo_quickstart", 400, log="train.jsonl")


def learn(at: Place, name: str, limit_s: float, *words: str, log: str | None = None) -> Iterator[Step]:
    """A run of hrpo_quickstart and what came of it; its metrics are kept as `log`."""
    run = at.store / f"run-{name.rpartition(' ')[2]}"
    shutil.rmtree(run, ignore_errors=True)
    words = ("hrpo_quickstart", f"out={run}", "log.live=plain", f"model.device={at.device}", *words)
    if not (at.is_cuda and at.has_small_model):
        words += (f"model.path={at.random_model}", "num_steps=5", "num_prompts=2", "eval.num_prompts=4")
    yield at.module(name, "fastlatent.train", *words, limit_s=limit_s)
    if log and (run / "metrics.jsonl").is_file():
        shutil.copy(run / "metrics.jsonl", at.out / log)
    yield at.module(f"{name}: what it learnt", "benches.learning", run, "--out", at.results, limit_s=60)
    if at.is_cuda and at.has_small_model:
        yield Step(f"{name}: it learnt enough", (at.python, ".ci/check_learning.py", run), 60)


def kernels(at: Place) -> Iterator[Step]:
    """Each op in a process of its own: one that fails takes no other with it."""
    if not at.is_cuda:
        yield at.module("group_advantage", "benches.kernels", "--quick", "--device", "cpu", "--op", "group_advantage",
                        "--backend", "reference", "--no-compile", "--dtype", "float32", "--out", at.results, limit_s=120)
        return
    found = {path.parent.name for path in (ROOT / "kernels" / "fastlatent_kernels").glob("*/cases.py")}

    def measure(op: str, name: str, *words: str, limit_s: float, retry: Step | None = None) -> Step:
        return at.module(name, "benches.kernels", "--op", op, "--model", MODEL, "--headlines", "--device", "cuda", *words,
                         "--out", at.results, limit_s=limit_s, retry=retry)

    for op in (*BY_VALUE, *sorted(found - set(BY_VALUE))):
        # compiling the reference may take longer than there is time, or fail; ours should be measured all the same
        uncompiled = measure(op, f"{op}, nothing compiled", "--no-compile", limit_s=150 if op == LONGEST else 60)
        yield uncompiled if op == LONGEST else measure(op, op, limit_s=120, retry=uncompiled)
    yield measure(LONGEST, LONGEST, limit_s=270)


def rollout(at: Place) -> Iterator[Step]:
    if not at.is_cuda:
        yield at.module("tiny", "benches.rollout", "--model", at.random_model, "--engine", ENGINES, "--batch", "8",
                        "--rounds", "1", "--out", at.results, limit_s=240)
        return
    yield from small_model(at)
    words = ("--engine", ENGINES, "--batch", "64", "--rounds", "3", "--out", at.results)
    if at.has_small_model:
        yield at.module(SMALL, "benches.rollout", *words, limit_s=150)
    # random weights hardly ever draw an end of their own
    yield at.module(MODEL, "benches.rollout", "--model", at.random_model, "--ends", "equal", *words, limit_s=150)


def update(at: Place) -> Iterator[Step]:
    def against(name: str, rival: str, *words: str | Path, limit_s: float, retry: Step | None = None,
                module: str = "update") -> Step:
        return at.module(name, f"benches.{module}", "--against", rival, *words, "--out", at.results, limit_s=limit_s,
                         retry=retry)

    def step(name: str, *words: str | Path, limit_s: float) -> Step:
        alone = against(f"whole step, {name}, alone", "none", *words, limit_s=60, module="step")
        return against(f"whole step, {name}", "released", *words, limit_s=limit_s, retry=alone, module="step")

    if not at.is_cuda:
        yield step("tiny", "--model", at.random_model, "--batch", "8", "--rounds", "1", limit_s=120)
        yield against("tiny", "none", "--model", at.random_model, "--batch", "8", "--length", "40", "--rounds", "1",
                      limit_s=240)
        return
    yield from small_model(at)
    # 32 x 480 drawn tokens and their prompts: about 16k in one microbatch
    long = ("--model", at.random_model, "--batch", "32", "--length", "480", "--tokens-per-microbatch", "20000", "--rounds", "5")
    yield against(f"{MODEL}, 16k tokens", "none", *long, limit_s=150)
    yield against(f"{MODEL}, 16k tokens, compiled", "none", *long, "--with", "model.compile=true", limit_s=150)
    models = [(MODEL, ("--model", at.random_model)), *([(SMALL, ())] if at.has_small_model else [])]
    for name, words in models:
        yield step(name, *words, "--rounds", "3", limit_s=100)
    for name, words in reversed(models):
        alone = against(f"{name}, alone", "none", *words, "--rounds", "5", limit_s=60)
        yield against(f"{name} beside trl", "trl", *words, "--rounds", "5", limit_s=120, retry=alone)


def sanitize(at: Place) -> Iterator[Step]:
    """NVIDIA's checkers over every backend at small sizes; a machine may refuse them."""
    tool = tool_path("compute-sanitizer")
    for check in ("memcheck", "racecheck"):
        words = ("--tool", check, "--error-exitcode", "99", "--print-limit", "100")
        # torch's caching would hide what lies outside of a tensor inside of a larger block
        words += (at.python, "-m", "benches.every_kernel", "--device", at.device, "--largest", str(10**6))
        yield Step(check, (tool, *words), 260, env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, log="sanitize.txt", is_tool=True)


def tool_path(name: str) -> str:
    """Of a CUDA tool that need not be on the PATH."""
    return shutil.which(name) or next(
        (str(path) for path in sorted(Path("/usr/local").glob(f"cuda*/bin/{name}"))), name)


PARTS: dict[str, Callable[[Place], Iterator[Step]]] = {
    "build": build, "tests": tests, "train": train, "vllm": vllm, "kernels": kernels, "rollout": rollout, "update": update,
    "sanitize": sanitize}
"""In the order of value; by the time of vllm all of the small model has arrived."""


def is_built(store: Path) -> bool:
    """Whether there is something to run: what an earlier call installed, or the project in this Python itself."""
    return (store / "venv" / "bin" / "python").is_file() or importlib.util.find_spec("fastlatent_kernels") is not None


def has_gpu() -> bool:
    """Whether torch sees one; asked in a process of its own, which imports torch."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
