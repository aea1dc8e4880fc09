import sys
from types import ModuleType

import pytest

from fastlatent import trackers
from fastlatent.errors import UserError
from fastlatent.trackers import open_trackers


class Recorder:
    made = []

    def __init__(self):
        self.calls = []
        Recorder.made.append(self)

    def log(self, metrics, step):
        self.calls.append((dict(metrics), step))

    def close(self):
        self.calls.append("closed")


class NoClose:
    def log(self, metrics, step):
        pass


def test_a_class_by_dotted_path_gets_every_line(tmp_path):
    Recorder.made.clear()
    opened = open_trackers([f"{__name__}.Recorder", f"{__name__}:Recorder"])
    assert Recorder.made == []  # nothing begins before the run folder is there
    opened.start(tmp_path)
    opened.log({"reward": 0.5}, 3)
    opened.close()
    assert [r.calls for r in Recorder.made] == [[({"reward": 0.5}, 3), "closed"]] * 2


@pytest.mark.parametrize("name, sentence", [
    ("wandb", "log.trackers.0: 'wandb' is neither tensorboard nor the dotted path"),
    ("no_such_module.Thing", "no module named 'no_such_module'"),
    (f"{__name__}.Missing", "has no 'Missing'"),
    (f"{__name__}.NoClose", r"has no close\(\)"),
])
def test_a_tracker_that_cannot_be_had_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        open_trackers([name])


def test_tensorboard_gets_what_is_finite(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    opened = open_trackers(["tensorboard"])
    opened.start(tmp_path)
    opened.log({"reward": 0.5, "grad_norm": float("nan")}, 2)
    opened.close()
    assert written == [str(tmp_path / "tensorboard"), ("reward", 0.5, 2), "closed"]


def test_without_tensorboard_the_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="log.trackers.0: tensorboard is not installed; pip install tensorboard"):
        open_trackers(["tensorboard"])
