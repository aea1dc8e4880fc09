import io
import os

import pytest

from fastlatent.live import LiveView, sparkline, step_line, time_split

METRICS = {"step": 3, "reward": 0.3125, "completions/mean_length": 18.44, "entropy": 0.61, "kl": 0.0,
           "latent/gate_mean": 0.97, "grad_norm": 0.8, "perf/tokens_per_s": 612.4, "guard/skipped_steps": 0.0,
           "time/step": 2.0, "time/rollout": 1.26, "time/rollout/reward": 0.02, "time/update": 0.7}
LINE = "step 3/20 reward 0.312 len 18.4 entropy 0.61 gate 0.970 grad 0.80 tok/s 612 | rollout 62% reward 1% update 35%"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_step_is_one_line():
    assert step_line(METRICS, 20) == LINE
    assert step_line({"step": 1, "reward": None}, 20) == "step 1/20"
    assert step_line(METRICS | {"guard/skipped_steps": 2.0, "kl": 0.01}, 20).count("kl 0.0100") == 1


@pytest.mark.parametrize("mode, file, expected", [
    ("auto", io.StringIO, f"hello [bold]x\n{LINE}\n"), ("plain", Terminal, f"hello [bold]x\n{LINE}\n"),
    ("quiet", io.StringIO, "hello [bold]x\n")])
def test_without_a_live_view_lines_are_whole_and_off_leaves_only_notes(mode, file, expected):
    out = file()
    with LiveView(20, mode, out) as view:
        view.note("hello [bold]x")
        view.step(METRICS)
    assert out.getvalue() == expected


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with LiveView(20, "auto", out) as view:
        view.step(METRICS)
        assert out.getvalue() == f"{LINE}\n"


def test_on_a_terminal_the_view_shows_progress_numbers_and_time(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    with LiveView(20, "auto", out) as view:
        view.step(METRICS)
        view.note("held-out 0.5")
        view.step(METRICS | {"step": 4, "reward": 0.5})
    text = out.getvalue()
    assert "held-out 0.5" in text and "step 4/20" in text and "left" in text and "▁█" in text and "rollout 62%" in text


def test_an_exception_leaves_the_terminal_usable(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with pytest.raises(ZeroDivisionError):
        with LiveView(20, "auto", out) as view:
            view.step(METRICS)
            1 / 0
    assert out.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize("mode", ["plain", "auto"])
def test_a_reader_that_goes_away_is_told_of_once_and_changes_nothing_else(mode, monkeypatch, capfd):
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = os.pipe()
    with open(writer, "w") as out:
        monkeypatch.setattr(out, "isatty", lambda: mode == "auto", raising=False)
        with LiveView(20, mode, out) as view:
            view.note("hello")
            os.close(reader)
            for _ in range(3):
                view.step(METRICS)
                view.note("x" * 100_000)
        out.write("whoever else writes there")
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("the output cannot be written any more (Broken pipe); training goes on without it")


def test_a_sparkline_spans_its_values():
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert len(sparkline([1.0, float("nan"), 2.0])) == 3


def test_the_time_split_is_of_the_whole_step():
    assert time_split(METRICS) == pytest.approx({"rollout": 0.62, "reward": 0.01, "update": 0.35})
    assert time_split({"time/step": 0.0, "time/rollout": 0.0}) == time_split({}) == {}
