"""vLLM's second model runner, the one for GPUs, with our model state: run on a CPU with its kernels in Triton's interpreter."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_replay import FP32_TOLERANCE

# looked for, not imported: vllm changes the process that imports it, and other tests share this one
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="the CPU build of vllm is not installed: make vllm")


@functools.cache
def story() -> dict:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parent / "kernels")])
    done = subprocess.run([sys.executable, here / "vllm_v2_story.py"], capture_output=True, text=True, timeout=600,
                          cwd=here.parent, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_the_second_runner_scheduled_as_on_a_gpu():
    assert story()["runner"].startswith("vllm.v1.worker.cpu.model_runner.")
    assert story()["scheduler"] == "AsyncScheduler" and story()["asleep"] is True


# `reloaded` follows requests given up in the middle, and a sleep; `fed back` are latents drawn around hidden states
@pytest.mark.parametrize("part", ["forced", "reloaded", "sampled", "fed back"])
def test_replay_and_the_tokens_of_the_hf_engine(part):
    found = story()[part]
    assert found["same_tokens"] and found["same_latents"]
    assert found["gap"] <= FP32_TOLERANCE < found["gap_without_latents"]
    assert found["free_slots"] == 4
    assert found["version"] == (1 if part == "reloaded" else 0)


def test_inputs_are_where_a_cuda_graph_was_told():
    for part in ("forced", "reloaded", "sampled", "fed back"):
        assert story()[part]["addresses"] == [story()[part]["captured"]]


def test_nothing_of_ours_waits_for_the_device():
    """In no step, nor when a completion ends: asynchronous scheduling stays as it is."""
    for part in ("forced", "reloaded", "sampled", "fed back"):
        assert story()[part]["own_operators"] > 1000 and story()[part]["num_ended"] > 0
        assert story()[part]["waits"] == []


def test_preempted_requests_go_on_where_they_were():
    assert max(story()["forced"]["preempted"]) > 3


def test_when_vllm_shuts_down_nothing_of_a_closed_engine_is_left():
    """Else its pools of a GPU's memory would be given up with that in them, and serve no other engine of this process."""
    assert story()["left"] == [] and story()["kept"] > 30
