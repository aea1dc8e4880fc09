import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fastlatent.checkpoint import (MARKER, find, latest, load, load_optimizer, optimizer_tensors, save, sweep)
from fastlatent.errors import UserError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def small(step=1):
    return {"weights": {"w": torch.full((3, 4), float(step))}, "optimizer": {"w/step": torch.tensor(float(step))}}


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(5, 3) * 9).to(dtype) for dtype in DTYPES}
    tensors |= {"nan": torch.tensor([float("nan"), -0.0, 5e-324], dtype=torch.float64), "scalar": torch.tensor(0.1),
                "strided": torch.arange(6.0).view(2, 3).t(), "empty": torch.empty(0, 4)}
    state = {"adamw": {"values": {}}, "best_accuracy": 0.1 + 0.2, "best_step": None, "lr": [5e-324, 1e-6]}
    path = save(tmp_path, 20, {"weights": tensors, "optimizer": {}}, state)
    back = load(path)
    assert path == tmp_path / "checkpoints" / "step-000020" == back.path
    assert (back.step, back.state, set(back.tensors)) == (20, state, {"weights", "optimizer"})
    assert back.tensors["optimizer"] == {} and set(back.tensors["weights"]) == set(tensors)
    for name, tensor in tensors.items():
        other = back.tensors["weights"][name]
        assert other.dtype == tensor.dtype and other.shape == tensor.shape, name
        assert torch.equal(bits(other), bits(tensor)), name


def test_the_marker_lists_every_file_with_its_size_and_hash(tmp_path):
    path = save(tmp_path, 1, small(), {})
    files = json.loads((path / MARKER).read_text())["files"]
    assert set(files) == {"weights.safetensors", "optimizer.safetensors", "state.json"}
    assert set(files) == {p.name for p in path.iterdir()} - {MARKER}
    for name, entry in files.items():
        content = (path / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def test_the_newest_and_the_protected_are_kept(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, small(step), {}, keep=2, protect={3})
    assert list(find(tmp_path)) == [3, 6, 7]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-000003", "step-000006", "step-000007"}
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step-000007"


def test_steps_are_ordered_as_numbers_and_none_is_fine(tmp_path):
    assert latest(tmp_path) is None and find(tmp_path) == {}
    for step in (999999, 1000000, 9):
        save(tmp_path, step, small(), {}, keep=3)
    assert load(latest(tmp_path)).step == 1000000


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 4, small(1), {"n": 1})
    save(tmp_path, 4, small(2), {"n": 2})
    assert load(latest(tmp_path)).state == {"n": 2}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]


# ---- what is refused ----------------------------------------------------------------------------------------------


def flip_byte(path):
    content = bytearray((path / "weights.safetensors").read_bytes())
    content[-5] ^= 1
    (path / "weights.safetensors").write_bytes(content)


def truncate(path):
    os.truncate(path / "weights.safetensors", (path / "weights.safetensors").stat().st_size - 1)


def rewrite(name, content):
    """Another content, with a marker that agrees with it."""
    def change(path):
        (path / name).write_bytes(content)
        marker = json.loads((path / MARKER).read_text())
        marker["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        (path / MARKER).write_text(json.dumps(marker))
    return change


def edit_marker(**changes):
    def change(path):
        (path / MARKER).write_text(json.dumps(json.loads((path / MARKER).read_text()) | changes))
    return change


@pytest.mark.parametrize("damage, file, reason", [
    (flip_byte, "weights.safetensors", "SHA-256"),
    (truncate, "weights.safetensors", "truncated"),
    (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors", "missing"),
    (lambda path: (path / "state.json").unlink(), "state.json", "missing"),
    (lambda path: (path / MARKER).unlink(), MARKER, "never finished"),
    (lambda path: (path / MARKER).write_text("{"), MARKER, "not the marker"),
    (lambda path: (path / MARKER).write_text("[]"), MARKER, "not the marker"),
    (lambda path: (path / MARKER).write_bytes(b"\xff\xfe"), MARKER, "not the marker"),
    (edit_marker(format="fastlatent-checkpoint-99"), MARKER, "'fastlatent-checkpoint-99'"),
    (edit_marker(files={"../../state.json": {"sha256": "", "size": 0}}), MARKER, "list of files"),
    (edit_marker(files=7), MARKER, "not the marker"),
    (rewrite("weights.safetensors", b"\x80\x04K\x01."), "weights.safetensors", "safetensors"),
    (rewrite("state.json", b"step: 1"), "state.json", "JSON"),
    (shutil.rmtree, "step-000001", "no such"),
])
def test_a_damaged_checkpoint_is_refused_with_file_and_reason(tmp_path, damage, file, reason):
    path = save(tmp_path, 1, small(), {"n": 1})
    assert load(path).step == 1
    damage(path)
    with pytest.raises(UserError) as caught:
        load(path)
    assert file in str(caught.value) and reason in str(caught.value)


def test_a_foreign_folder_is_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no fastlatent checkpoint"):
        load(tmp_path)


# ---- interruption -------------------------------------------------------------------------------------------------


def test_sweep_publishes_what_was_finished_and_deletes_what_was_not(tmp_path):
    root = tmp_path / "checkpoints"
    save(tmp_path, 1, small(1), {}, keep=9)
    save(tmp_path, 2, small(2), {}, keep=9).rename(root / ".tmp-finished")
    shutil.copytree(root / "step-000001", root / ".tmp-replaced")
    shutil.copytree(root / "step-000001", root / ".tmp-unfinished")
    (root / ".tmp-unfinished" / MARKER).unlink()
    shutil.copytree(root / "step-000001", root / ".old-000000")
    sweep(tmp_path)
    assert sorted(p.name for p in root.iterdir()) == ["step-000001", "step-000002"]
    assert load(latest(tmp_path)).tensors["weights"]["w"][0, 0] == 2


def test_killed_at_any_instant_the_newest_checkpoint_is_whole(tmp_path):
    """20 SIGKILLs, many of them inside a save; the child saves every step twice, the second replacing the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child must not need the parent's thread pool
    rng, num_inside, newest = random.Random(0), 0, 0
    try:
        start = time.perf_counter()
        save(tmp_path / "timed", 1, {"weights": tensors_of(1)}, {})
        save_s = time.perf_counter() - start
        for trial in range(20):
            child = os.fork()
            if not child:
                save_for_ever(tmp_path, newest + 1)
            if trial % 3 == 0:
                wait_until(lambda: max(find(tmp_path), default=0) > newest)
            wait_until(lambda: any((tmp_path / "checkpoints").glob(".tmp-*")))
            time.sleep(rng.uniform(0, save_s))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            num_inside += any((tmp_path / "checkpoints").glob(".tmp-*"))
            before = list(find(tmp_path))
            sweep(tmp_path)
            assert set(before) <= set(find(tmp_path)) and not any((tmp_path / "checkpoints").glob(".*"))
            for step, path in find(tmp_path).items():
                checkpoint = load(path)
                assert checkpoint.step == checkpoint.state["step"] == step
                assert all((t == step).all() for t in checkpoint.tensors["weights"].values())
            last = max(find(tmp_path), default=0)
            assert last >= newest
            newest = last
    finally:
        torch.set_num_threads(threads)
    assert newest >= 7 and num_inside >= 8


def tensors_of(step: int):
    return {str(i): torch.full((20_000,), float(step)) for i in range(20)}


def save_for_ever(folder: Path, first: int):
    try:
        for step in range(first, first + 10_000):
            for attempt in range(2):
                save(folder, step, {"weights": tensors_of(step)}, {"step": step, "attempt": attempt}, keep=2)
    finally:
        os._exit(1)


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the child saves nothing"


# ---- optimizer state ----------------------------------------------------------------------------------------------


def model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 1)).to(dtype)


def adamw(net, **options):
    weights, rest = [p for p in net.parameters() if p.dim() > 1], [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": weights, "lr": 0.03, "weight_decay": 0.1}, {"params": rest, "lr": 0.01}]
    return torch.optim.AdamW(groups, **options)


def names(net):
    named = dict(net.named_parameters())
    return [n for n, p in named.items() if p.dim() > 1] + [n for n, p in named.items() if p.dim() == 1]


def take(net, optimizer, steps):
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path, dtype, options):
    straight = model(dtype)
    take(straight, adamw(straight, **options), range(7))

    first = model(dtype)
    optimizer = adamw(first, **options)
    take(first, optimizer, range(4))
    tensors, state = optimizer_tensors(optimizer, names(first))
    path = save(tmp_path, 4, {"weights": dict(first.state_dict()), "optimizer": tensors}, {"adamw": state})

    second, back = model(dtype), load(path)
    second.load_state_dict(back.tensors["weights"])
    optimizer = adamw(second, **options)
    load_optimizer(optimizer, names(second), back.tensors["optimizer"], back.state["adamw"])
    take(second, optimizer, range(4, 7))

    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(straight.parameters(), second.parameters(), strict=True))
    take(first, adamw(first, **options), range(4, 7))  # the control: without its state an optimizer goes elsewhere
    assert not all(torch.equal(a, b) for a, b in zip(straight.parameters(), first.parameters(), strict=True))


def test_optimizer_state_is_named_after_parameters_and_independent_of_the_live_one(tmp_path):
    net = model(torch.float32)
    optimizer = adamw(net)
    take(net, optimizer, range(2))
    tensors, state = optimizer_tensors(optimizer, names(net))
    assert set(tensors) == {f"{n}/{k}" for n in names(net) for k in ("exp_avg", "exp_avg_sq", "step")}
    for name, parameter in net.named_parameters():
        assert torch.equal(tensors[f"{name}/exp_avg"], optimizer.state[parameter]["exp_avg"])
    other = adamw(twin := model(torch.float32))
    load_optimizer(other, names(twin), tensors, state)
    kept = tensors["0.weight/exp_avg"].clone()
    take(twin, other, range(1))
    assert torch.equal(tensors["0.weight/exp_avg"], kept)


def test_optimizer_state_of_something_else_is_refused():
    net = model(torch.float32)
    optimizer = adamw(net)
    take(net, optimizer, range(1))
    tensors, state = optimizer_tensors(optimizer, names(net))
    with pytest.raises(UserError, match="AdamW, wanted SGD"):
        load_optimizer(torch.optim.SGD(net.parameters(), lr=1.0), names(net), tensors, state)
    with pytest.raises(UserError, match="'9.weight', which is not trained in this model"):
        load_optimizer(optimizer, names(net), tensors | {"9.weight/step": torch.ones(())}, state)
    with pytest.raises(UserError, match=r"0.weight/exp_avg has shape \[2\], wanted \[5, 6\]"):
        load_optimizer(optimizer, names(net), tensors | {"0.weight/exp_avg": torch.ones(2)}, state)
