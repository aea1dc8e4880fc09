"""An interrupted run ends as if nothing had happened: same tokens, same weights, same metrics, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open

from fastlatent import checkpoint, train
from fastlatent.cli import run_command
from fastlatent.config import load_config
from fastlatent.guard import TrainingDiverged
from fastlatent.held_out import HeldOut
from fastlatent.interrupt import Interrupted, Interrupts
from fastlatent.log import read
from fastlatent.metrics import is_reproducible
from fastlatent.optim import Optimizer
from fastlatent.runfolder import RunFolder
from fastlatent.trainer import Trainer
from fastlatent.types import Batch, Varlen

# many small steps, each with four optimizer steps, so that moments and schedule matter
WORDS = [
    "hrpo_quickstart", "data.name=jsonl", "data.train=rows.jsonl", "data.held_out_size=4", "num_prompts=2",
    "group_size=4", "sampling.max_new_tokens=16", "thinking.max_tokens=8", "answer.max_tokens=3", "optim.lr=1e-3",
    "optim.schedule=cosine", "objective.num_epochs=2", "objective.num_minibatches=2", "eval.num_prompts=3",
    "eval.num_samples=1", "eval.every=3", "eval.ablations=false", "checkpoint.every=1", "log.samples=99",
    "log.live=quiet", "rewards=[{name: checksum.checksum}]"]
LORA = ["model.lora={r: 4, alpha: 8, dropout: 0.1}", "sampling.top_k=20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.working_folder(tmp_path_factory.mktemp("resume"))


@pytest.fixture
def inside(folder, monkeypatch):
    enter(monkeypatch, folder)


def enter(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.chdir(folder)
    patch.syspath_prepend(folder)
    patch.setattr("fastlatent.trainer.write_report", lambda run: None)  # seconds of drawing, not the subject here


def words(out: str, num_steps: int, *more: str) -> list[str]:
    """The command that starts the run in `out`, or goes on with it."""
    again = ["resume=auto"] if (Path(out) / "config.yaml").exists() else []
    return [*WORDS, "model.path=model", f"out={out}", f"num_steps={num_steps}", *again, *more]


def trainer(out: str, num_steps: int, *more: str) -> Trainer:
    return Trainer(load_config(*words(out, num_steps, *more)))


def outcome(path: Path) -> dict:
    """Everything of a finished run that is a function of configuration and seed."""
    last = checkpoint.load(checkpoint.latest(path))
    tensors = {f"{group}/{name}": tensor for group, named in last.tensors.items() for name, tensor in named.items()}
    state = {name: value for name, value in last.state.items() if name != "logs"}
    rows = read(path / "metrics.jsonl")
    metrics = [{name: value for name, value in row.items() if is_reproducible(name)} for row in rows]
    return {"metrics": metrics, "samples": read(path / "samples.jsonl"), "state": state, "tensors": tensors,
            "checkpoints": list(checkpoint.find(path))}


def assert_same(ours: dict, theirs: dict) -> None:
    for name in ("metrics", "samples", "state", "checkpoints"):
        assert ours[name] == theirs[name], name
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    for name, tensor in ours["tensors"].items():
        assert torch.equal(tensor, theirs["tensors"][name]), name


# ---- killed ---------------------------------------------------------------------------------------------------------


def session(folder: Path, argv: list[str]) -> None:
    """A training command in a process forked from one that has imported everything already."""
    session_folder(folder)
    run_command(train.main, argv)


def session_folder(folder: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests were started under nohup
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.path.insert(0, str(folder))


@pytest.fixture(scope="module")
def start(folder):
    """Start a session in a process of its own; imports are paid once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastlatent.trainer", "test_resume"])

    def start_(argv: list[str], target=session, *args):
        process = context.Process(target=target, args=(folder, argv, *args))
        process.start()
        return process

    warm = context.Process(target=session_folder, args=(folder,))
    warm.start()
    assert finish(warm) == 0  # the server has started and imported
    return start_


def finish(process) -> int:
    process.join(300)
    assert process.exitcode is not None, "the session hangs"
    return process.exitcode


def temporaries(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").glob(".tmp-*")}


def newest(run: Path) -> int:
    return max(checkpoint.find(run), default=0)


def kill_inside_save(process, run: Path, num_saves: int, delay_s: float) -> bool:
    """SIGKILL soon after a save has begun, `num_saves` saves after those there are; whether it had not ended."""
    wanted, deadline = newest(run) + num_saves, time.monotonic() + 300
    before = temporaries(run)
    while newest(run) < wanted or temporaries(run) <= before:
        assert process.is_alive() and time.monotonic() < deadline, "the session saves nothing"
        time.sleep(0.0002)
    time.sleep(delay_s)
    process.kill()
    finish(process)
    return not temporaries(run) <= before


def kill_after(process, run: Path, delay_s: float) -> None:
    """SIGKILL after so many seconds, or two steps where that is earlier: the run must not end before its last kill."""
    most, until = newest(run) + 2, time.monotonic() + delay_s
    while time.monotonic() < until and newest(run) < most:
        time.sleep(0.001)
    process.kill()
    finish(process)


def test_a_run_killed_twenty_times_ends_as_if_nothing_had_happened(folder, start, monkeypatch):
    monkeypatch.chdir(folder)
    num_steps, began = 50, time.monotonic()
    first = start(words("straight", num_steps))
    while not read(folder / "straight" / "metrics.jsonl"):
        assert first.is_alive()
        time.sleep(0.001)
    start_s = time.monotonic() - began
    assert finish(first) == 0

    rng, num_inside, run = random.Random(0), 0, folder / "chain"
    for attempt in range(20):
        process = start(words("chain", num_steps))
        if attempt % 5 < 3:
            num_inside += kill_inside_save(process, run, rng.randrange(3), rng.uniform(0, 0.003))
        else:
            kill_after(process, run, rng.uniform(0, 1.5 * start_s))
        assert process.exitcode == -signal.SIGKILL
    assert num_inside >= 8
    assert finish(start(words("chain", num_steps))) == 0
    straight = outcome(folder / "straight")
    assert_same(outcome(run), straight)
    assert_learnt(straight)


def assert_learnt(result: dict) -> None:
    """Or all of this would compare runs in which nothing moves."""
    steps = [row for row in result["metrics"] if "reward" in row]
    assert sum(row["grad_norm"] > 0 for row in steps) > len(steps) / 2
    assert len({row["learning_rate"] for row in steps}) > len(steps) / 2
    assert len({tuple(row["token_ids"]) for row in result["samples"]}) > len(result["samples"]) / 2


def test_adapters_with_dropout_go_on_after_a_kill(folder, start, monkeypatch):
    monkeypatch.chdir(folder)
    assert finish(start(words("lora-straight", 5, *LORA))) == 0
    process = start(words("lora", 5, *LORA))
    while newest(folder / "lora") < 2:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    finish(process)
    assert finish(start(words("lora", 5, *LORA))) == 0
    straight = outcome(folder / "lora-straight")
    assert_same(outcome(folder / "lora"), straight)
    assert_learnt(straight)


# ---- asked to stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_process_with_exit_code_0_and_a_checkpoint(folder, start, monkeypatch, number):
    monkeypatch.chdir(folder)
    run = folder / f"asked-{number}"
    process = start(words(run.name, 10_000))
    while not checkpoint.find(run):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert finish(process) == 0
    assert newest(run) == max(row["step"] for row in read(run / "metrics.jsonl"))
    assert not temporaries(run)


def on_terminal(folder: Path, argv: list[str], path: str) -> None:
    """A session that owns a terminal, as the shell's foreground command does."""
    os.setsid()
    terminal = os.open(path, os.O_RDWR)  # the first that a session opens becomes its own
    for descriptor in (1, 2):
        os.dup2(terminal, descriptor)
    sys.stdout, sys.__stderr__ = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ["TERM"] = "xterm"
    session(folder, argv)


@pytest.mark.parametrize("live", ["auto", "plain"])
def test_a_closed_terminal_ends_the_process_with_exit_code_0_and_a_checkpoint(folder, start, monkeypatch, live):
    monkeypatch.chdir(folder)
    run, (ours, theirs) = folder / f"closed-{live}", os.openpty()
    process = start(words(run.name, 10_000, f"log.live={live}"), on_terminal, os.ttyname(theirs))
    with open(ours, "rb", buffering=0) as terminal:
        seen = b""
        while b"step 2/" not in seen:
            seen = seen[-10:] + terminal.read(10_000)
        os.close(theirs)
    assert finish(process) == 0
    assert newest(run) == max(row["step"] for row in read(run / "metrics.jsonl")) > 1


def into_pipe(folder: Path, argv: list[str], path: str) -> None:
    os.dup2(os.open(folder / path, os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False)
    session(folder, argv)


def test_a_reader_that_has_seen_enough_does_not_end_the_run(folder, start, monkeypatch):
    """As in `python -m fastlatent.train ... | head -1`."""
    monkeypatch.chdir(folder)
    os.mkfifo("pipe")
    process = start(words("read", 3, "log.live=plain"), into_pipe, "pipe")
    with open("pipe") as reader:
        assert "on engine hf" in reader.readline()
    assert finish(process) == 0 and newest(folder / "read") == 3


def test_hanging_up_comes_twice_and_is_heard_unless_it_is_ignored():
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted):
            with interrupts.shielded():
                os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)  # of the kernel, when the shell has sent its own
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def signal_at(monkeypatch, owner, name: str, call: int, is_after: bool) -> list:
    """Send ourselves a SIGTERM right before or after the given call of a method; returns where calls are counted."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and not is_after:
            os.kill(os.getpid(), signal.SIGTERM)
        result = original(*args, **kwargs)
        if len(calls) == call and is_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(owner, name, wrapped)
    return calls


@pytest.fixture(scope="module")
def uninterrupted(folder):
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        result = outcome(trainer("uninterrupted", 4).run())
    assert_learnt(result)
    return result


# every step has four optimizer steps: the 6th is in the middle of step 2, the 8th is its last
@pytest.mark.parametrize("owner, name, call, when, left_at", [
    (Trainer, "_collect", 2, "before", 1),
    (Optimizer, "clip", 5, "after", 1),
    (Optimizer, "step", 5, "before", 2),
    (Optimizer, "step", 6, "after", 2),
    (Optimizer, "step", 8, "after", 2),
    (Trainer, "_sync_weights", 5, "before", 2),
    (RunFolder, "log", 3, "after", 2),
    (HeldOut, "measure", 2, "before", 3),
    (Trainer, "_save", 2, "before", 2),
    (Trainer, "_save", 2, "after", 2),
])
def test_a_signal_at_any_place_of_a_step_leaves_a_whole_step(
        inside, uninterrupted, monkeypatch, owner, name, call, when, left_at):
    out = f"signal-{name}-{call}-{when}"
    with monkeypatch.context() as patch:
        calls = signal_at(patch, owner, name, call, is_after=when == "after")
        path = trainer(out, 4).run()
        assert len(calls) >= call
    assert newest(path) == left_at
    assert [row["step"] for row in read(path / "metrics.jsonl") if "reward" in row] == list(range(1, newest(path) + 1))
    assert_same(outcome(trainer(out, 4).run()), uninterrupted)


def test_an_interrupted_run_has_its_report(inside, monkeypatch):
    drawn = []
    monkeypatch.setattr("fastlatent.trainer.write_report", lambda run: drawn.append((run, newest(run))))
    signal_at(monkeypatch, Trainer, "_collect", 2, is_after=False)
    path = trainer("reported", 4).run()
    assert drawn == [(path, 1)]  # what can be lost is saved first


def test_the_words_an_interrupted_run_leaves_are_enough_to_go_on(inside, uninterrupted, monkeypatch, capsys):
    signal_at(monkeypatch, Trainer, "_collect", 2, is_after=False)
    trainer("told", 4).run()
    said = capsys.readouterr().out.rpartition("go on with ")[2].split()
    assert said == ["told/config.yaml", "out=told", "resume=auto"]
    assert_same(outcome(Trainer(load_config(*said)).run()), uninterrupted)


def test_a_step_is_saved_once_whatever_asks_for_it(inside, monkeypatch):
    """The third is one to save, the best so far and the last."""
    save, saved = RunFolder.save, []

    def watched(self, step, *args, **kwargs):
        saved.append(step)
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(RunFolder, "save", watched)
    trainer("once", 3).run()
    assert saved == [1, 2, 3]


def test_an_interruption_after_the_last_step_leaves_nothing_twice_in_the_log(inside, monkeypatch):
    def interrupted(run):
        monkeypatch.setattr("fastlatent.trainer.write_report", lambda run: None)
        os.kill(os.getpid(), signal.SIGTERM)

    straight = trainer("end-straight", 2, "eval.ablations=true").run()
    monkeypatch.setattr("fastlatent.trainer.write_report", interrupted)
    trainer("end", 2, "eval.ablations=true").run()
    again = trainer("end", 2, "eval.ablations=true").run()
    assert_same(outcome(again), outcome(straight))
    assert sum("eval/accuracy_latents_off" in row for row in read(again / "metrics.jsonl")) == 2  # before and after training


# ---- what is not finite ---------------------------------------------------------------------------------------------


def poison(monkeypatch, steps: set[int], minibatch: int) -> dict:
    """Make the loss of one minibatch of these steps infinite; returns the weights before and after each step."""
    weights, calls = {}, []
    original = Trainer._train_step

    def step(self, view, interrupts):
        now = self.step + 1
        calls.clear()
        weights[now] = [{name: p.detach().clone() for name, p in self.policy.trainable().items()}]
        loss = self.policy.method.loss

        def poisoned(policy, batch, temperature, objective):
            calls.append(now)
            if now in steps and len(calls) % 2 == minibatch:
                batch.advantage_A = torch.full_like(batch.advantage_A, torch.inf)
            return loss(policy, batch, temperature, objective)

        monkeypatch.setattr(self.policy.method, "loss", poisoned)
        try:
            original(self, view, interrupts)
        finally:
            monkeypatch.setattr(self.policy.method, "loss", loss)
            weights[now].append({name: p.detach().clone() for name, p in self.policy.trainable().items()})

    monkeypatch.setattr(Trainer, "_train_step", step)
    return weights


def batches_of(path: Path, device: torch.device) -> list[Batch]:
    """The microbatches of a reproduction file."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    out = []
    for index in sorted({name.partition(".")[0] for name in tensors}, key=int):
        mine = {name.partition(".")[2]: value for name, value in tensors.items() if name.partition(".")[0] == index}
        layout = {name.removeprefix("varlen."): value for name, value in mine.items() if name.startswith("varlen.")}
        record = {name.removeprefix("record."): value for name, value in mine.items() if name.startswith("record.")}
        plain = {name: value for name, value in mine.items() if "." not in name}
        where = Varlen(max_seqlen=layout["unpack_SL"].shape[1], **layout)
        out.append(Batch(record_T=record or None, varlen=where, **plain).to(device))
    return out


def test_a_step_that_is_not_finite_is_skipped_counted_and_written_down(inside, monkeypatch):
    weights = poison(monkeypatch, {2}, minibatch=1)
    run = trainer("poisoned", 3, "objective.num_epochs=1", "objective.num_minibatches=1")
    path = run.run()
    rows = [row for row in read(path / "metrics.jsonl") if "reward" in row]
    assert [row["guard/skipped_steps"] for row in rows] == [0, 1, 1]
    assert all(torch.equal(tensor, weights[2][1][name]) for name, tensor in weights[2][0].items())
    for step in (1, 3):
        assert not all(torch.equal(tensor, weights[step][1][name]) for name, tensor in weights[step][0].items())
    assert [p.name for p in path.glob("bad-step-*")] == ["bad-step-000002.safetensors"]
    # from the file and the weights of that step alone the loss can be computed again
    with torch.no_grad():
        for name, parameter in run.policy.trainable().items():
            parameter.copy_(weights[2][0][name])
        batches = batches_of(path / "bad-step-000002.safetensors", run.policy.device)
        losses = [run.policy.method.loss(run.policy, batch, run.update.temperature, run.config.objective).value
                  for batch in batches]
    assert losses and not all(loss.isfinite() for loss in losses)


def test_the_minibatch_that_was_not_finite_is_the_one_written_down(inside, monkeypatch):
    weights = poison(monkeypatch, {2}, minibatch=0)
    path = trainer("half-poisoned", 2, "objective.num_epochs=1").run()
    assert not all(torch.equal(tensor, weights[2][1][name]) for name, tensor in weights[2][0].items())
    batches = batches_of(path / "bad-step-000002.safetensors", torch.device("cpu"))
    assert batches and all(batch.advantage_A.isinf().all() for batch in batches)


def test_steps_that_stay_not_finite_end_the_run_and_keep_the_last_good_checkpoint(inside, monkeypatch):
    weights = poison(monkeypatch, {2, 3, 4, 5}, minibatch=1)
    more = ["objective.num_epochs=1", "objective.num_minibatches=1", "update.max_bad_steps=2"]
    with pytest.raises(TrainingDiverged, match="2 steps in a row .*bad-step-000003.safetensors"):
        trainer("diverged", 9, *more).run()
    path = Path("diverged")
    assert [row["guard/skipped_steps"] for row in read(path / "metrics.jsonl") if "reward" in row] == [0, 1, 2]
    last = checkpoint.load(checkpoint.latest(path))
    assert last.step == 2
    assert all(torch.equal(tensor, weights[1][1][name]) for name, tensor in last.tensors["weights"].items())
    assert all(tensor.isfinite().all() for group in last.tensors.values() for tensor in group.values())


def test_weights_that_are_not_finite_end_the_run_though_every_reward_is_equal_and_nothing_is_learnt(inside):
    """Adam moves each weight by the learning rate: the next forward pass overflows."""
    with pytest.raises(TrainingDiverged, match="^the weights of step 1 are not finite"):
        trainer("overflown", 4, "optim.lr=1e30").run()
    assert [row["step"] for row in read(Path("overflown") / "metrics.jsonl") if "reward" in row] == [1]


def test_a_diverged_run_says_one_sentence_and_exits_with_1(inside, monkeypatch, capsys):
    poison(monkeypatch, {1, 2}, minibatch=1)
    words = ["objective.num_epochs=1", "objective.num_minibatches=1", "update.max_bad_steps=2"]
    monkeypatch.setattr("fastlatent.trainer.Trainer", lambda config, argv: trainer("sentence", 9, *words))
    with pytest.raises(SystemExit, match="^1$"):
        run_command(train.main, ["grpo_quickstart"])
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: 2 steps in a row had a non-finite loss or gradient")


# ---- checkpoints that cannot be gone on from ------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray((path / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "weights.safetensors").write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path / "optimizer.safetensors", 100)


def of_another_model(path: Path) -> None:
    stored = checkpoint.load(path)
    stored.tensors["weights"]["model.lm_head.weight"] = torch.zeros(3, 3)
    checkpoint.save(path.parent.parent, stored.step, stored.tensors, stored.state)


def of_another_method(path: Path) -> None:
    stored = checkpoint.load(path)
    del stored.tensors["weights"]["method.gate_lambda"]
    checkpoint.save(path.parent.parent, stored.step, stored.tensors, stored.state)


def of_another_version(path: Path) -> None:
    stored = checkpoint.load(path)
    del stored.state["guard"]
    checkpoint.save(path.parent.parent, stored.step, stored.tensors, stored.state)


@pytest.mark.parametrize("damage, sentence", [
    (flip_a_byte, "weights.safetensors: its SHA-256 is not the one in COMPLETE: the file is corrupt"),
    (cut, "optimizer.safetensors: has 100 bytes, wanted "),
    (of_another_model, "step-000004: model.lm_head.weight is [3, 3], wanted ["),
    (of_another_version, "step-000004: holds no 'guard'; another version of fastlatent may have written it"),
    (of_another_method, "step-000004: does not fit this model: 'method.gate_lambda' is in only one of the two"),
])
def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_sentence(inside, uninterrupted, capsys, damage, sentence):
    shutil.rmtree("damaged", ignore_errors=True)
    shutil.copytree("uninterrupted", "damaged")
    damage(checkpoint.latest(Path("damaged")))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_command(train.main, words("damaged", 4))
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and sentence in err
