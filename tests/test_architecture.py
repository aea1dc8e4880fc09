"""Laws of this code base that can be read off its source: who imports whom, where numbers are made, what has a reader."""

import ast
import re
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fastlatent_kernels import OPS

from fastlatent import metrics
from fastlatent.config import family, helptext, member_schema
from fastlatent.schema import FAMILIES, Config

ROOT = Path(__file__).parents[1]
TRAINER = sorted((ROOT / "fastlatent").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "fastlatent_kernels").rglob("*.py"))
METHOD_FILES = {path.stem for path in (ROOT / "fastlatent" / "methods").glob("*.py")} - {"__init__", "base"}
NUMERIC = {"softmax", "log_softmax", "logsumexp", "topk", "cross_entropy", "gumbel_softmax", "multinomial", "kl_div"}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[str]:
    """Every module named in an import anywhere in a file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def called(path: Path) -> Iterator[tuple[str, str]]:
    """Every call in a file: what it is called on (as written, empty for a bare name) and its own name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield "", node.func.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield ast.unparse(node.func.value), node.func.attr


def names(path: Path) -> set[str]:
    """Every name, attribute and imported name in a file."""
    out = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name):
            out.add(node.id)
        elif isinstance(node, ast.Attribute):
            out.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            out |= {alias.name for alias in node.names}
    return out


def texts(path: Path) -> set[str]:
    """Every text in a file that is no documentation; `x` stands for each value put into an f-string."""
    nodes = list(ast.walk(tree(path)))
    formatted = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    skipped = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    skipped |= {id(part) for node in formatted for part in node.values}
    plain = {node.value for node in nodes
             if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped}
    return plain | {"".join(p.value if isinstance(p, ast.Constant) else "x" for p in node.values) for node in formatted}


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- who imports whom -----------------------------------------------------------------------------------------------


def test_kernels_import_torch_and_their_backends_but_never_the_trainer():
    outside = {name.partition(".")[0] for path in KERNELS for name in imported(path)} - sys.stdlib_module_names
    assert {"torch", "fastlatent_kernels"} <= outside <= {"torch", "triton", "numpy", "fastlatent_kernels"}


# ---- where numbers are made -----------------------------------------------------------------------------------------


def test_nothing_numeric_of_an_op_lives_in_the_trainer():
    assert {shown(path): found for path in TRAINER if (found := names(path) & NUMERIC)} == {}
    assert {name for path in KERNELS for name in names(path)} & NUMERIC >= {"logsumexp", "topk"}


WAITING = {
    "gaussian_reparam": "methods with a Gaussian latent, not written",
    "hrpo_gate_decode": "an engine with one fixed input buffer, not written"}
"""Ops that nothing in the trainer calls, and what they wait for."""


def test_the_trainer_uses_every_op_that_does_not_wait_for_something():
    used = {node.func.id for path in TRAINER for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert set(OPS) - used == set(WAITING)


# ---- safety ---------------------------------------------------------------------------------------------------------


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell():
    for path in TRAINER + KERNELS:
        assert {name.partition(".")[0] for name in imported(path)} & UNSAFE == set(), shown(path)
        for owner, name in called(path):
            assert owner or name not in ("eval", "exec", "compile", "__import__"), shown(path)
            assert (owner, name) not in (("torch", "load"), ("torch", "save"), ("os", "system"), ("os", "popen")), shown(path)
        assert "shell=True" not in path.read_text(), shown(path)


# ---- methods are files ----------------------------------------------------------------------------------------------


def test_no_method_is_named_outside_its_folder():
    """Neither imported nor compared with; the default of the schema is the one exception."""
    assert METHOD_FILES >= {"grpo", "hrpo"}
    for path in (path for path in TRAINER if path.parent.name != "methods"):
        assert texts(path) & METHOD_FILES <= ({"grpo"} if path.name == "schema.py" else set()), shown(path)
        modules = {name.removeprefix("fastlatent.methods.") for name in imported(path)}
        assert modules & METHOD_FILES == set(), shown(path)


# ---- metrics and options --------------------------------------------------------------------------------------------


def test_every_metric_named_in_the_source_is_in_the_table():
    """A text of the shape `group/name`, its group one of the table's."""
    groups = "|".join({name.partition("/")[0] for name in metrics.NAMES if "/" in name})
    found = {text for path in TRAINER if path.name != "metrics.py" for text in texts(path)
             if re.fullmatch(rf"(?:{groups})(?:/\w+)+", text)}
    assert len(found) > 30
    # of the spans, which have a test of their own
    found.remove("time/x")
    assert [name for name in sorted(found) if name not in metrics.SPANS and not is_metric(name)] == []


def is_metric(name: str) -> bool:
    try:
        return bool(metrics.check(name))
    except KeyError:
        return False


def test_every_span_in_the_source_is_in_the_table():
    spans = {node.args[0].value for path in TRAINER for node in ast.walk(tree(path))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "span"
             and node.args and isinstance(node.args[0], ast.Constant)}
    assert spans == set(metrics.SPANS)


def test_every_option_is_explained_and_read():
    """An option is read where some file takes its name as an attribute or a key, outside the table of what is valid."""
    schemas = [(Config, "")] + [
        (member_schema(key, name, key), f"{key}.") for key in FAMILIES for name in family(key).names()]
    options = [(prefix + path, doc) for schema, prefix in schemas for path, _, doc in helptext.options(schema)]
    assert len(options) > 80
    assert [path for path, doc in options if not doc] == []
    read = set()
    for node in (node for path in TRAINER if path.name != "validation.py" for node in ast.walk(tree(path))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            read.add(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            read.add(node.slice.value)
    # the options of a reward function are its arguments
    read |= {arg.arg for path in TRAINER if "rewards" in path.parts for node in ast.walk(tree(path))
             if isinstance(node, ast.FunctionDef) for arg in (*node.args.args, *node.args.kwonlyargs)}
    assert [path for path, _ in options if path.rpartition(".")[2] not in read] == []


# ---- size -----------------------------------------------------------------------------------------------------------


def test_files_stay_small():
    lengths = [len(path.read_text().splitlines()) for path in TRAINER + KERNELS]
    assert statistics.median(lengths) < 200
    assert max(lengths) < 500


def test_the_map_of_the_trainer_names_each_of_its_parts_once():
    """The table in the docstring of the package: a heading, two spaces or more, names."""
    lines = re.findall(r"^    .*?  +(.*)$", ast.get_docstring(tree(ROOT / "fastlatent" / "__init__.py")), re.MULTILINE)
    parts = {path.stem for path in (ROOT / "fastlatent").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert sorted(name for line in lines for name in line.split(", ")) == sorted(parts - {"__init__", "__pycache__"})


def test_a_file_says_which_idea_it_is():
    assert [shown(path) for path in TRAINER + KERNELS if not ast.get_docstring(tree(path))] == []
