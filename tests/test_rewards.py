"""Reward functions against hand-made tables, and the pool against functions that do everything wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from fractions import Fraction

import pytest

from fastlatent.errors import UserError
from fastlatent.rewards.base import RESERVED, REWARDS, RewardConfig, RewardJob, unique_names
from fastlatent.rewards.exact_number import ExactNumberConfig, exact_number
from fastlatent.rewards.format import format_reward
from fastlatent.rewards.length import LengthConfig, length
from fastlatent.rewards.math_equal import MathEqualConfig, is_hostile, last_boxed, math_equal, warm_up
from fastlatent.rewards.parse_number import last_number, parse_answer, parse_number
from fastlatent.rewards.pool import RewardPool

USER_REWARDS = '''
import os, sys, time, ctypes, threading, subprocess

NOT_A_FUNCTION = 3

def judge(prompt, completion, answer, **columns):
    """Does what the completion says."""
    if completion == "hang": time.sleep(1000)
    if completion == "spin":
        while True:
            try:
                while True: pass
            except BaseException: pass
    if completion == "exit": os._exit(3)
    if completion == "sys.exit": sys.exit(0)
    if completion == "segfault": ctypes.string_at(0)
    if completion == "raise": raise KeyError("no such thing")
    if completion == "interrupt": raise KeyboardInterrupt
    if completion == "recursion": return judge(prompt, completion, answer)
    if completion == "bomb": return len(bytearray(10**10))
    if completion == "slow bomb":
        hoard = []
        while True: hoard.append(bytearray(10**7))
    if completion == "text": return "1.0"
    if completion == "list": return [1.0]
    if completion == "nan": return float("nan")
    if completion == "inf": return float("inf")
    if completion == "huge": return 10**400
    if completion == "none": return None
    if completion == "true": return True
    if completion == "print":
        print('{"index": 0, "value": 7.0}')
        print("to stderr", file=sys.stderr)
        os.write(1, b'{"index": 0, "value": 7.0}\\n')
        assert sys.stdin.read() == ""
    if completion == "fork":
        if os.fork() == 0: return 9.0
        os.wait()
    if completion == "forge": os.write(int(sys.argv[1]), b'{"index": 7, "value": 7.0}\\n')
    if completion == "garble": os.write(int(sys.argv[1]), b'not json\\n')
    if completion == "torch": return float("torch" in sys.modules)
    if completion == "orphan":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        with open(answer, "w") as file: file.write(f"{os.getpid()} {child.pid}")
        time.sleep(1000)
    return 1.0

def seen(completion, num_tokens, forced_end, level="none given"):
    return float(len(completion) + 10 * num_tokens + 100 * forced_end + 1000 * (level == "hard"))

def kinds(**columns):
    return float(columns["odd"] == "{1, 2}" and columns["keys"] == "{(1, 2): 3}" and columns["nested"] == {"a": [1]}
                 and columns["prompt"] == "p" and columns["surrogate"] == "\\ud800")

def needs_level(completion, level): return 1.0

def positional(completion, /): return 1.0

def unrelated(a, b, c): return 1.0
'''


@pytest.fixture
def user_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(USER_REWARDS)
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('half an edit')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def user(name: str = "judge", **options) -> RewardConfig:
    return RewardConfig(name=f"my_rewards.{name}", **options)


def jobs(*completions: str, **columns) -> list[RewardJob]:
    return [RewardJob("p", completion, "5", columns) for completion in completions]


# Numbers


@pytest.mark.parametrize("text, value", [
    ("18", 18), (" 18\n", 18), ("18.0", 18), ("-3", -3), ("+3", 3), ("\N{MINUS SIGN}3", -3), ("1,000", 1000),
    ("12,345,678.5", Fraction(24691357, 2)), ("3/4", Fraction(3, 4)), ("-3/4", Fraction(-3, 4)),
    (".5", Fraction(1, 2)),
    ("007", 7), ("0.1", Fraction(1, 10)), ("1,000/4", 250)])
def test_a_number_is_read_exactly(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text", [
    "", " ", "5 apples", "apples 5", "9**9**9", "((((5))))", "1e5", "1e999999999", "0x10", "1_000", "٣", "５", "²", "½",
    "1,00", "1,0000", ",5", "5,", "3/0", "3/", "/4", "1/2/3", "- 3", "--3", "$5", "5.", "5%", "nan", "inf", "2 3",
    "5\n6",
    "9" * 101, "9" * 100_000, "__import__('os')"])
def test_what_is_not_one_number_is_none(text):
    assert parse_number(text) is None


@pytest.mark.parametrize("text, value", [
    ("5 apples", 5), ("it is $1,234.50.", Fraction(2469, 2)), ("-$5", -5), ("$-5", -5), ("2 x 12 = 24 apples", 24),
    ("10-3", 3),
    ("10 - 3", 3), ("x=-3", -3), ("50%", 50), ("3/4 of it", Fraction(3, 4)), ("nothing", None), ("9**9**9", 9),
    ("٣", None),
    ("1,2", 2), ("1,0000", 0), ("7/0", None)])
def test_the_last_number_is_found_in_prose(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize("text, value", [
    ("18", 18), ("$18", 18), ("-$18", -18), ("18.", 18), ("50%", 50), ("1,000", 1000), ("two", None), ("2x", None),
    ("18 apples", None), ("", None)])
def test_a_reference_answer_is_one_number(text, value):
    assert parse_answer(text) == value


# Built-ins


@pytest.mark.parametrize("completion, answer, strict, lenient", [
    ("2 + 3 = 5\n#### 5", "5", 1, 1), ("#### 5", "5", 1, 1), ("####5", "5.0", 1, 1), ("#### 1,000\n", "1000", 1, 1),
    ("#### 0.75", "3/4", 1, 1), ("#### -3", "-3", 1, 1), ("#### 3", "-3", 0, 0), ("#### 6", "5", 0, 0),
    ("#### 5 ####", "5", 0, 0), ("#### 4 #### 5", "5", 0, 0), ("########5", "5", 0, 0), ("the answer is 5", "5", 0, 0),
    ("####5 apples", "5", 0, 1), ("#### $5", "5", 0, 1), ("#### 2 x 12 = 24", "24", 0, 1), ("#### 5 or 6", "5", 0, 0),
    ("#### 9**9**9", "387420489", 0, 0), ("#### " + "(" * 3000 + "5" + ")" * 3000, "5", 0, 1), ("#### ٥", "5", 0, 0),
    ("#### 1e999999999", "5", 0, 0), ("#### " + "9" * 100_000, "5", 0, 0), ("####", "5", 0, 0), ("", "5", 0, 0),
    ("#####5", "5", 0, 1)])
def test_exact_number(completion, answer, strict, lenient):
    assert exact_number(completion, answer) == strict
    assert exact_number(completion, answer, strict=False) == lenient


def test_exact_number_takes_any_delimiter():
    assert exact_number("so #### it is </think> 5", "5", thinking_end="</think>") == 1
    assert exact_number("#### 5", "5", thinking_end="</think>") == 0


def test_exact_number_refuses_an_answer_that_no_completion_can_match():
    with pytest.raises(ValueError, match="'five' of this row is not a number"):
        exact_number("#### 5", "five")


@pytest.mark.parametrize("completion, forced_end, reward", [
    ("think #### 5", False, 1), ("think #### 5", True, 0), ("#### 5", False, 0), (" \n#### 5", False, 0),
    ("think ####", False, 0),
    ("think #### \n", False, 0), ("think", False, 0), ("a #### b #### c", False, 0), ("", False, 0)])
def test_format(completion, forced_end, reward):
    assert format_reward(completion, forced_end=forced_end) == reward


@pytest.mark.parametrize("num_tokens, reward", [
    (0, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (101, -1), (9999, -1)])
def test_length_is_equation_13_of_dapo(num_tokens, reward):
    assert length(num_tokens, max_tokens=100, cache_tokens=20) == pytest.approx(reward, abs=1e-12)


def test_length_without_a_ramp_is_a_step():
    assert [length(n, max_tokens=100, cache_tokens=0) for n in (100, 101)] == [0, -1]
    with pytest.raises(UserError, match="cache_tokens must lie in 0..max_tokens"):
        LengthConfig(max_tokens=10, cache_tokens=11)


@pytest.fixture
def unhurried(monkeypatch):
    """What is equal does not depend on how busy this machine is."""
    monkeypatch.setattr("fastlatent.rewards.math_equal._MATH_TIMEOUT_S", 60)


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("found, answer, reward", [
    (r"\frac{1}{2}", "0.5", 1), (r"\dfrac{1}{2}", r"\frac{1}{2}", 1), (r"2\sqrt{3}", r"\sqrt{12}", 1),
    ("(x+1)^2", "x^2+2x+1", 1),
    (r"(3,\frac{\pi}{2})", r"\left(3, \frac{\pi}{2}\right)", 1), (r"\text{Evelyn}", "Evelyn", 1),
    ("28 apples", "28", 1),
    ("$18$", "18", 1), (r"\$18", "18", 1), (r"10,\!000", "10000", 1), (r"90^\circ", "90", 1), ("2^{10}", "1024", 1),
    (r"[2,5)", "[2,5)", 1), ("x=5", "5", 1), ("", "5", 0), ("6", "7", 0), ("x+5", "5", 0), ("(2,5)", "(5,2)", 0),
    (r"\frac{1}{3}", "0.3", 0),
    ("9^{9^{9^{9}}}", "5", 0), ("(1+x)^{100000}", "x", 0), ("1000000!", "x", 0), ("9**9**9", "9", 0),
    ("1e999999999", "5", 0),
    ("(" * 3000 + "5" + ")" * 3000, "5", 0), (r"\frac{" * 60, "5", 0), ("__import__('os').abort()", "5", 0)])
def test_math_equal(found, answer, reward):
    assert math_equal(f"thinking #### {found}", answer) == reward
    if found.count("{") == found.count("}"):
        assert math_equal(rf"thinking #### so \boxed{{{found}}}", answer) == reward


@pytest.mark.usefixtures("unhurried")
def test_math_equal_wants_one_delimiter_unless_told_otherwise():
    boxed = r"so \boxed{\frac{1}{2}}, that is \boxed{5}."
    assert math_equal(boxed, "5") == 0
    assert math_equal(f"#### 5 #### {boxed}", "5") == 0
    assert math_equal(boxed, "5", require_delimiter=False) == 1
    assert math_equal("it is #### 5", "5", require_delimiter=False) == 1
    assert math_equal("it is 5", "5", require_delimiter=False) == 0


def test_the_last_closed_box_counts():
    assert last_boxed(r"\boxed{1} and \boxed{\frac{1}{2}} done") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1") is None
    assert last_boxed("nothing") is None


@pytest.mark.parametrize("text", [
    "2^{3^{4}}", "2^{{3^4}}", "2^3^4", "2^{3}^4", "x^{1000}", "(2^{999})^{999})^{2}", "1234!", "(10!)!", "3!!",
    "9**9", "(" * 11,
    "1" * 31, "x" * 200])
def test_explosive_text_is_hostile(text):
    assert is_hostile(text)


@pytest.mark.parametrize("text", [
    "x^2+y^2+z^2", "2^{100}", "(n-1)", "5!", r"\frac{x^{12}}{y^{3}}", "e^{x}+e^{-x}", "((1,2),(3,4))"])
def test_textbook_answers_are_not_hostile(text):
    assert not is_hostile(text)


def test_a_comparison_out_of_time_is_no_wrong_answer():
    with pytest.raises(TimeoutError, match="math-verify took more than 1 s"):
        math_equal(r"#### \binom{1000000}{500000}", "5")


def test_math_equal_without_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"pip install 'fastlatent\[math\]'"):
        warm_up()


def test_every_built_in_runs_in_the_pool():
    names = REWARDS.names()
    assert {"exact_number", "format", "length", "math_equal"} <= set(names)
    configs = [getattr(REWARDS.find(name, "rewards"), "Config", RewardConfig)(name=name) for name in names]
    columns = {name: {"finish": "stop", "thinking_end": "####"}.get(name, 0) for name in RESERVED}
    with RewardPool(configs, num_workers=1, columns=[]) as pool:
        [result], report = pool.score([RewardJob("q", "2 + 3 = 5 #### 5", "5", columns)])
    assert not any(report.counters().values()), report.errors
    assert result.values == {"exact_number": 1.0, "format": 1.0, "length": 0.0, "math_equal": 1.0}
    assert result.total == 3.0


# The pool


MISHAPS = {
    "hang": ("timeouts", "took more than 1 s"), "spin": ("timeouts", "took more than 1 s"),
    "exit": ("crashes", "exit code 3"), "segfault": ("crashes", "SIGSEGV"), "forge": ("crashes", "nobody asked for"),
    "garble": ("crashes", "nobody asked for"),
    "raise": ("exceptions", "KeyError: 'no such thing' (my_rewards.py:"), "sys.exit": ("exceptions", "SystemExit"),
    "interrupt": ("exceptions", "KeyboardInterrupt"), "recursion": ("exceptions", "RecursionError"),
    "bomb": ("memory_errors", "out of memory"), "slow bomb": ("memory_errors", "out of memory"),
    "text": ("invalid", "returned '1.0', wanted"), "list": ("invalid", "returned [1.0]"),
    "nan": ("invalid", "returned nan"),
    "inf": ("invalid", "returned inf"), "huge": ("invalid", "returned 1000")}


@pytest.mark.parametrize("mishap", MISHAPS)
def test_a_mishap_costs_one_reward_and_is_counted(user_rewards, mishap):
    counter, message = MISHAPS[mishap]
    timeout_s = 1.0 if counter == "timeouts" else 30.0
    configs = [user("seen"), user(timeout_s=timeout_s), RewardConfig(name="exact_number", weight=2.0)]
    batch = jobs("#### 5", mishap, "#### 5", num_tokens=0, forced_end=False)
    with RewardPool(configs, num_workers=1, memory_mb=300) as pool:
        for _ in range(2):  # the second call finds a pool as good as new
            (first, bad, last), report = pool.score(batch)
            assert first.values == last.values == {"seen": 6.0, "judge": 1.0, "exact_number": 1.0}
            assert first.total == last.total == 9.0
            assert bad.values == {"seen": float(len(mishap)), "judge": None, "exact_number": 0.0}
            assert math.isnan(bad.total)
            assert {name: count for name, count in report.counters().items() if count} == {counter: 1}
            [error] = report.errors
            assert error.startswith("judge: ") and message in error


def test_many_mishaps_at_once_leave_the_others_alone(user_rewards):
    completions = ["fine", "exit", "fork", "raise", "none", "fine", "hang", "exit", "true", "nan", "bomb", "fine"] * 2
    with RewardPool([user(timeout_s=4.0)], num_workers=3, memory_mb=300) as pool:
        results, report = pool.score(jobs(*completions))
    harmless = ("fine", "fork", "true")
    assert [r.values["judge"] for r in results] == [1.0 if c in harmless else None for c in completions]
    assert report.counters() == {
        "timeouts": 2, "crashes": 4, "memory_errors": 2, "exceptions": 2, "invalid": 2, "none": 2}
    assert len(report.errors) == 5


def test_none_is_missing_but_no_error(user_rewards):
    with RewardPool([user()], num_workers=1) as pool:
        [result], report = pool.score(jobs("none"))
    assert result.values == {"judge": None} and math.isnan(result.total)
    assert report.num_none == 1 and report.errors == []


def test_a_missing_reward_of_weight_0_does_not_spoil_the_total(user_rewards):
    with RewardPool([user(weight=0.0), user("seen", weight=-0.5)], num_workers=1) as pool:
        [result], report = pool.score(jobs("raise", num_tokens=1, forced_end=True))
    assert result.values == {"judge": None, "seen": 115.0}
    assert result.total == -57.5 and report.num_exceptions == 1


def test_what_functions_print_goes_to_the_log_and_nowhere_else(user_rewards, capfd):
    with RewardPool([user()], num_workers=1, log_path="rewards.log") as pool:
        results, report = pool.score(jobs("print", "fine"))
    assert [r.total for r in results] == [1.0, 1.0] and report.errors == []
    forged = '{"index": 0, "value": 7.0}\n'
    assert (user_rewards / "rewards.log").read_text() == f"{forged}to stderr\n{forged}"
    with RewardPool([user()], num_workers=1) as pool:
        assert pool.score(jobs("print"))[0][0].total == 1.0
    assert capfd.readouterr() == ("", "")


def test_functions_get_the_columns_they_take_and_no_others(user_rewards):
    with RewardPool([user("seen")], num_workers=1) as pool:
        results, _ = pool.score([*jobs("ab", num_tokens=3, forced_end=True, level="hard", more=1),
                                 *jobs("ab", num_tokens=3, forced_end=False)])
    assert [r.total for r in results] == [1132.0, 32.0]


def test_columns_that_json_cannot_carry_arrive_as_text(user_rewards):
    with RewardPool([user("kinds")], num_workers=1) as pool:
        circle: list = []
        circle.append(circle)
        [result], report = pool.score(jobs("c", odd={1, 2}, keys={(1, 2): 3}, nested={"a": [1]}, circle=circle,
                                           prompt="not this one", surrogate="\ud800"))
    assert result.total == 1.0, report.errors


def test_options_of_a_config_reach_the_function(user_rewards):
    configs = [ExactNumberConfig(), ExactNumberConfig(strict=False), LengthConfig(max_tokens=10, cache_tokens=4)]
    with RewardPool(configs, num_workers=1) as pool:
        [result], _ = pool.score(jobs("#### 5 apples", num_tokens=9))
    assert result.values == {"exact_number": 0.0, "exact_number_2": 1.0, "length": -0.75}


def test_names_are_short_and_unique():
    named = ["format", "a.b.format", "m:score", "format", "format_2"]
    unique = ["format", "format_2", "score", "format_3", "format_2_2"]
    assert unique_names([RewardConfig(name=name) for name in named]) == unique


def test_many_and_large_jobs_come_back_in_order():
    big = "x" * 3_000_000  # more than a socket holds
    batch = [RewardJob("p", f"{big if i % 50 == 0 else i} #### {i}", str(i if i % 3 else -1)) for i in range(200)]
    with RewardPool([ExactNumberConfig()], num_workers=2) as pool:
        results, report = pool.score(batch)
        assert pool.score([])[0] == []
    assert [r.total for r in results] == [float(i % 3 != 0) for i in range(200)]
    assert not any(report.counters().values())


def test_a_worker_that_died_between_calls_costs_nothing(user_rewards):
    with RewardPool([user()], num_workers=2) as pool:
        pool.score(jobs("fine"))
        for worker in pool._workers:
            os.kill(worker._process.pid, signal.SIGKILL)
            os.waitid(os.P_PID, worker._process.pid, os.WEXITED | os.WNOWAIT)
        results, report = pool.score(jobs("fine", "fine"))
    assert [r.total for r in results] == [1.0, 1.0]
    assert not any(report.counters().values())


def test_an_interrupted_call_leaves_no_answers_behind(user_rewards):
    class Interrupt(Exception):
        pass

    def interrupt(signum, frame):
        raise Interrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with RewardPool([user()], num_workers=1) as pool:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(Interrupt):
                pool.score(jobs("hang"))
            results, report = pool.score(jobs("raise", "fine"))
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert [r.values["judge"] for r in results] == [None, 1.0]
    assert report.num_exceptions == 1


def test_functions_are_found_in_a_folder_of_any_name(tmp_path, monkeypatch):
    folder = tmp_path / "a:b é '\" "
    folder.mkdir()
    (folder / "in_odd_folder.py").write_text("def one(completion):\n    return 1.0\n")
    monkeypatch.chdir(folder)
    with RewardPool([RewardConfig(name="in_odd_folder.one")], num_workers=1) as pool:
        assert pool.score(jobs("x"))[0][0].total == 1.0


def test_workers_do_not_import_torch(user_rewards):
    configs = [user(), ExactNumberConfig(), LengthConfig(), RewardConfig(name="format"), MathEqualConfig()]
    with RewardPool(configs, num_workers=1) as pool:
        results, _ = pool.score(jobs("torch", "fine", num_tokens=1))
    assert [r.values["judge"] for r in results] == [0.0, 1.0]


@dataclass(kw_only=True)
class _WithOption(RewardConfig):
    colour: str = "red"


@pytest.mark.parametrize("config, message", [
    (RewardConfig(name="exact_numbr"),
     r"rewards\.0.name: 'exact_numbr' is not one of exact_number, format, length, math_equal"),
    (RewardConfig(name="no_such_module.f"),
     r"rewards\.0.name: 'no_such_module.f': no module named 'no_such_module'"),
    (user("no_such_function"), r"rewards\.0.name: module 'my_rewards' has no 'no_such_function'"),
    (RewardConfig(name="broken_rewards:f"), r"importing 'broken_rewards:f' failed with RuntimeError: half an edit"),
    (user("NOT_A_FUNCTION"), r"'my_rewards.NOT_A_FUNCTION' is a int, wanted a function f\(prompt, completion, answer"),
    (user("unrelated"), r"my_rewards.unrelated\(a, b, c\) must take its arguments by the names prompt, completion"),
    (user("positional"), r"my_rewards.positional\(completion, /\) must take its arguments by the names"),
    (user("needs_level"), r"my_rewards.needs_level wants a column 'level'; the data has grade"),
    (_WithOption(name="format"), r"rewards\.0.colour: format takes no such option")])
def test_a_reward_that_cannot_work_is_refused_in_one_sentence(user_rewards, config, message):
    with pytest.raises(UserError, match=message) as caught:
        RewardPool([config], num_workers=2, columns=["grade"])
    assert "\n" not in str(caught.value)


def test_a_worker_that_cannot_be_started_is_done_without(user_rewards, monkeypatch):
    with RewardPool([user()], num_workers=2) as pool:
        monkeypatch.setattr("fastlatent.rewards.pool.WorkerProcess", _no_memory)
        results, report = pool.score(jobs("exit", "fine", "fine"))
        assert [r.values["judge"] for r in results] == [None, 1.0, 1.0] and report.num_crashes == 1
        with pytest.raises(UserError, match="rewards: a worker cannot be started: .*Cannot allocate memory"):
            pool.score(jobs("exit", "fine"))


def _no_memory(*args):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_a_source_file_broken_during_the_run_ends_it_with_the_reason(user_rewards):
    with RewardPool([user()], num_workers=1) as pool:
        (user_rewards / "my_rewards.py").write_text("def judge(:\n")
        with pytest.raises(UserError, match="importing 'my_rewards.judge' failed with SyntaxError"):
            pool.score(jobs("exit", "fine"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
@pytest.mark.parametrize("completion", ["orphan", "spin"])
def test_workers_die_with_a_killed_parent(user_rewards, completion):
    parent = subprocess.Popen([sys.executable, "-c", f"""
import sys, threading, time
sys.path[:0] = {sys.path!r}
from fastlatent.rewards.pool import *
pool = RewardPool([RewardConfig(name="my_rewards.judge", timeout_s=1000)], num_workers=2)
print(*[w._process.pid for w in pool._workers], flush=True)
pool.score([RewardJob("p", "{completion}", "pids")])
"""], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(_is_alive, pids))
    if completion == "orphan":
        _wait_until(lambda: (user_rewards / "pids").exists() and " " in (user_rewards / "pids").read_text())
    else:
        time.sleep(0.3)  # let it reach the function
    parent.kill()
    parent.wait()
    parent.stdout.close()
    if completion == "orphan":  # what a worker started outlives a parent that could not clean up
        os.kill(int((user_rewards / "pids").read_text().split()[1]), signal.SIGKILL)
    try:
        _wait_until(lambda: not any(map(_is_alive, pids)))
    finally:
        for pid in filter(_is_alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_killing_a_worker_kills_what_it_started(user_rewards):
    with RewardPool([user(timeout_s=3.0)], num_workers=1) as pool:
        _, report = pool.score([RewardJob("p", "orphan", "pids")])
    assert report.num_timeouts == 1
    pids = [int(pid) for pid in (user_rewards / "pids").read_text().split()]
    assert len(pids) == 2
    _wait_until(lambda: not any(map(_is_alive, pids)))


def test_close_ends_every_worker(user_rewards):
    pool = RewardPool([user()], num_workers=3)
    pids = [worker._process.pid for worker in pool._workers]
    pool.close()
    pool.close()
    assert len(pids) == 3 and not any(map(_is_alive, pids))


def test_setup_is_json():
    from fastlatent.rewards.wire import setup_message
    message = setup_message([LengthConfig(weight=0.5, cache_tokens=7)], ["b", "a"], 100)
    assert json.loads(json.dumps(message)) == {
        "rewards": [{"path": "length", "where": "rewards.0", "options": {"max_tokens": 1024, "cache_tokens": 7}}],
        "columns": ["a", "b"], "memory_mb": 100}


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _wait_until(condition, timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
