import base64
import re
import struct
from html.parser import HTMLParser

import pytest
from omegaconf import OmegaConf

from fastlatent import report
from fastlatent.cli import run_command
from fastlatent.errors import UserError
from fastlatent.report import write_report
from fastlatent.runfolder import RunFolder
from fastlatent.schema import Config

EVIL = '<script>alert("x")</script> & <img src=x onerror=y>'


def make_run(cwd, num_steps=4, **metrics):
    config = OmegaConf.to_container(OmegaConf.structured(Config(recipe="quick")))
    config["chat"]["system"] = EVIL
    folder = RunFolder.open(config, ["train", EVIL], "data-1", {}, cwd)
    for step in range(1, num_steps + 1):
        row = {"step": step, "reward": step / 10, "reward_std": 0.1, "completions/mean_length": 18.25, "entropy": 0.5,
               "kl": 0.0, "grad_norm": float("nan"), "time/step": 2.0, "time/rollout": 1.5}
        sample = {"step": step, "prompt": EVIL, "completion": EVIL + "é", "reward": None, "answer": EVIL}
        folder.log(row | metrics, [sample])
    folder.close()
    return folder.path


class Page(HTMLParser):
    """The page's elements and text; fails on tags that do not match."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_shows_the_run_and_fetches_and_runs_nothing(tmp_path):
    path = make_run(tmp_path, **{"latent/gate_mean": 0.98, "eval/accuracy": 0.75})
    html = write_report(path).read_text()
    page = Page(html)
    assert path / "report.html" == write_report(path)
    assert {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object"} == set()
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "http" not in re.sub(r"base64,[^\"]*", "", html)
    # the headline: mean of rewards 0.1 to 0.4, length, accuracy
    assert "0.250" in page.text and "18.2" in page.text and "0.750" in page.text
    assert "optim.lr" in page.text and "data-1" in page.text and "not finite" in page.text


def test_curves_are_embedded_and_kept_as_png(tmp_path):
    path = make_run(tmp_path, **{"latent/gate_mean": 0.98, "eval/accuracy": 0.75, "policy/approx_kl": 0.1})
    page = Page(write_report(path).read_text())
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    files = {p.read_bytes() for p in (path / "figures").glob("*.png")}
    names = {p.stem for p in (path / "figures").iterdir()}
    assert names == {"reward", "accuracy", "length", "entropy", "kl", "gate", "time"}
    assert {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources} == files
    for content in files:
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and width > 600 and height > 300


def test_what_models_and_users_wrote_is_text(tmp_path):
    page = Page(write_report(make_run(tmp_path)).read_text())
    assert page.text.count(EVIL) >= 8  # prompt, completion and answer of the samples, the system prompt, argv
    assert EVIL + "é" in page.text


def test_curves_without_data_are_left_out_and_an_empty_run_has_a_report(tmp_path):
    path = make_run(tmp_path)
    write_report(path)
    assert {p.stem for p in (path / "figures").iterdir()} == {"reward", "length", "entropy", "time"}
    assert "No step has finished" in Page(write_report(make_run(tmp_path, num_steps=0)).read_text()).text


def test_the_command_takes_one_run_folder(tmp_path, capsys):
    path = make_run(tmp_path)
    report.main([str(path)])
    assert capsys.readouterr().out.strip() == str(path / "report.html")
    with pytest.raises(UserError, match="config.yaml: not a readable"):
        report.main([str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        run_command(report.main, [])
    assert caught.value.code == 2 and capsys.readouterr().err == "error: the following arguments are required: RUN\n"
    with pytest.raises(SystemExit) as caught:
        run_command(report.main, ["--help"])
    assert caught.value.code == 0 and "report.html" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_refused(tmp_path):
    path = make_run(tmp_path)
    (path / "report.html").mkdir()
    with pytest.raises(UserError, match="^RUN: .*report.html cannot be written \\(Is a directory\\)$"):
        report.main([str(path)])


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("line", ["not json", "3", '{"reward": 1.0}'])
def test_a_damaged_log_is_refused_with_the_line(tmp_path, name, line):
    path = make_run(tmp_path)
    with open(path / name, "a") as file:
        file.write(f"{line}\n")
    number = len((path / name).read_text().splitlines())
    with pytest.raises(UserError, match=f"{name}, line {number}: not a line of a run's log$"):
        report.main([str(path)])
