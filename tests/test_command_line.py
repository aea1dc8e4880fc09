"""What every command shares: one sentence and exit code 2 for bad input, and a --help that leaves nothing out."""

import dataclasses
import importlib
import os
import runpy
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest

import fastlatent
from fastlatent import __version__
from fastlatent.cli import parse_args, run_command, usage
from fastlatent.config import family, member_schema
from fastlatent.config.helptext import field_docs, help_text, options
from fastlatent.config.layers import recipes
from fastlatent.errors import Failed, UserError
from fastlatent.schema import FAMILIES, Config, LoraConfig


def exit_code(function, *args) -> int:
    with pytest.raises(SystemExit) as exit_:
        function(*args)
    return exit_.value.code


def test_bad_input_is_one_sentence_and_exit_code_2(capsys):
    def main(argv):
        raise UserError(f"{argv[0]}: no such thing")

    assert exit_code(run_command, main, ["x"]) == 2
    assert capsys.readouterr() == ("", "error: x: no such thing\n")


def test_what_comes_to_nothing_is_one_sentence_and_exit_code_1(capsys):
    def main(argv):
        raise Failed(f"{argv[0]}: it went wrong")

    assert exit_code(run_command, main, ["x"]) == 1
    assert capsys.readouterr() == ("", "error: x: it went wrong\n")


def test_interruption_is_exit_code_130_and_success_0(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert exit_code(run_command, interrupted, []) == 130
    assert exit_code(run_command, lambda argv: None, []) in (0, None)
    assert exit_code(run_command, lambda argv: 3, []) == 3
    assert capsys.readouterr() == ("", "")


def test_words_that_are_no_text_are_bad_input(capsys):
    assert exit_code(run_command, lambda argv: None, ["out=runs/é"]) in (0, None)
    assert exit_code(run_command, lambda argv: None, ["out=runs/\udcff"]) == 2
    assert capsys.readouterr() == ("", "error: 'out=runs/\\udcff': wanted words in UTF-8\n")


def test_what_the_terminal_cannot_spell_is_escaped():
    code = "from fastlatent.cli import run_command; run_command(lambda argv: print('\\u2192 \\ud800'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(fastlatent.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u2192 \\ud800\n", b"")


@contextmanager
def unread():
    """Standard output is a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out, redirect_stdout(out):
        yield


@pytest.mark.parametrize("command", ["train", "sft.__main__", "evaluate", "generate", "export", "report", "doctor",
                                     "profile_report", "models.__main__"])
def test_no_command_minds_a_reader_who_has_seen_enough(command, capfd):
    main = importlib.import_module(f"fastlatent.{command}").main
    with unread():
        assert exit_code(run_command, main, ["--help"]) == 0
    assert capfd.readouterr() == ("", "")


def test_files_are_written_though_nobody_reads_what_is_said(capfd, tmp_path):
    def main(argv):
        for _ in range(3):
            print("x" * 100_000)
        Path(argv[0]).write_text("samples")
        print("done")

    with unread():
        assert exit_code(run_command, main, [str(tmp_path / "out")]) in (0, None)
    assert (tmp_path / "out").read_text() == "samples" and capfd.readouterr() == ("", "")


def test_bad_input_is_told_of_though_nobody_reads_what_was_said_before(capfd):
    def main(argv):
        print("as far as it went")
        raise UserError("x: no such thing")

    with unread():
        assert exit_code(run_command, main, []) == 2
    assert capfd.readouterr() == ("", "error: x: no such thing\n")


def test_the_overview_of_the_kernels_does_not_mind_either(capfd):
    with unread():
        runpy.run_module("fastlatent_kernels", run_name="__main__")
    assert capfd.readouterr().out == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_an_output_that_takes_nothing_is_one_sentence(capfd):
    with open("/dev/full", "w") as out, redirect_stdout(out):
        assert exit_code(run_command, lambda argv: print("hello"), []) == 2
    assert capfd.readouterr() == ("", "error: the output cannot be written (No space left on device)\n")


def test_a_bug_is_not_hidden():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(main, [])


def test_words_are_layers_or_overrides():
    words = ["hrpo_quickstart", "optim.lr=1e-6", "runs/lr=1/config.yaml", "chat.system=a=b", "rewards.0.weight=-1"]
    assert parse_args(words) == (["hrpo_quickstart", "runs/lr=1/config.yaml"],
                                 ["optim.lr=1e-6", "chat.system=a=b", "rewards.0.weight=-1"])


def test_unknown_flag_is_bad_input():
    with pytest.raises(UserError, match="--lr"):
        parse_args(["hrpo_quickstart", "--lr"])


def test_without_words_usage_and_every_recipe_are_printed(capsys):
    assert exit_code(parse_args, []) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: python -m fastlatent.train")
    for name, description in recipes().items():
        assert name in err and description in err


def test_version_is_printed(capsys):
    assert exit_code(parse_args, ["--version"]) == 0
    assert capsys.readouterr().out == f"fastlatent {__version__}\n"


def test_help_lists_every_option_and_every_member(capsys):
    assert exit_code(parse_args, ["hrpo_quickstart", "--help"]) == 0
    text = capsys.readouterr().out
    assert text == f"{usage()}\n{help_text()}\n"
    paths = [path for path, _, _ in options(Config) if path not in FAMILIES]
    assert {"seed", "optim.lr", "model.lora", "model.lora.r", "thinking.stop"} <= set(paths) and len(paths) > 60
    for path in paths:
        assert f"\n  {path}=" in text
    for key in FAMILIES:
        for name in family(key).names():
            assert f".name={name}" in text
            for field in dataclasses.fields(member_schema(key, name, key)):
                assert f".{field.name}" in text
    assert "  optim.lr=1e-06\n      Learning rate of the model" in text
    assert "  model.lora=null\n      Train low-rank adapters" in text


def test_every_option_is_explained():
    schemas = [member_schema(key, name, key) for key in FAMILIES for name in family(key).names()]
    entries = [entry for schema in (Config, *schemas) for entry in options(schema)]
    assert [path for path, _, doc in entries if not doc] == []


def test_docstring_of_a_field_is_the_string_beneath_it():
    assert field_docs(LoraConfig)["r"] == "Rank of the update."
