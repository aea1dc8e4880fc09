"""Starting stock vLLM: the folder it reads a model's configuration from, and what is said where it does not start."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier

import pytest
import tiny
from test_vllm_engine import policy, start
from transformers import AutoConfig

from fastlatent.errors import UserError
from fastlatent.vllm_plugin.config_folder import config_folder

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="the CPU build of vllm is not installed: make vllm")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FASTLATENT_CACHE", str(tmp_path))
    return tmp_path


CONFIG = tiny.model().config


def test_the_same_configuration_is_always_in_the_same_folder(cache):
    folders = [config_folder(tiny.model(seed=seed).config) for seed in (0, 1)]
    assert folders[0] == folders[1] == config_folder(AutoConfig.from_pretrained(folders[0]))
    assert folders[0].parent == cache / "vllm"
    other = config_folder(tiny.model(num_heads=2).config)
    assert other != folders[0] and set((cache / "vllm").iterdir()) == {other, folders[0]}
    for folder, num_heads in ((folders[0], 4), (other, 2)):
        assert AutoConfig.from_pretrained(folder).num_attention_heads == num_heads
        assert [file.name for file in folder.iterdir()] == ["config.json"]


def test_starts_at_the_same_moment_read_it_whole(cache):
    lengths, together = range(1000, 1100), Barrier(4, timeout=20)

    def keep(number: int) -> list[Path]:
        config, folders = copy.deepcopy(CONFIG), []
        for config.max_position_embeddings in lengths:
            together.wait()
            folders.append(config_folder(config))
            written = json.loads((folders[-1] / "config.json").read_text())
            assert written["max_position_embeddings"] == config.max_position_embeddings
        return folders

    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(keep, range(4)))
    assert kept == [kept[0]] * 4 and set((cache / "vllm").iterdir()) == set(kept[0]) and len(set(kept[0])) == len(lengths)


def test_a_damaged_file_is_written_anew_and_a_whole_one_left_alone():
    file = config_folder(CONFIG) / "config.json"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert config_folder(CONFIG) == file.parent and file.read_bytes() == whole
    written = file.stat()
    assert config_folder(CONFIG) == file.parent and file.stat().st_ino == written.st_ino


def test_a_cache_that_cannot_be_written_is_one_sentence(cache):
    (cache / "vllm").touch()
    reason = "engine: the model's configuration for vllm cannot be kept in .*/vllm .*FASTLATENT_CACHE"
    with pytest.raises(UserError, match=reason) as raised:
        config_folder(CONFIG)
    assert "\n" not in str(raised.value)


@needs_vllm
def test_what_vllm_compiles_is_kept_under_the_same_hash_by_every_start():
    first, second, other = (start(policy(), max_batch_tokens=n).engine.vllm_config for n in (32, 32, 64))
    assert first.model_config.model == second.model_config.model
    assert first.compute_hash() == second.compute_hash() != other.compute_hash()


def claimed():
    """In the words of vLLM's GPU worker."""
    free = 1
    assert free >= 2, "Error in memory profiling. Initial free memory 1.0 GiB, current free memory 2.0 GiB.\nThis happens when"


def silent():
    raise AssertionError


def typed():
    raise OSError("no such device")


@needs_vllm
@pytest.mark.parametrize("trip, said", [
    (claimed, r"AssertionError: Error in memory profiling. Initial free memory 1.0 GiB, current free memory 2.0 GiB."),
    (silent, rf"AssertionError in {__file__}:\d+, raise AssertionError"),
    (typed, "OSError: no such device")])
def test_whatever_stops_it_is_one_sentence_with_its_cause(trip, said, monkeypatch):
    import vllm.v1.worker.cpu_worker as cpu_worker

    monkeypatch.setattr(cpu_worker.CPUWorker, "determine_available_memory", lambda worker: trip())
    reason = rf"^engine: vllm did not start: {said} \(memory: engine.kv_.* or use engine.name=hf$"
    with pytest.raises(UserError, match=reason) as raised:
        start(policy())
    assert isinstance(raised.value.__cause__, AssertionError | OSError) and raised.value.__cause__.__traceback__


@needs_vllm
def test_a_gpu_attends_in_all_of_float32(tmp_path, monkeypatch):
    """vLLM's attention for float32 leaves it to Triton how to multiply, whose own choice keeps 10 bits."""
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    rounds = {}
    for name in ("before", "after"):
        environ = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, Path(__file__).with_name("float32_products.py")], capture_output=True, text=True,
                              env=environ, timeout=120)
        rounds[name] = done.stdout.strip()
        start(policy())
    assert rounds == {"before": "True", "after": "False"}, done.stderr
