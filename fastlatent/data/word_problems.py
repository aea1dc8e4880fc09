"""The quickstart's problems: one addition or subtraction in a sentence, numbered, with nothing drawn at random.

"Tom has 7 apples and buys 5 more. How many apples does Tom have now?" Both numbers go from 1 to 9; to take away, the
larger of the two plus one stands first, so that something is left. 10 names, 10 things, 3 verbs that add and 3 that
take away make 300 sentences for each operation and each of the 81 number pairs: 48,600 problems (a take-away of two
different numbers comes twice, once for either order of the pair, which keeps both operations equally frequent).

Held out are whole triples (a, b, operation): 16 of the 81 additions and 8 of the 45 take-aways, chosen by hash. The
other triples make the 39,000 training problems, half of them additions; 128 problems of the held-out triples, 64 of
each operation, make the held-out set. Neither depends on the run's seed.

Each problem has a chain of thought to imitate, "7+5=12", as its column `chain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from fastlatent.data.base import DATASETS, DataConfig, Dataset, Example

NAMES = "Tom Anna Sam Lily Ben Mia Jack Sara Leo Emma".split()
THINGS = "apples books coins stamps marbles pencils cookies shells toys cards".split()
VERBS = {+1: ["buys {b} more", "finds {b} more", "gets {b} more from a friend"],
         -1: ["gives away {b}", "loses {b}", "sells {b}"]}
NUM_WORDINGS = len(NAMES) * len(THINGS) * len(VERBS[+1])


class Triple(NamedTuple):
    """What is to be computed: a + sign * b."""

    a: int
    b: int
    sign: int


@DATASETS.register("word_problems")
class WordProblems(Dataset):
    """Ids number the training problems from 0, then those held out."""

    @dataclass(kw_only=True)
    class Config(DataConfig):
        name: str = "word_problems"

    def __init__(self, config: Config, seed: int):
        super().__init__(config, seed)
        held_out = _held_out_triples()
        self.train = Problems([triple for triple in _all_triples() if triple not in held_out])
        self.held_out = _held_out_problems(held_out, first_id=len(self.train))


class Problems(Sequence[Example]):
    """Every wording of every triple; problem i is made when it is read."""

    def __init__(self, triples: list[Triple]):
        self.triples = triples

    def __len__(self) -> int:
        return len(self.triples) * NUM_WORDINGS

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(i)
        triple, wording = divmod(i, NUM_WORDINGS)
        return problem(i, self.triples[triple], wording)


def problem(id: int, triple: Triple, wording: int) -> Example:
    """The problem that asks `triple` in one of NUM_WORDINGS ways."""
    rest, verb = divmod(wording, len(VERBS[triple.sign]))
    name, thing = NAMES[rest // len(THINGS)], THINGS[rest % len(THINGS)]
    happens = VERBS[triple.sign][verb].format(b=triple.b)
    question = f"{name} has {triple.a} {thing} and {happens}. How many {thing} does {name} have now?"
    result = triple.a + triple.sign * triple.b
    chain = f"{triple.a}{'+' if triple.sign > 0 else '-'}{triple.b}={result}"
    return Example(id, question, str(result), {"chain": chain})


def _all_triples() -> list[Triple]:
    """One for each operation and ordered pair of numbers; a take-away of two different numbers is there twice."""
    pairs = [(x, y) for x in range(1, 10) for y in range(1, 10)]
    return [Triple(x, y, +1) for x, y in pairs] + [Triple(max(x, y) + 1, min(x, y), -1) for x, y in pairs]


def _held_out_triples() -> list[Triple]:
    triples = sorted(set(_all_triples()), key=_hash)
    additions = [triple for triple in triples if triple.sign > 0]
    # of two different numbers: each takes two places of the enumeration, 8 as many as the 16 additions
    subtractions = [triple for triple in triples if triple.sign < 0 and triple.a != triple.b + 1]
    return additions[:16] + subtractions[:8]


def _held_out_problems(triples: list[Triple], first_id: int) -> list[Example]:
    problems = []
    for triple in triples:
        num_wordings = 4 if triple.sign > 0 else 8  # 16 * 4 and 8 * 8: as many of either operation
        wordings = sorted(range(NUM_WORDINGS), key=lambda wording: _hash((*triple, wording)))
        problems += [problem(first_id + len(problems) + i, triple, wordings[i]) for i in range(num_wordings)]
    # mixed, so that the first n of them are a fair sample too
    return sorted(problems, key=lambda example: _hash((example.id,)))


def _hash(numbers: tuple[int, ...]) -> bytes:
    return sha256(" ".join(map(str, numbers)).encode()).digest()
