"""exact_number: 1 where the completion has exactly one delimiter and the right number after it (the rule of HRPO).

Deviation from the HRPO release (arXiv:2505.18454): by default the number must be all there is after the delimiter.
Taking the last number, as the release does and `strict: false` here, lets a policy grow junk around it: #### 2 x 12 =
"""

from __future__ import annotations

from dataclasses import dataclass

from fastlatent.rewards.base import REWARDS, RewardConfig, with_options
from fastlatent.rewards.parse_number import last_number, parse_answer, parse_number


@dataclass(kw_only=True)
class ExactNumberConfig(RewardConfig):
    name: str = "exact_number"
    strict: bool = True
    """The whole text after the delimiter must be one number; false takes the last number of it (units, $ and all)."""


@REWARDS.register("exact_number")
@with_options(ExactNumberConfig)
def exact_number(completion: str, answer: str, thinking_end: str = "####",
                 strict: bool = ExactNumberConfig.strict) -> float:
    """1.0 or 0.0. Numbers are compared exactly: 18 is 18.0, 1,000 is 1000, 3/4 is 0.75.

    Raises:
        ValueError: `answer` is no number.
    """
    expected = parse_answer(answer)
    if expected is None:
        raise ValueError(f"the answer {answer[:60]!r} of this row is not a number")
    if completion.count(thinking_end) != 1:
        return 0.0
    tail = completion.partition(thinking_end)[2]
    return float((parse_number(tail) if strict else last_number(tail)) == expected)
