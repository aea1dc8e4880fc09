import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from full_disk import full_disk
from omegaconf import OmegaConf

from fastlatent import checkpoint, manifest
from fastlatent.errors import UserError
from fastlatent.log import read
from fastlatent.runfolder import RunFolder, first_difference, read_config
from fastlatent.schema import Config
from fastlatent.vllm_plugin import surface

DEFAULT = OmegaConf.to_container(OmegaConf.structured(Config(recipe="quick")))

MODEL = {"config.json": "c", "model.safetensors": "w"}


def config(**changes):
    """The default configuration with dotted keys changed; `__` stands for the dot."""
    tree = copy.deepcopy(DEFAULT)
    for key, value in changes.items():
        *above, last = key.split("__")
        section = tree
        for name in above:
            section = section[name]
        assert last in section
        section[last] = value
    return tree


def start(cwd, fingerprint="data-1", model=None, **changes):
    return RunFolder.open(config(**changes), ["train", "quick"], fingerprint, {"hrpo_gate": "reference"}, cwd,
                          model=MODEL if model is None else model)


def run(cwd, steps=(), **changes):
    """A finished session: `steps` are logged and saved."""
    folder = start(cwd, **changes)
    for step in steps:
        folder.log({"step": step, "reward": step / 7}, [{"step": step, "completion": "x"}])
        folder.save(step, {"weights": {"w": torch.full((2,), float(step))}}, {"n": step})
    folder.close()
    return folder.path


# ---- where --------------------------------------------------------------------------------------------------------


def test_runs_are_numbered_per_recipe_and_a_number_is_never_used_twice(tmp_path):
    assert [run(tmp_path).name for _ in range(2)] == ["quick-1", "quick-2"]
    (tmp_path / "runs" / "quick-9").mkdir()
    (tmp_path / "runs" / "quick-extra-30").mkdir()
    assert run(tmp_path) == tmp_path / "runs" / "quick-10"
    assert run(tmp_path, recipe="quick-extra").name == "quick-extra-31"


def test_runs_started_together_get_different_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: start(tmp_path), range(16)))
    assert {f.path.name for f in folders} == {f"quick-{n}" for n in range(1, 17)}
    for folder in folders:
        folder.close()


def test_out_chooses_the_folder_and_may_be_empty(tmp_path):
    (tmp_path / "mine").mkdir()
    assert run(tmp_path, out="mine") == tmp_path / "mine"
    assert run(tmp_path, out=str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"


def test_the_configuration_is_written_as_it_was_resolved(tmp_path):
    mine = config(optim__lr=1e-6, optim__betas=(0.9, 0.95), chat__system='1e5: "a"\n#b é')
    folder = RunFolder.open(mine, [], "", {}, tmp_path)
    assert read_config(folder.path) == mine | {"optim": mine["optim"] | {"betas": [0.9, 0.95]}}
    assert read_config(folder.path)["optim"]["lr"].hex() == 1e-6.hex()
    other = RunFolder.open(config(chat__system="1e5"), [], "", {}, tmp_path)
    assert read_config(other.path)["chat"]["system"] == "1e5"
    folder.close(), other.close()


# ---- going on -----------------------------------------------------------------------------------------------------


def test_auto_takes_the_newest_run_of_this_very_configuration(tmp_path):
    run(tmp_path, [1])
    wanted = run(tmp_path, [1, 2])
    run(tmp_path, [1], num_steps=99)
    run(tmp_path, [1], optim__lr=0.5)
    run(tmp_path, [1], recipe="other")
    folder = start(tmp_path, resume="auto", log__samples=0, log__live="quiet")
    assert folder.path == wanted and folder.resumed.step == 2
    assert folder.resumed.tensors["weights"]["w"].tolist() == [2.0, 2.0] and folder.resumed.state["n"] == 2
    folder.close()


def test_out_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = run(tmp_path, [1], out="~/mine")
    assert path == tmp_path / "home" / "mine" and not (tmp_path / "~").exists()
    folder = start(tmp_path, out="~/mine", resume="auto")
    assert folder.resumed.step == 1
    folder.close()


def test_out_with_resume_goes_on_with_that_folder(tmp_path):
    path = run(tmp_path, [1], out="mine")
    folder = start(tmp_path, out="mine", resume="auto")
    assert folder.path == path and folder.resumed.step == 1
    folder.close()


def test_a_run_without_a_checkpoint_starts_over_in_its_folder(tmp_path):
    folder = start(tmp_path)
    folder.log({"step": 0, "eval/accuracy": 0.5}, [{"step": 0}])
    folder.close()
    again = start(tmp_path, resume="auto")
    assert again.path == folder.path and again.resumed is None
    assert read(again.path / "metrics.jsonl") == read(again.path / "samples.jsonl") == []
    again.close()


def test_logs_go_back_to_where_the_checkpoint_left_them(tmp_path):
    folder = start(tmp_path)
    folder.log({"step": 1, "reward": 0.1}, [{"step": 1}, {"step": 1}])
    folder.save(1, {"weights": {}}, {})
    before = {name: (folder.path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    # the same step again: a row that a step number could not tell from those before the checkpoint
    folder.log({"step": 1, "eval/accuracy": 0.5})
    folder.log({"step": 2, "reward": 0.2}, [{"step": 2}])
    folder.close()
    again = start(tmp_path, resume="auto")
    assert {name: (again.path / name).read_bytes() for name in before} == before
    again.log({"step": 2, "reward": 0.3})
    assert [row["step"] for row in read(again.path / "metrics.jsonl")] == [1, 2]
    again.close()


def test_a_save_that_was_killed_is_tidied_up_on_resume(tmp_path):
    path = run(tmp_path, [1])
    (path / "checkpoints" / ".tmp-abc").mkdir()
    folder = start(tmp_path, resume="auto")
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["step-000001"]
    folder.close()


def test_a_start_that_was_killed_does_not_block_the_folder(tmp_path):
    path = run(tmp_path, out="mine")
    (path / "config.yaml").unlink()
    for name in ("metrics.jsonl", "samples.jsonl"):
        (path / name).unlink()
    assert run(tmp_path, [1], out="mine") == path and checkpoint.latest(path)


def test_keep_and_protect_reach_the_checkpoints(tmp_path):
    folder = start(tmp_path, checkpoint__keep=2)
    for step in range(1, 6):
        folder.save(step, {"weights": {}}, {}, protect={1})
    assert list(checkpoint.find(folder.path)) == [1, 4, 5]
    folder.close()


def test_two_processes_cannot_write_one_run(tmp_path):
    folder = start(tmp_path, out="mine")
    code = ("import fcntl, os, sys\n"
            "try: fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "except BlockingIOError: sys.exit(7)")
    assert subprocess.run([sys.executable, "-c", code, folder.path / ".lock"]).returncode == 7
    with pytest.raises(UserError, match="another process is writing"):
        start(tmp_path, out="mine", resume="auto")
    folder.close()
    start(tmp_path, out="mine", resume="auto").close()


def test_a_full_disk_is_one_sentence_and_leaves_what_was_saved_to_go_on_from(tmp_path):
    folder = start(tmp_path, out="mine")
    for num_saved, there in enumerate(["no checkpoint is there", "step 1 is there"]):
        sentence = (rf"mine: cannot be written any more \(.*\); {there}; when it can, go on with "
                    r".*mine/config.yaml out=.*mine resume=auto")
        with full_disk():
            with pytest.raises(UserError, match=sentence):
                folder.log({"step": 1, "reward": 1.0})
            with pytest.raises(UserError, match=sentence):
                folder.save(2, {"weights": {"w": torch.zeros(1000)}}, {})
        assert len(os.listdir(folder.path / "checkpoints")) == num_saved
        folder.save(1, {"weights": {"w": torch.zeros(1000)}}, {})
    folder.close()
    again = start(tmp_path, out="mine", resume="auto")
    assert again.resumed.step == 1 and not read(again.path / "metrics.jsonl")
    again.close()


def test_an_exception_takes_a_new_run_with_it_that_has_written_nothing_and_no_other(tmp_path):
    def fail(folder):
        with pytest.raises(ZeroDivisionError), folder:
            1 / 0
        return folder.path.exists()

    assert not fail(start(tmp_path, out="new")) and not fail(start(tmp_path, out="new"))
    logged = start(tmp_path, out="logged")
    logged.log({"step": 0, "eval/accuracy": 1.0})
    assert fail(logged)
    run(tmp_path, out="begun")
    assert fail(start(tmp_path, out="begun", resume="auto")) and (tmp_path / "begun" / "config.yaml").exists()
    shared = start(tmp_path, out="shared")
    (tmp_path / "shared" / "notes.txt").write_text("mine")
    assert fail(shared) and os.listdir(tmp_path / "shared") == ["notes.txt"]


# ---- what is refused ----------------------------------------------------------------------------------------------


def damage_checkpoint(path):
    (checkpoint.latest(path) / "state.json").write_text("{}")


@pytest.mark.parametrize("prepare, changes, sentence", [
    (lambda cwd: None, {"resume": "auto"}, "no .*runs/quick-\\* has this configuration$"),
    (lambda cwd: run(cwd), {"resume": "auto", "optim__lr": 0.5},
     r"the newest, .*quick-1, differs in optim.lr \(0.5 here, 1e-06 there\)"),
    (lambda cwd: run(cwd), {"resume": "auto", "num_steps": 21}, r"differs in num_steps \(21 here, 20 there\)"),
    (lambda cwd: None, {"resume": "auto", "out": "mine"}, "mine holds no run"),
    (lambda cwd: run(cwd, out="mine"), {"resume": "auto", "out": "mine", "seed": 3},
     r"another configuration: seed \(3 here, 0 there\)"),
    (lambda cwd: run(cwd, out="mine"), {"out": "mine"}, "mine is not empty; .*resume=auto"),
    (lambda cwd: (cwd / "mine").write_text("x"), {"out": "mine"}, "mine is a file, wanted a folder"),
    (lambda cwd: (cwd / "file").write_text("x"), {"out": "file/mine"}, "cannot use .*file/mine: Not a directory"),
    (lambda cwd: (cwd / "runs").write_text("x"), {}, "cannot use .*runs: File exists"),
    (lambda cwd: None, {"out": "/proc/nothing"}, "cannot use /proc/nothing: No such file"),
    (lambda cwd: (run(cwd, out="mine") / "config.yaml").write_text("{["), {"resume": "auto", "out": "mine"},
     "config.yaml: not a readable configuration"),
    (lambda cwd: (run(cwd, out="mine") / "config.yaml").write_text("[1]"), {"resume": "auto", "out": "mine"},
     "config.yaml: not the configuration"),
    (lambda cwd: (run(cwd, out="mine") / "manifest.json").unlink(), {"resume": "auto", "out": "mine"},
     "manifest.json: not a readable"),
    (lambda cwd: (run(cwd, out="mine") / "manifest.json").write_text("{}"), {"resume": "auto", "out": "mine"},
     "manifest.json: not the manifest"),
    (lambda cwd: damage_checkpoint(run(cwd, [1], out="mine")), {"resume": "auto", "out": "mine"},
     "state.json: .*truncated"),
    (lambda cwd: run(cwd, out="mine"), {"resume": "auto", "out": "mine", "fingerprint": "data-2"},
     "data: its fingerprint is data-2, the run in .*mine was started on data-1"),
    *[(lambda cwd: run(cwd, out="mine"), {"resume": "auto", "out": "mine", "model": model},
       f"model.path: {what} since the run in .*mine was started; wanted the model as it was then") for model, what in (
        ({**MODEL, "config.json": "d"}, "config.json has changed"),
        ({**MODEL, "model.safetensors": "v"}, "model.safetensors has changed"),
        ({**MODEL, "model-00002-of-00002.safetensors": "w"}, "model-00002-of-00002.safetensors is new"),
        ({"config.json": "c"}, "model.safetensors is missing"))],
    *[(lambda cwd: run(cwd, out="mine", model={**MODEL, "tokenizer.json": "t"}),
       {"resume": "auto", "out": "mine", "model": model},
       f"model.path: {what} since the run in .*mine was started; wanted the model as it was then") for model, what in (
        ({**MODEL, "tokenizer.json": "u"}, "tokenizer.json has changed"), (MODEL, "tokenizer.json is missing"),
        ({**MODEL, "tokenizer.json": "t", "chat_template.jinja": "j"}, "chat_template.jinja is new"))],
])
def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path, prepare, changes, sentence):
    prepare(tmp_path)
    before = sorted(os.walk(tmp_path))
    for _ in range(2):  # a refusal leaves no lock behind
        with pytest.raises(UserError, match=sentence) as caught:
            start(tmp_path, **changes)
        assert "\n" not in str(caught.value)
    assert [entry[0] for entry in sorted(os.walk(tmp_path))] == [entry[0] for entry in before]


def test_a_refused_folder_of_somebody_else_is_left_as_it_was(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(UserError, match="not empty"):
        start(tmp_path, out="letters")
    assert [p.name for p in (tmp_path / "letters").iterdir()] == ["a.txt"]


def test_the_first_difference_is_named_through_lists_of_sections():
    mine = config(rewards=[{"name": "exact_number", "weight": 1.0}, {"name": "length"}])
    assert first_difference(mine, copy.deepcopy(mine)) is None
    other = config(rewards=[{"name": "exact_number", "weight": 2.0}])
    assert first_difference(mine, other) == "rewards.0.weight (1.0 here, 2.0 there)"
    assert first_difference(config(rewards=[{"name": "a"}]), config(rewards=[{"name": "a"}, {"name": "b"}])) == (
        "rewards.1.name (nothing here, b there)")
    assert first_difference(config(out="a", resume="auto", log__samples=9), config()) is None
    assert first_difference(config(model__lora={}), config()) is not None


# ---- manifest -----------------------------------------------------------------------------------------------------


def test_the_manifest_tells_what_was_run_where_and_every_resumption(tmp_path):
    path = run(tmp_path, [1])
    start(tmp_path, resume="auto").close()
    facts = json.loads((path / "manifest.json").read_text())
    assert facts["argv"] == ["train", "quick"] and facts["seed"] == 0 and facts["data_fingerprint"] == "data-1"
    assert facts["config"] == read_config(path) and facts["backends"] == {"hrpo_gate": "reference"}
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["hardware"]["cores"] == len(os.sched_getaffinity(0)) and facts["hardware"]["memory_gb"] > 0
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert facts["versions"]["vllm"] == (surface.installed() or ("", None))[1]  # whichever name pip knows it by
    (session,) = facts["sessions"]
    assert set(session) == set(facts) - {"config", "seed", "data_fingerprint", "model_files", "sessions"}


def test_a_model_that_the_hub_sends_later_is_written_down_once_it_is_here(tmp_path):
    path = run(tmp_path, model={})
    start(tmp_path, model={}, resume="auto").close()  # not sent yet either: nothing to compare
    for _ in range(2):
        manifest.keep_model(path, MODEL)
    assert manifest.read(path)["model_files"] == MODEL and len(manifest.read(path)["sessions"]) == 1
    with pytest.raises(UserError, match="model.safetensors has changed since"):
        manifest.keep_model(path, {**MODEL, "model.safetensors": "v"})
    older = {name: value for name, value in manifest.read(path).items() if name != "model_files"}
    (path / "manifest.json").write_text(json.dumps(older))  # as it was before models were written down
    start(tmp_path, model={"config.json": "d"}, resume="auto").close()
    (path / "manifest.json").write_text(json.dumps(older | {"model_files": MODEL}))  # and before tokenizers were
    start(tmp_path, model={**MODEL, "tokenizer.json": "t"}, resume="auto").close()


def test_git_state_is_of_the_checkout_that_tracks_the_code_or_none(tmp_path):
    def git(*words):
        return subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                              capture_output=True, text=True).stdout.strip()

    assert manifest.git_state(tmp_path) is None
    (tmp_path / "__init__.py").write_text("")
    git("init")
    assert manifest.git_state(tmp_path) is None  # inside a repository, but not of it
    git("add", "."), git("commit", "-m", "a")
    assert manifest.git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "__init__.py").write_text("x = 1")
    assert manifest.git_state(tmp_path)["dirty"] is True
