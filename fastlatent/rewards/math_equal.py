"""math_equal: 1 where the answer is mathematically equal to the reference, as math-verify sees it.

Model output is hostile: `9^{9^{9^9}}` keeps a computer algebra system busy for good. So equal strings and numbers are
decided here, what looks explosive is wrong unread, and math-verify only gets LaTeX (its other parser calls `eval`). A
comparison that still runs out of time is a missing reward, not a wrong answer: a loaded machine must not teach.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from fastlatent.errors import UserError
from fastlatent.rewards.base import REWARDS, RewardConfig, with_options
from fastlatent.rewards.parse_number import last_number, parse_answer

_MAX_CHARS = 200
_MAX_DEPTH = 10
_MAX_DIGITS = 30
_MAX_EXPONENT = 999  # of one exponent, and the square of it of all exponents multiplied
_MATH_TIMEOUT_S = 1  # whole seconds; one parse or comparison. Three of them fit into the default timeout_s


@dataclass(kw_only=True)
class MathEqualConfig(RewardConfig):
    name: str = "math_equal"
    require_delimiter: bool = True
    """Reward only completions with exactly one delimiter, and look after it; false looks for \\boxed{} anywhere."""


@REWARDS.register("math_equal")
@with_options(MathEqualConfig)
def math_equal(completion: str, answer: str, thinking_end: str = "####",
               require_delimiter: bool = MathEqualConfig.require_delimiter) -> float:
    """1.0 or 0.0 for the last `\\boxed{}` of the completion, or else all of the text after its delimiter.

    Raises:
        TimeoutError: math-verify did not come to a decision.
    """
    num_delimiters = completion.count(thinking_end)
    if require_delimiter and num_delimiters != 1:
        return 0.0
    tail = completion.rpartition(thinking_end)[2] if num_delimiters else ""
    found = last_boxed(tail if require_delimiter else completion)
    return _equal(found if found is not None else tail.strip(), answer.strip())


def warm_up() -> None:
    """Import math-verify and let it build its grammar, seconds of work that no completion should pay for."""
    try:
        import math_verify  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("rewards: math_equal needs math-verify: pip install 'fastlatent[math]'") from None
    _math_verify_equal(r"\frac{x}{2}", r"\frac{x}{3}")


math_equal.warm_up = warm_up


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` whose braces close; None where there is none."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len(r"\boxed"), len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start + len(r"\boxed{"):end].strip()
    return None


def is_hostile(text: str) -> bool:
    """True for text that could keep computer algebra busy: long, deeply nested, towers of powers, large factorials."""
    if len(text) >= _MAX_CHARS or re.search(rf"[0-9]{{{_MAX_DIGITS + 1},}}|\*\*|[)}}\]!]\s*!|[0-9]{{4,}}\s*!", text):
        return True
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    exponents = [int(digits) for digits in re.findall(r"\^[\s{(+-]*([0-9]+)", text)]
    return (deepest > _MAX_DEPTH or _has_power_tower(text) or max(exponents, default=0) > _MAX_EXPONENT
            or math.prod(exponents) > _MAX_EXPONENT**2)


def _has_power_tower(text: str) -> bool:
    """True where an exponent holds a `^` itself: `2^{3^4}`, `2^3^4`."""
    for start in (match.end() for match in re.finditer(r"\^\s*", text)):
        depth, end = 0, start
        while end < len(text):
            depth += (text[end] in "({") - (text[end] in ")}")
            end += 1
            if depth <= 0:
                break
        # the character after the exponent: 2^3^4 and 2^{3}^4 are towers as well
        if "^" in text[start:end] or text[end:].lstrip().startswith("^"):
            return True
    return False


@lru_cache(maxsize=4096)
def _equal(found: str, answer: str) -> float:
    if not found or len(found) >= _MAX_CHARS:
        return 0.0
    if _plain(found) == _plain(answer):
        return 1.0
    expected = parse_answer(_plain(answer))
    if expected is not None:
        number = parse_answer(_plain(found))
        # prose, as in "28 apples": two letters in a row that belong to no LaTeX command
        if number is None and re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}", found):
            number = last_number(found)
        if number is not None:
            return float(number == expected)
    if is_hostile(found) or is_hostile(answer):
        return 0.0
    return float(_math_verify_equal(found, answer))


def _plain(text: str) -> str:
    """`text` without what carries no meaning: white space, dollars, sizes and a wrapping \\text."""
    text = re.sub(r"\\left|\\right|\\[,!;: ]|\\?\$|\s+", "", text)
    return re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", text).removesuffix(".").replace(r"\dfrac", r"\frac")


def _math_verify_equal(found: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException

    def parsed(text: str) -> list:
        return parse(f"${text.replace('$', '')}$", [LatexExtractionConfig()], parsing_timeout=_MATH_TIMEOUT_S,
                     raise_on_error=True)

    try:
        return verify(parsed(answer), parsed(found), timeout_seconds=_MATH_TIMEOUT_S, raise_on_error=True)
    except TimeoutException:
        raise TimeoutError(f"math-verify took more than {_MATH_TIMEOUT_S} s over {found!r}") from None
    except Exception:  # noqa: BLE001: whatever a parser of arbitrary text trips over, the text equals nothing
        return False
