"""The plugin of .ci/run: skipping a test is failing it, unless what is missing is a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GPU = "import pytest\n@pytest.mark.gpu\n@pytest.mark.skipif(True, reason='no GPU')\ndef test_x(): pass\n"
CASES = {
    "gpu": (GPU, False, ""),
    "passing": ("def test_x(): pass\n", False, ""),
    "expected failure": ("import pytest\n@pytest.mark.xfail\ndef test_x(): assert False\n", False, ""),
    "failing": ("def test_x(): assert False\n", True, ""),
    "skipped": ("import pytest\ndef test_x(): pytest.skip('no such thing')\ndef test_y(): pass\n", True, "no such thing"),
    "named gpu": ("import pytest\ndef test_gpu(): pytest.skip('not marked')\n", True, "not marked"),
    "package missing": ("import pytest\npytest.importorskip('no_such_package')\ndef test_x(): pass\n", True, "no_such_package"),
}


@pytest.mark.parametrize("name", CASES)
def test_only_a_skip_for_want_of_a_gpu_is_let_through(name, tmp_path):
    text, is_refused, wanted_reason = CASES[name]
    (tmp_path / "test_it.py").write_text(text + "def test_another(): pass\n")
    pytest_ = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "forbid_skips", "-c", os.devnull, "--rootdir", "."],
                             cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
                             capture_output=True, text=True)
    assert bool(pytest_.returncode) == is_refused, pytest_.stdout + pytest_.stderr
    assert ("a skip is an error here" in pytest_.stdout) == bool(wanted_reason)
    assert wanted_reason in pytest_.stdout
