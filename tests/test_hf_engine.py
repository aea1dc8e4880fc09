"""The in-process engine's decode step: one graph, no recompiles, no host synchronisation; and its answers to odd requests."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from test_replay import EVERY, FORCED
from torch.utils._python_dispatch import TorchDispatchMode

from fastlatent.errors import UserError
from fastlatent.methods.base import METHODS
from fastlatent.rollout.base import match
from fastlatent.rollout.hf_engine import HFEngine
from fastlatent.schema import AnswerConfig, ThinkingConfig
from fastlatent.types import Capability, Sampling

FREE = (ThinkingConfig(end="####"), AnswerConfig())
SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}


class Syncs(TorchDispatchMode):
    """Names of the operators that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in SYNCS:
            self.seen.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("method", EVERY)
def test_a_decode_step_never_waits_for_the_device(method, top_k):
    engine = tiny.engine(tiny.policy(method), *FORCED, kv="static")
    original, seen = engine._step, []

    def watched(*args):
        with Syncs() as syncs:
            original(*args)
        seen.append(syncs.seen)

    engine._step = watched
    engine.generate(tiny.requests(tiny.prompts([5, 9]), 3), Sampling(temperature=0.8, top_k=top_k, max_new_tokens=32))
    assert len(seen) > 10
    assert not any(seen), seen


def test_the_sync_detector_detects():
    with Syncs() as syncs:
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
    assert syncs.seen == ["aten::_local_scalar_dense", "aten::nonzero"]


@pytest.mark.parametrize("method", [*METHODS.names(), "feedback.Gaussian"])
def test_the_decode_step_is_one_graph_without_recompiles(method):
    """fullgraph=True raises on a graph break; error_on_recompile on any further shape, over 100 steps."""
    torch._dynamo.reset()
    policy = tiny.policy(method)
    requests, sampling = tiny.requests(tiny.prompts([5, 9]), 2), Sampling(temperature=0.8, max_new_tokens=120)
    compiled = tiny.engine(policy, *FREE, kv="static", compile=True, read_every=200)
    first_step, steps = compiled._step, []

    def counted(*args):
        with torch._dynamo.config.patch(error_on_recompile=len(steps) > 0):
            first_step(*args)
        steps.append(1)

    compiled._step = counted
    rollouts = compiled.generate(requests, sampling)
    assert len(steps) >= 100
    plain = tiny.engine(policy, *FREE, kv="static", read_every=200).generate(requests, sampling)
    assert [r.token_ids for r in rollouts] == [r.token_ids for r in plain]


def test_a_compiled_step_serves_prompts_of_many_lengths_and_batches_of_many_sizes(monkeypatch):
    """A graph for each power of two of the longest prompt and each number of rows, however few torch allows for by itself."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # what is traced is the subject
    policy, sampling = tiny.policy("grpo"), Sampling(temperature=0.8, max_new_tokens=4)
    compiled, plain = (tiny.engine(policy, *FREE, kv="static", compile=on, read_every=9) for on in (True, False))

    def same(length: int, group_size: int) -> bool:
        requests = tiny.requests(tiny.prompts([length, 3]), group_size)
        got, wanted = (engine.generate(requests, sampling) for engine in (compiled, plain))
        return [r.token_ids for r in got] == [r.token_ids for r in wanted]

    with torch._dynamo.config.patch(recompile_limit=1):
        assert same(9, 2)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert all(same(length, 2) for length in (12, 16))
        assert same(17, 2) and same(9, 1)


def test_finished_rows_are_dropped():
    engine = tiny.engine(tiny.policy("grpo"), *FORCED)
    original, sizes = engine._step, []

    def watched(rows, *args):
        sizes.append(rows.slot_B.shape[0])
        original(rows, *args)

    engine._step = watched
    rollouts = engine.generate(tiny.requests(tiny.prompts([5, 9, 7]), 8), Sampling(temperature=0.8, max_new_tokens=32))
    needed = sum(len(r.token_ids) for r in rollouts)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]
    assert sum(sizes) <= 1.25 * needed


def test_greedy_takes_the_likeliest_token_whatever_the_step():
    engine = tiny.engine(tiny.policy("hrpo"), *FORCED)
    prompts, sampling = tiny.prompts([5, 9]), Sampling(temperature=0.8, max_new_tokens=32, greedy=True)
    first = engine.generate(tiny.requests(prompts, 2, step=0), sampling)
    later = engine.generate(tiny.requests(prompts, 2, step=3), sampling)
    assert [r.token_ids for r in first] == [r.token_ids for r in later]
    assert first[0].token_ids == first[1].token_ids


def test_every_published_tensor_arrives_bit_for_bit():
    policy = tiny.policy("hrpo", is_tied=True)
    engine = tiny.engine(policy, *FORCED)
    stream = dict(policy.published())
    arrived = dict(engine.model.named_parameters()) | {f"method.{n}": p for n, p in engine.method.named_parameters()}
    assert set(stream) == set(arrived)
    for name, tensor in stream.items():
        assert torch.equal(tensor, arrived[name]), name
    assert engine.model.lm_head.weight is engine.model.get_input_embeddings().weight


def test_a_stream_that_lacks_a_weight_is_refused():
    policy = tiny.policy("hrpo")
    engine = tiny.engine(policy, *FORCED)
    with pytest.raises(RuntimeError, match="lacked method.gate_lambda"):
        engine.load_weights(((n, t) for n, t in policy.published() if n != "method.gate_lambda"), 1)


def test_what_an_engine_cannot_do_is_said_by_name():
    class Needy(METHODS.find("grpo", "")):
        name, needs = "needy", frozenset({Capability.HIDDEN, Capability.LOGITS})

    match(Needy, "hf", HFEngine.capabilities)
    with pytest.raises(UserError, match="method 'needy' needs LOGITS; engine 'mine' offers HIDDEN, TOKENS"):
        match(Needy, "mine", frozenset({Capability.TOKENS, Capability.HIDDEN}))


def test_compiling_a_growing_cache_is_refused():
    with pytest.raises(UserError, match="engine.compile: needs engine.kv=static"):
        tiny.engine(tiny.policy("grpo"), *FREE, kv="growing", compile=True)


@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("is_tied", [True, False])
def test_prepacked_weights_are_the_weights_after_every_load(is_tied, top_k):
    policy = tiny.policy("hrpo", is_tied=is_tied)
    engines = [tiny.engine(policy, *FORCED, prepack=on) for on in (True, False)]
    assert [len(engine.packed_layers) for engine in engines] == [2 * 7 + 1, 0]
    requests, sampling = tiny.requests(tiny.prompts([5, 9]), 3), Sampling(temperature=0.8, top_k=top_k, max_new_tokens=32)
    answers = []
    for version in range(2):
        packed, plain = (engine.generate(requests, sampling) for engine in engines)
        assert [r.token_ids for r in packed] == [r.token_ids for r in plain]
        for a, b in zip(packed, plain, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=2e-4, rtol=0)
        answers.append([r.token_ids for r in packed])
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.3)
        for engine in engines:
            engine.load_weights(policy.published(), version + 1)
    assert answers[0] != answers[1]  # else stale weights would have passed


def test_prompts_that_come_again_are_read_once_until_the_weights_change():
    policy = tiny.policy("hrpo")
    engine = tiny.engine(policy, *FORCED)
    original, reads = engine._read, []

    def counted(key, prompts):
        reads.append(len(prompts))
        return original(key, prompts)

    engine._read = counted
    prompts, sampling = tiny.prompts([5, 9]), Sampling(temperature=0.8, max_new_tokens=32)
    first = engine.generate(tiny.requests(prompts, 2), sampling)
    again = engine.generate(tiny.requests(prompts, 2), sampling)
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert [r.logprobs for r in first] == [r.logprobs for r in again]
    assert reads == [2]
    engine.generate(tiny.requests(prompts[:1], 2), sampling)
    engine.load_weights(policy.published(), 1)
    engine.generate(tiny.requests(prompts[:1], 2), sampling)
    with engine.released():
        pass
    engine.generate(tiny.requests(prompts[:1], 2), sampling)
    assert reads == [2, 1, 1, 1]
