"""The README says what is so: its numbers come from committed lines, its commands run, its options and files exist."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from benches import gpu_status, readme
from fastlatent import log
from fastlatent.config import family, helptext, load_config, member_schema
from fastlatent.config.layers import recipes
from fastlatent.errors import UserError
from fastlatent.schema import FAMILIES, Config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
QUICK = "num_steps=1 num_prompts=2 group_size=2 eval.num_prompts=2 log.live=plain"

LINE = {"bench": "update", "case": "64 completions", "variant": "latent",
        "metrics": {"wall_s": 2.5, "speed_over_trl": 1.25, "peak_bytes": 2.0**30},
        "spread": {"wall_s": [2.25, 3.0], "speed_over_trl": [1, 2]},
        "facts": {"model": "some-model", "dtype": "bfloat16"}, "git": {"commit": "0123456789", "dirty": True},
        "hardware": {"cpu": "Some CPU", "cores": 2, "gpus": []}, "versions": {"torch": "9.9", "transformers": "8.8"},
        "threads": {"torch": 2}, "time": "2026-11-20T10:00:00+00:00"}


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_every_number_and_the_state_of_every_gpu_path_are_generated_from_a_committed_line():
    assert readme.whole(TEXT) == TEXT, "run python -m benches.readme"


def test_a_table_has_the_numbers_of_its_line_and_what_they_were_measured_on():
    assert readme.generated([LINE]).endswith(
        "| batch | update | seconds | times trl | peak MiB | dtype | commit |\n| --- | --- | --- | --- | --- | --- | --- |\n"
        "| 64 completions | latent | 2.50 (2.25 to 3.00) | 1.25 (1.00 to 2.00) | 1024 | bfloat16 | 0123456+ |\n\n"
        "<sub>Some CPU, 2 cores, 2 threads; some-model; torch 9.9, transformers 8.8; 2026-11</sub>\n")
    assert readme.generated([]) == ""


def test_a_commit_is_marked_where_files_were_changed_since():
    commits = [({"commit": "0123456789", "dirty": dirty}, shown) for dirty, shown in (
        (True, "0123456+"), (False, "0123456"), (None, "0123456"))]  # None: a copy without history was told its commit
    assert [readme.commit(LINE | {"git": git}) for git, _ in commits] == [shown for _, shown in commits]
    assert readme.commit(LINE | {"git": None}) == ""


def test_a_long_table_is_folded_whole():
    lines = [LINE | {"case": f"{count} completions"} for count in range(17)]
    text = readme.generated(lines)
    assert text.count("<details><summary>17 rows</summary>\n\n| batch") == text.count("</details>") == 1
    assert text.count(" completions | latent |") == 17 and "<details>" not in readme.generated(lines[:16])


def test_the_newest_line_of_a_machine_counts():
    newer = LINE | {"metrics": {"wall_s": 7.0}, "spread": {"wall_s": [7.0, 7.0]}, "git": None,
                    "time": "2026-11-21T10:00:00+00:00"}
    elsewhere = newer | {"hardware": {"cpu": "Other CPU", "cores": 64, "gpus": []}}
    for lines in ([LINE, newer, elsewhere], [elsewhere, newer, LINE]):
        text = readme.generated(lines)
        assert text.count("7.00 (7.00 to 7.00)") == 2 and "2.50" not in text and text.count("<sub>") == 2


RUN = LINE | {"bench": "learning", "case": "hrpo_quickstart", "metrics": {"reward_last": 0.5},
              "spread": {"reward_last": [0.5, 0.5]}}


def run(variant: str, reward: float, hour: int, **changes) -> dict:
    steps = int(variant.split(", ")[1].split()[0])
    return RUN | {"variant": variant, "facts": LINE["facts"] | {"steps": steps, "reward_first": reward},
                  "time": f"2026-11-20T{hour:02}:00:00+00:00"} | changes


def test_of_a_recipe_only_the_runs_that_are_as_long_as_it_is_now_are_shown():
    other = {"case": "grpo_quickstart"}
    elsewhere = {"hardware": {"cpu": "Other CPU", "cores": 64, "gpus": []}}
    lines = [run("seed 0, 14 steps", 0.11, 1), run("seed 0, 24 steps", 0.12, 2), run("seed 0, 24 steps", 0.13, 5),
             run("seed 1, 14 steps", 0.14, 3), run("seed 2, 24 steps", 0.15, 4), run("seed 0, 14 steps", 0.16, 2, **other),
             run("seed 0, 14 steps", 0.17, 2, **elsewhere)]
    for some in (lines, lines[::-1]):
        text = readme.generated(some)
        shown = {number for number in re.findall(r"(0\.\d\d) -> 0\.50", text)}
        # the newest of seed 0, the only one of seed 2; those of another recipe and of another machine, however short
        assert shown == {"0.13", "0.15", "0.16", "0.17"}
    # a recipe that has become shorter keeps its longer runs until they are made again
    text = readme.generated([lines[1], run("seed 3, 9 steps", 0.18, 9)])
    assert {"0.12", "0.18"} == set(re.findall(r"(0\.\d\d) -> 0\.50", text))


def test_a_readme_without_markers_is_refused():
    with pytest.raises(UserError, match="measured"):
        readme.filled("# fastlatent\n", "")
    with pytest.raises(UserError, match="gpu"):
        readme.filled("# fastlatent\n", "", readme.GPU)


def status(tmp_path, **changes) -> list[gpu_status.Status]:
    line = {"path": "kernels", "state": "measured", "where": "NVIDIA H200", "when": "2026-12", "shown": "tests",
            "baseline": "1x-nvidia-h200.jsonl"} | changes
    (tmp_path / "status.jsonl").write_text(json.dumps(line) + "\n")
    return gpu_status.read(tmp_path / "status.jsonl", tmp_path)


def test_a_gpu_path_that_ran_has_a_baseline_of_that_gpu(tmp_path):
    on = {"hardware": {"cpu": "Some CPU", "cores": 16, "gpus": ["NVIDIA H200"]}}
    (tmp_path / "1x-nvidia-h200.jsonl").write_text(json.dumps(LINE | on) + "\n")
    (tmp_path / "some-cpu-2-cores.jsonl").write_text(json.dumps(LINE) + "\n")
    assert gpu_status.table(status(tmp_path)).splitlines()[2] == "| kernels | measured | NVIDIA H200, 2026-12 | tests |"
    for changes, said in (
            ({"baseline": None}, "'measured' wants a file of benches/baselines, got None"),
            ({"state": "ran", "baseline": "b200.jsonl"}, "'ran' wants a file of benches/baselines, got 'b200.jsonl'"),
            ({"baseline": "some-cpu-2-cores.jsonl"}, "some-cpu-2-cores.jsonl was not measured on NVIDIA H200"),
            ({"where": "NVIDIA H100"}, "1x-nvidia-h200.jsonl was not measured on NVIDIA H100"),
            ({"state": "works"}, "state 'works' is not one of never run, built, ran, measured"),
            ({"when": ""}, "'measured' wants where and when"),
            ({"state": "built", "where": ""}, "'built' wants where and when"),
            ({"state": "never run"}, "never run has no place and time"), ({"status": "x"}, "not a status")):
        with pytest.raises(UserError, match=f"^status.jsonl, line 1: .*{re.escape(said)}"):
            status(tmp_path, **changes)
    never = status(tmp_path, state="never run", where="", when="", baseline=None)
    assert gpu_status.table(never).splitlines()[2] == "| kernels | never run |  | tests |"


# ---- commands -------------------------------------------------------------------------------------------------------


def block(language: str, beginning: str) -> str:
    """The only block of code in `language` with this beginning."""
    (found,) = [code for code in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) if code.startswith(beginning)]
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


def environment() -> dict[str, str]:
    paths = [ROOT, ROOT / "kernels"]
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                         "PYTHONPATH": os.pathsep.join(map(str, paths))}


def test_ones_own_data_and_reward_train_as_written(model, tmp_path):
    row, reward, command = block("json", "{"), block("python", "# own_reward.py"), block("bash", "python -m fastlatent.train")
    assert len((row + reward + command).splitlines()) <= 10
    (tmp_path / "questions.jsonl").write_text(row * 24)
    (tmp_path / "own_reward.py").write_text(reward)
    words = f"{command.rstrip()} model.path={model} {QUICK}"
    done = subprocess.run(["bash", "-ec", words], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    samples = log.read(tmp_path / "runs" / "pens-1" / "samples.jsonl")
    assert samples and all(row["answer"] == "12" and row["rewards"].keys() == {"right_number"} for row in samples)
    (step,) = [row for row in log.read(tmp_path / "runs" / "pens-1" / "metrics.jsonl") if "reward" in row]
    assert step["guard/reward_exceptions"] == 0


def test_the_reward_of_the_readme_tells_right_from_wrong(tmp_path):
    (tmp_path / "own_reward.py").write_text(block("python", "# own_reward.py"))
    right_number = runpy.run_path(str(tmp_path / "own_reward.py"))["right_number"]
    assert [right_number(text, "12") for text in ("3 * 4 = 12\n#### 12", "#### 13", "12")] == [1.0, 0.0, 0.0]


def test_training_from_python_runs_as_written(model, tmp_path):
    code = block("python", "from fastlatent import")
    words = ", ".join(f'"{word}"' for word in [f"model.path={model}", *QUICK.split()])
    assert code.count('"num_steps=40"') == 1
    (tmp_path / "train.py").write_text(code.replace('"num_steps=40"', words))
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "hrpo_quickstart-1" / "report.html").is_file()


def test_commands_name_modules_and_recipes_that_exist():
    modules = set(re.findall(r"python -m ([\w.]+)", TEXT)) - {"fastlatent.train"}
    assert len(modules) >= 6
    for module in modules:
        path = module.replace(".", "/")
        places = (f"{path}.py", f"{path}/__main__.py", f"kernels/{path}/__main__.py")
        assert any((ROOT / place).is_file() for place in places), module
    assert set(re.findall(r"python -m fastlatent\.train (\w+)", TEXT)) <= set(recipes())


# ---- options and files ----------------------------------------------------------------------------------------------


def code() -> str:
    """All that is set as code: fenced, indented or between backticks."""
    return "\n".join(re.findall(r"```.*?```|^    .*?$|`[^`\n]+`", TEXT, re.DOTALL | re.MULTILINE))


def test_only_options_that_exist_are_mentioned():
    known = {path for path, _, _ in helptext.options(Config)}
    for key in FAMILIES:
        for name in family(key).names():
            known |= {f"{key}.{path}" for path, _, _ in helptext.options(member_schema(key, name, key))}
    variables = set(re.findall(r"^([A-Z]+)\s*\?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = [re.sub(r"^rewards\.\d", "rewards", key) for key in re.findall(r"(?<![\w./-])([A-Za-z_][\w.]*)=(?!=)", code())]
    assert len(found) > 20
    assert [key for key in found if key not in known | variables | {"key"}] == []


def test_the_table_of_how_tos_holds_valid_values():
    cells = re.search(r"\| To \| write \|\n\| --- \| --- \|\n(.*?)\n\n", TEXT, re.DOTALL)[1].splitlines()
    words = [re.findall(r"`([^`]+)`", cell.split("|")[2]) for cell in cells]
    assert sum(map(len, words)) >= 6
    for group in words:
        for options in group:
            load_config("hrpo_quickstart", "sampling.max_new_tokens=1024", *options.split())


def test_only_files_that_exist_are_linked():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", TEXT)
    assert len(links) >= 6
    assert [link for link in links if not (ROOT / link.replace("\\", "")).exists()] == []
