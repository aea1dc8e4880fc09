"""The thinking automaton against the text itself: it must never need to decode what it decides on."""

from __future__ import annotations

import random

import pytest
import tiny
import torch

from fastlatent.rollout.thinking import ThinkingSpan, eos_ids, matcher_table, token_bytes
from fastlatent.schema import AnswerConfig, ThinkingConfig


def make(**options) -> ThinkingSpan:
    answer = AnswerConfig(max_tokens=options.pop("max_answer", None), stop=options.pop("answer_stop", []))
    tokenizer = tiny.tokenizer()
    return ThinkingSpan(tokenizer, len(tokenizer), eos_ids(tokenizer), ThinkingConfig(**options), answer)


def ids(text: str) -> list[int]:
    return tiny.tokenizer().encode(text, add_special_tokens=False)


def walk(span: ThinkingSpan, drawn: list[int]) -> tuple[list[int], list[bool], list[bool], dict]:
    """Step one row; returns what was read, what was acted, where it was read while thinking, and the final state."""
    state = span.start(1, torch.device("cpu"))
    read, acted, thinking = [], [], []
    for token in drawn:
        if state["done"].item():
            break
        step = span.advance(torch.tensor([token]), state)
        read.append(step.read_B.item())
        acted.append(step.acted_B.item())
        thinking.append(step.thinking_B.item())
    return read, acted, thinking, {name: value.item() for name, value in state.items()}


@pytest.mark.parametrize("end", ["####", "##", "ab", "aab", "abab", "Tom", " = 1", "\n\n", "é#"])
def test_thinking_ends_where_the_decoded_text_first_contains_the_end(end):
    tokenizer, span = tiny.tokenizer(), make(end=end)
    # the end's own tokens and characters, pieces that overlap it, and one stranger
    alphabet = [t for piece in (end, *end, *end, end[:2], end[1:], "x") for t in ids(piece)]
    rng, num_ended = random.Random(0), 0
    for _ in range(300):
        drawn = rng.choices(alphabet, k=rng.randint(1, 24))
        _, _, thinking, _ = walk(span, drawn)
        texts = [tokenizer.decode(drawn[: n + 1], skip_special_tokens=True) for n in range(len(drawn))]
        assert thinking == [end not in text for text in texts]
        num_ended += not thinking[-1]
    assert num_ended > 10


def test_the_matcher_equals_a_search_on_random_bytes():
    rng = random.Random(1)
    for _ in range(50):
        pattern = bytes(rng.choices(b"ab", k=rng.randint(1, 6)))
        tokens = [bytes(rng.choices(b"abc", k=rng.randint(0, 5))) for _ in range(30)]
        table = matcher_table(pattern, tokens)
        for _ in range(20):
            state, text = 0, b""
            for index in rng.choices(range(30), k=8):
                state, text = table[index, state], text + tokens[index]
                assert (state == len(pattern)) == (pattern in text)


def test_token_bytes_add_up_to_the_text():
    tokenizer = tiny.tokenizer()
    tokens = token_bytes(tokenizer, len(tokenizer) + 5)
    text = "Tom has 12 äpples — #### ok\n"
    assert b"".join(tokens[i] for i in ids(text)).decode() == text
    assert tokens[tokenizer.eos_token_id] == b""
    assert tokens[len(tokenizer):] == [b""] * 5


def test_a_spent_budget_writes_the_end():
    span = make(end="####", force="\n#### ", max_tokens=3, max_answer=2)
    x, forced = ids("x")[0], ids("\n#### ")
    read, acted, thinking, state = walk(span, [x] * 20)
    assert read == [x] * 3 + forced + [x] * 2
    assert acted == [True] * 3 + [False] * len(forced) + [True] * 2
    assert thinking == [True] * 3 + [False] * (len(forced) + 2)
    assert state["forced_end"] and state["done"] and not state["stopped"]


def test_a_drawn_stop_stays_the_action_and_is_read_as_the_first_forced_token():
    span = make(end="####", force="\n#### ", max_tokens=9, stop=["\n"], max_answer=2)
    x, newline, forced = ids("x")[0], ids("\n")[0], ids("\n#### ")
    for stop in (newline, tiny.tokenizer().eos_token_id):
        read, acted, thinking, state = walk(span, [x, stop] + [x] * 20)
        assert read == [x, *forced, x, x]
        assert acted == [True, True] + [False] * (len(forced) - 1) + [True, True]
        assert thinking[:2] == [True, False]
        assert state["forced_end"]


def test_a_written_end_is_not_forced():
    span = make(end="####", force="\n#### ", max_tokens=9, stop=["\n"], max_answer=2, answer_stop=["\n"])
    drawn = ids("x ####") + ids("5") + ids("\n")
    read, acted, _, state = walk(span, drawn + ids("x") * 9)
    assert read == drawn and all(acted)
    assert state["stopped"] and not state["forced_end"]


def test_without_a_budget_nothing_is_forced_and_eos_stops():
    span = make(end="####", stop=["\n"])
    x, newline, eos = ids("x")[0], ids("\n")[0], tiny.tokenizer().eos_token_id
    read, acted, thinking, state = walk(span, [x, newline, x, eos, x])
    assert read == [x, newline, x, eos] and all(acted) and all(thinking)
    assert state["stopped"] and not state["forced_end"]


def test_an_end_that_is_a_special_token_is_seen():
    span = make(end="<|user|>")
    user = tiny.tokenizer().convert_tokens_to_ids("<|user|>")
    assert walk(span, ids("x") + [user] + ids("x"))[2] == [True, False, False]


def test_rows_do_not_touch_each_other():
    span = make(end="##", force="##", max_tokens=4, stop=["\n"], max_answer=3)
    rng = random.Random(2)
    drawn = [[rng.randrange(len(tiny.tokenizer())) for _ in range(16)] for _ in range(20)]
    together = span.start(20, torch.device("cpu"))
    for place in range(16):
        span.advance(torch.tensor([row[place] for row in drawn]), together)
    for row, tokens in enumerate(drawn):
        alone = span.start(1, torch.device("cpu"))
        for token in tokens:
            span.advance(torch.tensor([token]), alone)
        assert {k: v[row].item() for k, v in together.items()} == {k: v.item() for k, v in alone.items()}
