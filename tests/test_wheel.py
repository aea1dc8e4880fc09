"""A built wheel is whole: installed where there is no checkout, it trains from another folder, without a network."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import tiny

from fastlatent.log import read

ROOT = Path(__file__).parents[1]
PROJECT = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "csrc", "fastlatent", "kernels")
QUICK = ("num_steps=2", "num_prompts=2", "group_size=2", "eval.num_prompts=2", "log.live=plain")
LEFT_OUT = re.compile(r"torch|c10|cudart|cuda")


def run(*command: str | Path, **options) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # a copy: what lies around in a checkout (build/, egg-info) must not be what makes the wheel whole
    source = tmp_path_factory.mktemp("source")
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, source)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """An environment that holds the wheel and sees this one's packages, but not the checkout installed here."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    # a path in a .pth file is only appended to sys.path: hooks of editable installs in that folder do not run
    (site / "packages.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return python


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> dict[str, str]:
    """No variable that leads back to the checkout, no cached model, and proxies where nobody listens."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "PYTEST", "FASTLATENT", "VIRTUAL"))}
    return kept | {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "FASTLATENT_CACHE": str(tmp_path_factory.mktemp("cache")),
                   "OMP_NUM_THREADS": "1"} | dict.fromkeys(["http_proxy", "https_proxy", "ALL_PROXY"], "http://127.0.0.1:9")


def test_a_wheel_trains_in_another_folder(python, offline, tmp_path):
    origins = run(python, "-c", "import fastlatent, fastlatent_kernels, fastlatent_kernels._C as c\n"
                  "print(fastlatent.__file__, fastlatent_kernels.__file__, c.__file__, sep='\\n')", cwd=tmp_path, env=offline)
    assert all(Path(origin).is_relative_to(python.parents[1]) for origin in origins.split()), origins
    model = tiny.save(tmp_path / "model")
    run(python, "-m", "fastlatent.train", "hrpo_quickstart", f"model.path={model}", *QUICK, cwd=tmp_path, env=offline)
    steps = [row["step"] for row in read(tmp_path / "runs" / "hrpo_quickstart-1" / "metrics.jsonl") if "reward" in row]
    assert steps == [1, 2]


def test_a_wheel_holds_packages_and_recipes_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {path.name for path in (ROOT / "fastlatent" / "recipes").glob("*.yaml")}
    assert {Path(name).name for name in names if name.startswith("fastlatent/recipes/")} == recipes != set()
    for package in ("fastlatent", "kernels/fastlatent_kernels"):
        modules = {str(path.relative_to((ROOT / package).parent)) for path in (ROOT / package).rglob("*.py")}
        assert modules <= set(names) and len(modules) > 10
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fastlatent", "fastlatent_kernels"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_extension_links_neither_torch_nor_the_cuda_runtime(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (extension,) = tmp_path.glob("fastlatent_kernels/_C*.so")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "--dynamic", extension))
    assert "libc.so.6" in needed
    assert [name for name in needed if LEFT_OUT.search(name)] == []
