"""Numbers as people write them, read exactly and without evaluating anything.

Read: 18, -3, +3, .5, 18.0, 1,000 and 3/4, in ASCII digits. No exponents: 1e999999999 would be a number to run from.
"""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?|\.[0-9]+"
_WHOLE = re.compile(rf"[-+]?(?:{NUMBER})")
# a sign after a digit, letter or bracket is an operator: "10-3" ends in 3
_ANYWHERE = re.compile(rf"((?<![0-9A-Za-z)])[-+])?\$?({NUMBER})")
_MAX_CHARS = 100  # an answer this long is no answer, and reading digits takes quadratic time


def parse_number(text: str) -> Fraction | None:
    """The exact value of `text` where the whole of it, but for white space around, is one number; else None."""
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    if len(text) > _MAX_CHARS or not _WHOLE.fullmatch(text):
        return None
    numerator, _, denominator = text.replace(",", "").partition("/")
    if not denominator:
        return Fraction(numerator)
    return Fraction(numerator) / int(denominator) if int(denominator) else None


def last_number(text: str) -> Fraction | None:
    """The exact value of the last number in `text`, whatever surrounds it; None where there is none."""
    last = None
    for last in _ANYWHERE.finditer(text.replace("\N{MINUS SIGN}", "-")):
        pass
    return parse_number((last[1] or "") + last[2]) if last else None


def parse_answer(text: str) -> Fraction | None:
    """The value of a reference answer: one number, with a leading `$` or a trailing `%` or `.` allowed."""
    text = text.strip()
    sign, text = ("-", text[1:]) if text.startswith("-$") else ("", text)
    return parse_number(sign + text.removeprefix("$").removesuffix(".").removesuffix("%"))
