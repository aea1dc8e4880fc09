"""`.ci/run` fails where it must, ends although a test left a process behind, and closes with pytest's own last line.

`make` is real; what it makes is played by a Makefile that prints what pytest or training would and exits as told.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLOSING = "=========== 3 passed, 1 skipped in 1.23s (0:00:01) ============"
LEARNS = [0.1] * 15 + [0.9] * 5
MAKEFILE = """
test:
\t@echo "make: running the tests with $$PYTEST_ADDOPTS"
\t@sleep 300 & echo $$! > left-behind
\t@if read line; then echo "read $$line"; fi
\t@echo "{closing}"
\t@exit {tests}
train:
\t@mkdir -p $(patsubst out=%,%,$(filter out=%,$(ARGS)))
\t@cp rewards.jsonl $(patsubst out=%,%,$(filter out=%,$(ARGS)))/metrics.jsonl
\t@echo "trained with $(ARGS)"
\t@exit {train}
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with the real script, where `ci(...)` runs it."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    yield tmp_path
    if (tmp_path / "left-behind").exists():
        os.kill(int((tmp_path / "left-behind").read_text()), signal.SIGKILL)


def ci(checkout: Path, *, tests: int = 0, train: int = 0, rewards=LEARNS,
       closing: str = CLOSING) -> subprocess.CompletedProcess:
    (checkout / "Makefile").write_text(MAKEFILE.format(tests=tests, train=train, closing=closing))
    (checkout / "rewards.jsonl").write_text("".join(
        json.dumps({"step": step, "reward": reward}) + "\n" for step, reward in enumerate(rewards, start=1)))
    # not those of a make that runs these tests: it would tell of folders it enters
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(["bash", ".ci/run"], cwd=checkout, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=200)


def test_everything_that_holds_is_exit_code_0_and_the_closing_line(checkout):
    done = ci(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "-p forbid_skips" in lines[0] and lines[-1] == CLOSING and lines.count(CLOSING) == 2
    (trained,) = [line for line in lines if line.startswith("trained with")]
    assert {"seed=0", "num_steps=20", "log.live=plain"} <= set(trained.split())
    assert "mean reward 0.100 in the first three steps, 0.900 in the last five (wanted 0.3 more)" in lines


def test_failing_tests_fail_it_and_nothing_is_trained(checkout):
    failed = "=========== 1 failed, 2 passed in 61.20s (0:01:01) ============"
    done = ci(checkout, tests=2, closing=failed)
    assert done.returncode == 2 and done.stdout.splitlines()[-1] == failed
    assert "trained" not in done.stdout


def test_tests_that_never_ran_fail_it(checkout):
    done = ci(checkout, tests=2, closing="make: no C++ compiler")
    assert done.returncode == 2 and done.stdout.splitlines()[-1] == "the tests never came to a close"


@pytest.mark.parametrize("fault", [
    {"train": 2},  # training ended with an error, whatever it logged before
    {"rewards": [0.1] * 15 + [0.4] * 5},  # it learnt, too little
    {"rewards": [0.1] * 14 + [0.9] * 5},  # a step is missing
])
def test_training_that_fails_or_does_not_learn_fails_it(checkout, fault):
    done = ci(checkout, **fault)
    assert done.returncode != 0 and done.stdout.splitlines()[-1] == CLOSING
