"""Examples are read whole or refused with their place; order follows the seed; prompts hold what was asked."""

import json
import re
from collections import Counter
from itertools import permutations
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast

from fastlatent.data.base import DATASETS, Example
from fastlatent.data.chat import encode_prompt
from fastlatent.data.hub import Hub
from fastlatent.data.jsonl import Jsonl
from fastlatent.data.order import prompt_indices
from fastlatent.data.word_problems import WordProblems
from fastlatent.errors import UserError
from fastlatent.models import load_tokenizer, resolve_model
from fastlatent.schema import ChatConfig

# ---- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_examples", [1, 2, 3, 5, 16, 17, 257, 1000])
def test_every_epoch_holds_every_example_once(num_examples):
    stream = prompt_indices(num_examples, seed=3, start=0, count=3 * num_examples)
    epochs = [stream[i * num_examples : (i + 1) * num_examples] for i in range(3)]
    assert all(sorted(epoch) == list(range(num_examples)) for epoch in epochs)
    if num_examples >= 16:
        assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
        assert epochs[0] != prompt_indices(num_examples, seed=4, start=0, count=num_examples)


def test_a_position_does_not_depend_on_where_reading_starts():
    stream = prompt_indices(100, 0, 0, 250)
    assert [prompt_indices(100, 0, i, 1)[0] for i in range(250)] == stream
    assert prompt_indices(100, 0, 95, 20) == stream[95:115]


def test_the_order_is_the_same_everywhere():
    """Written down once: a change would break the resuming of every run."""
    assert prompt_indices(39000, 0, 0, 4) == [30799, 1433, 20195, 20064]
    assert prompt_indices(5, 0, 0, 5) == [1, 0, 3, 2, 4]


def test_every_permutation_is_about_as_likely():
    counts = Counter(tuple(prompt_indices(3, seed, 0, 3)) for seed in range(1200))
    assert set(counts) == set(permutations(range(3)))
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 20.5  # chi-squared, 5 degrees of freedom, p = 0.001


def test_billions_of_examples_and_a_long_seed_cost_nothing():
    indices = prompt_indices(10**12, 10**90, 10**13, 100)
    assert len(set(indices)) == 100 and max(indices) > 5 * 10**11


# ---- word problems --------------------------------------------------------------------------------------------------

ADDS = r"buys (\d+) more|finds (\d+) more|gets (\d+) more from a friend"
TAKES = r"gives away (\d+)|loses (\d+)|sells (\d+)"


def parse(example: Example) -> tuple[int, int, str]:
    """(a, b, operation) as a reader of the sentence would have it."""
    a = int(re.match(r"[A-Z][a-z]+ has (\d+) [a-z]+ and ", example.question)[1])
    plus, minus = re.search(ADDS, example.question), re.search(TAKES, example.question)
    assert (plus is None) != (minus is None)
    b = int(next(filter(None, (plus or minus).groups())))
    return a, b, "+" if plus else "-"


@pytest.fixture(scope="module")
def problems() -> WordProblems:
    return WordProblems(WordProblems.Config(), seed=0)


def test_answers_are_what_the_sentences_ask(problems):
    assert problems.train[0].question == "Tom has 1 apples and buys 1 more. How many apples does Tom have now?"
    for example in [*problems.train, *problems.held_out]:
        a, b, operation = parse(example)
        assert int(example.answer) == (a + b if operation == "+" else a - b) > 0
        who, what = re.match(r"(\w+) has \d+ (\w+) and", example.question).groups()
        assert example.question.endswith(f". How many {what} does {who} have now?")


def test_no_held_out_triple_is_ever_trained_on(problems):
    trained, held_out = Counter(map(parse, problems.train)), Counter(map(parse, problems.held_out))
    assert not trained.keys() & held_out.keys()
    assert len(trained) + len(held_out) == 81 + 45
    assert Counter(operation for _, _, operation in held_out) == {"+": 16, "-": 8}
    assert len(problems.held_out) == len({example.question for example in problems.held_out}) == 128


def test_both_operations_are_equally_frequent(problems):
    for examples, half in [(problems.train, 19_500), (problems.held_out, 64)]:
        assert Counter(parse(example)[2] for example in examples) == {"+": half, "-": half}
    assert 20 <= sum(parse(example)[2] == "+" for example in problems.held_out[:64]) <= 44  # mixed


def test_problems_do_not_depend_on_the_seed_and_ids_are_unique(problems):
    other = WordProblems(WordProblems.Config(), seed=1)
    assert list(other.train) == list(problems.train) and other.held_out == problems.held_out
    assert other.fingerprint() == problems.fingerprint()
    ids = [example.id for example in [*problems.train, *problems.held_out]]
    assert sorted(ids) == list(range(len(ids)))


# ---- jsonl ----------------------------------------------------------------------------------------------------------


def write(path, *rows) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read(path, **options) -> Jsonl:
    return Jsonl(Jsonl.Config(train=path, **options), seed=0)


def test_columns_are_found_and_the_others_pass_through(tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": "1+1?", "solution": 2, "level": {"n": 1}}, "",
                 {"problem": "Zoë?", "solution": "x", "level": None})
    data = read(path, question="problem", answer="solution")
    assert data.train == [Example(0, "1+1?", "2", {"level": {"n": 1}}, f"{path}, line 1"),
                          Example(1, "Zoë?", "x", {"level": None}, f"{path}, line 3")]
    assert list(data.held_out) == []


def test_rows_are_held_out_from_the_end_or_from_a_file(tmp_path):
    rows = [{"question": f"q{i}", "answer": i} for i in range(5)]
    path, other = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *rows[:2])
    data = read(path, held_out_size=2)
    assert [e.id for e in data.train] == [0, 1, 2]
    assert [(e.id, e.question) for e in data.held_out] == [(3, "q3"), (4, "q4")]
    data = read(path, held_out=other)
    assert [e.id for e in data.train] == [0, 1, 2, 3, 4]
    assert [(e.id, e.question) for e in data.held_out] == [(5, "q0"), (6, "q1")]


def test_the_answer_may_follow_a_delimiter(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "2*21 = <<2*21=42>>42\n#### 42"})
    assert read(path, answer_after="####").train[0].answer == "42"
    with pytest.raises(UserError, match=r"line 1: column 'answer' holds no data.answer_after='Answer:'"):
        read(path, answer_after="Answer:")


GOOD = {"question": "q", "answer": "a"}


@pytest.mark.parametrize("row, reason", [
    ('{"question": "q", ', r"line 2: not JSON \(.* at character 1[89]\)"),
    ("[", "line 2: not JSON"),
    ('{"question": "q", "answer": NaN}', "line 2: not JSON .NaN"),
    ("[" * 100_000, "line 2: not JSON"),
    ('{"question": "q", "answer": "a", "answer": "b"}', "line 2: not JSON .'answer' is there twice"),
    ('{"question": "q", "answer": "a", "more": [{"x": 1, "x": 1}]}', "line 2: not JSON .'x' is there twice"),
    (r'{"question": "half \ud83d", "answer": "a"}', r"line 2: not Unicode: \\ud83d is half a surrogate pair"),
    (r'{"question": "q", "answer": "a", "more": [{"\uDE00": 1}]}', r"line 2: not Unicode: \\ude00 is half"),
    (["q", "a"], "line 2: wanted a JSON object, got list"),
    ({"qestion": "q", "answer": "a"}, "line 2: there is no column 'question'; did you mean 'qestion'"),
    ({"question": "q", "zz": "a"}, "line 2: there is no column 'answer'; it has question, zz"),
    ({"question": "  ", "answer": "a"}, "line 2: column 'question': .* an empty text"),
    ({"question": 3, "answer": "a"}, "line 2: column 'question': .* got int"),
    ({"question": "q", "answer": None}, "line 2: column 'answer': .* got NoneType"),
    ({"question": "q", "answer": True}, "line 2: column 'answer': .* got bool"),
    ({"question": "q", "answer": ["a"]}, "line 2: column 'answer': .* got list"),
    ({"question": "q", "answer": " "}, "line 2: column 'answer': the answer is empty"),
])
def test_a_malformed_row_is_named(tmp_path, row, reason):
    path = write(tmp_path / "a.jsonl", GOOD, row, GOOD)
    with pytest.raises(UserError, match=reason) as raised:
        read(path)
    assert str(raised.value).startswith(path) and "\n" not in str(raised.value)


def test_what_editors_and_other_systems_leave_in_a_file_is_no_part_of_it(tmp_path):
    path, text = tmp_path / "a.jsonl", "one\u2028two\u0085\U0001f600"
    rows = [json.dumps({"question": text, "answer": "a"}, ensure_ascii=is_ascii).encode() for is_ascii in (True, False)]
    path.write_bytes(b"\xef\xbb\xbf" + rows[0] + b"\r\n \t\r\n" + rows[1] + b"\r\n\n\n")
    assert [(e.question, e.source) for e in read(str(path)).train] == [(text, f"{path}, line 1"), (text, f"{path}, line 3")]


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9", "answer": "a"}\n')
    for options, reason in [
        (dict(train=str(tmp_path / "none.jsonl")), r"none.jsonl: cannot be read \(No such file"),
        (dict(train=str(tmp_path)), "cannot be read .Is a directory"),
        (dict(train=str(tmp_path / "empty.jsonl")), "empty.jsonl: holds no rows"),
        (dict(train=str(tmp_path / "latin.jsonl")), "latin.jsonl, line 1: not UTF-8 at byte 18"),
        (dict(train=""), "data.train: wanted a file"),
        (dict(train="~nobody-of-this-name/a.jsonl"), "~nobody-of-this-name/a.jsonl: cannot be read .No such file"),
        (dict(train=path, held_out=path, held_out_size=1), "data.held_out_size: .* not both"),
        (dict(train=path, held_out_size=1), r"data.held_out_size: wanted 0 to 0, as .* has 1 rows, got 1"),
        (dict(train=path, held_out_size=-1), "data.held_out_size"),
    ]:
        with pytest.raises(UserError, match=reason):
            Jsonl(Jsonl.Config(**options), seed=0)


def test_the_fingerprint_follows_content_and_split(tmp_path):
    rows = [{"question": f"q{i}", "answer": i, "more": [i]} for i in range(4)]
    path = write(tmp_path / "a.jsonl", *rows)
    copy = write(tmp_path / "b.jsonl", *rows)
    changed = write(tmp_path / "c.jsonl", *rows[:3], rows[3] | {"more": [4]})
    prints = [read(path).fingerprint(), read(changed).fingerprint(), read(path, held_out_size=1).fingerprint()]
    assert len(set(prints)) == 3 and all(re.fullmatch("[0-9a-f]{64}", p) for p in prints)
    assert read(copy).fingerprint() == prints[0]


# ---- hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "gsm"
    folder.mkdir()
    write(folder / "train.jsonl", *({"question": f"q{i}", "answer": f"so\n#### {i}", "kind": "k"} for i in range(4)))
    write(folder / "test.jsonl", {"question": "t", "answer": "#### 9", "kind": "k"})
    return str(folder)


def test_a_folder_is_read_as_the_hub_is(hub_folder):
    data = Hub(Hub.Config(path=hub_folder, held_out_split="test", answer_after="####"), seed=0)
    got = [(e.id, e.question, e.answer, e.columns) for e in data.train]
    assert got == [(i, f"q{i}", str(i), {"kind": "k"}) for i in range(4)]
    assert [(e.id, e.question, e.answer) for e in data.held_out] == [(4, "t", "9")]
    assert [e.id for e in Hub(Hub.Config(path=hub_folder, split="train[:2]"), seed=0).train] == [0, 1]


def test_what_the_hub_cannot_give_is_one_sentence(hub_folder, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.mkdir()
    write(broken / "train.jsonl", GOOD, "{")
    for options, reason in [
        (dict(path=""), "data.path: wanted the name"),
        (dict(path=str(tmp_path / "none")), "split 'train' of .* cannot be read"),
        (dict(path=hub_folder, split="dev"), "split 'dev' of .* cannot be read .*dev"),
        (dict(path=hub_folder, config="main"), "cannot be read .*main"),
        (dict(path=str(broken)), "cannot be read"),
        (dict(path=hub_folder, question="problem"), "split train, row 0: there is no column 'problem'"),
    ]:
        with pytest.raises(UserError, match=reason) as raised:
            Hub(Hub.Config(**options), seed=0)
        assert "\n" not in str(raised.value)


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="split 'train' of 'nobody/nothing' cannot be read .*Hub"):
        Hub(Hub.Config(path="nobody/nothing"), seed=0)


def test_without_datasets_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'fastlatent\[data\]'"):
        Hub(Hub.Config(path="x"), seed=0)


# ---- chat -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(resolve_model("smollm2-135m-instruct"))


EXAMPLE = Example(7, "How many?", "3")


def test_the_quickstart_prompt_holds_the_question_and_nothing_else(tokenizer):
    text, token_ids = encode_prompt(tokenizer, EXAMPLE, ChatConfig())
    assert text == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(token_ids) == text and token_ids.count(1) == 2 and token_ids.count(2) == 1


def test_system_prompt_and_suffix_stand_where_they_belong(tokenizer):
    text, token_ids = encode_prompt(tokenizer, EXAMPLE, ChatConfig(system="Be brief.", suffix=" Think."))
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many? Think.<|im_end|>\n"
                    "<|im_start|>assistant\n")
    assert tokenizer.decode(token_ids) == text


def test_bare_text_gets_the_tokenizers_own_special_tokens_and_a_template_does_not():
    def encode(text, add_special_tokens=True):
        return [1] * add_special_tokens + [9] * len(text)

    def apply_chat_template(turns, tokenize, add_generation_prompt):
        return "".join(turn["content"] for turn in turns) + ">" * add_generation_prompt

    fake = SimpleNamespace(encode=encode, apply_chat_template=apply_chat_template, chat_template="t", name_or_path="m")
    assert encode_prompt(fake, EXAMPLE, ChatConfig(template=False, suffix="!")) == ("How many?!", [1] + [9] * 10)
    assert encode_prompt(fake, EXAMPLE, ChatConfig()) == ("How many?>", [9] * 10)
    with pytest.raises(UserError, match="chat.system"):
        encode_prompt(fake, EXAMPLE, ChatConfig(template=False, system="s"))
    fake.chat_template = None
    with pytest.raises(UserError, match="m has no chat template"):
        encode_prompt(fake, EXAMPLE, ChatConfig())


def test_a_template_may_refuse_a_system_prompt(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match="refuses this prompt: no system role"):
        encode_prompt(tokenizer, EXAMPLE, ChatConfig(system="s"))


def test_a_long_prompt_names_its_row(tokenizer):
    length = len(encode_prompt(tokenizer, EXAMPLE, ChatConfig())[1])
    encode_prompt(tokenizer, EXAMPLE, ChatConfig(max_prompt_tokens=length))
    for source, where in [("", "example 7"), ("a.jsonl, line 3", "a.jsonl, line 3")]:
        example = Example(7, "How many?", "3", source=source)
        reason = f"^{where}: the prompt has {length} tokens, more than chat.max_prompt_tokens=5$"
        with pytest.raises(UserError, match=reason):
            encode_prompt(tokenizer, example, ChatConfig(max_prompt_tokens=5))


def test_the_family_finds_its_members():
    assert {"jsonl", "hub", "word_problems"} <= set(DATASETS.names())
    assert DATASETS.find("word_problems", "data.name") is WordProblems
