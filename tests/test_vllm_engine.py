"""Stock vLLM with our latents: the replay law, and the tokens of the hf engine, whatever the scheduler does on the way."""

from __future__ import annotations

import functools
import random
import weakref
from dataclasses import replace
from importlib.util import find_spec

import pytest
import test_replay
import tiny
import torch
from test_replay import (
    BF16_CONTROL_FACTOR, BF16_MEAN_TOLERANCE, EVERY, FORCED, FP32_TOLERANCE, SAMPLED, TEMPERATURE, batches, gaps)
from waits import Crossings, watched

from fastlatent.config import load_config
from fastlatent.errors import UserError
from fastlatent.evaluation import ablated
from fastlatent.profiling import reset_timings, timings, watch
from fastlatent.rollout.vllm_engine import CPU_HEAD_SIZES, VLLMEngine
from fastlatent.schema import AnswerConfig, ThinkingConfig
from fastlatent.types import Rollout, Sampling
from fastlatent.vllm_plugin import surface
from fastlatent.vllm_plugin.cpu_norm import PROVIDER

# looked for, not imported: vllm changes the process that imports it, and other tests share this one
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="the CPU build of vllm is not installed: make vllm")

SAMPLING = Sampling(temperature=TEMPERATURE, max_new_tokens=32)
TRUNCATED = replace(SAMPLING, top_k=50)
LENGTHS = [3, 41, 70, 8]  # with 32 tokens a step, prompts are read in chunks
ENDS = {"forced": FORCED, "sampled": SAMPLED}
CHUNKED = {"max_batch": 16, "max_batch_tokens": 32, "kv_cache_gib": 0.05}


@functools.cache
def policy(method: str = "hrpo", **options):
    return tiny.policy(method, num_heads=2, **options)  # vLLM's CPU attention wants heads of 32


def start(policy_, ends=FORCED, *, max_new: int = 32, max_prompt: int = 256, has_eos: bool = True, **options) -> VLLMEngine:
    parts = tiny.parts(policy_, *ends, max_new=max_new, max_prompt=max_prompt, has_eos=has_eos)
    engine = VLLMEngine.build(VLLMEngine.Config(**CHUNKED | options), parts)
    engine.load_weights(policy_.published(), 0)
    return engine


@functools.cache
def plain_engine() -> VLLMEngine:
    """HRPO with forced ends; for tests that leave its weights as they are."""
    return start(policy())


def requests(lengths=LENGTHS, group_size: int = 4, step: int = 0):
    return tiny.requests(tiny.prompts(lengths), group_size, step)


def hf(policy_, ends, requests_, sampling=SAMPLING) -> list[Rollout]:
    return tiny.engine(policy_, *ends).generate(requests_, sampling)


def tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [r.token_ids for r in rollouts]


# ---- the law -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("method", EVERY)
def test_replay_and_the_tokens_of_the_hf_engine(method, ends):
    ours = start(policy(method), ENDS[ends]).generate(requests(), SAMPLING)
    theirs = hf(policy(method), ENDS[ends], requests())
    assert tokens(ours) == tokens(theirs)
    for name in ("target_ids", "acted", "latent", "thinking", "finish", "forced_end"):
        assert [getattr(r, name) for r in ours] == [getattr(r, name) for r in theirs], name
    assert gaps(policy(method), batches(ours, "packed")).max() <= FP32_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_replay_of_other_families(family):
    of_family = policy(family=family, is_tied=family == "llama")
    ours = start(of_family).generate(requests(), SAMPLING)
    assert tokens(ours) == tokens(hf(of_family, FORCED, requests()))
    assert gaps(of_family, batches(ours, "packed")).max() <= FP32_TOLERANCE


@pytest.mark.parametrize("method", ["hrpo", "feedback.Hidden"])
def test_replay_in_bfloat16(method):
    half = policy(method, dtype="bfloat16")
    rollouts = start(half).generate(requests(), SAMPLING)
    mean = gaps(half, batches(rollouts, "packed")).mean()
    assert mean <= BF16_MEAN_TOLERANCE
    assert gaps(half, batches(rollouts, "packed"), test_replay.without_latents).mean() >= BF16_CONTROL_FACTOR * mean


@pytest.mark.parametrize("freeze", [False, True])
def test_replay_of_a_truncated_policy(freeze):
    truncated = policy(freeze_embedding=freeze)
    rollouts = start(truncated).generate(requests(), TRUNCATED)
    assert set(rollouts[0].trace.record) == ({"ids", "weights"} if freeze else {"mixture"})
    assert tokens(rollouts) == tokens(hf(truncated, FORCED, requests(), TRUNCATED))
    assert gaps(truncated, batches(rollouts, "packed")).max() <= FP32_TOLERANCE
    assert min(k for r in rollouts for k in r.log_kept) < -0.01


@pytest.mark.parametrize("fault", [test_replay.without_latents, test_replay.shifted_record, test_replay.attended_pads])
def test_a_fault_in_the_batch_is_caught(fault):
    replayed = batches(plain_engine().generate(requests(), SAMPLING), "packed")
    assert gaps(policy(), replayed, fault).max() > FP32_TOLERANCE
    assert gaps(policy(), batches(plain_engine().generate(requests(), SAMPLING), "packed"), fault).mean() > BF16_MEAN_TOLERANCE


def test_long_completions():
    ends = (ThinkingConfig(end="never written"), AnswerConfig())
    engine = start(policy(), ends, max_new=1024, has_eos=False, max_batch_tokens=256)
    rollouts = engine.generate(requests([3, 41], 2), replace(SAMPLING, max_new_tokens=1024))
    assert [len(r.token_ids) for r in rollouts] == [1024] * 4
    assert gaps(policy(), batches(rollouts, "single")).max() <= FP32_TOLERANCE


# ---- what the scheduler does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hrpo", "feedback.Hidden"])
def test_preempted_requests_go_on_where_they_were(method, monkeypatch):
    # most completions cross from one block of 32 into the next, and there are too few blocks for all
    engine, wanted = start(policy(method), block_size=32, num_kv_blocks=9, max_prompt=64), requests([20, 28, 60])
    scheduler = engine.engine.engine_core.engine_core.scheduler
    preempted, stock = [], scheduler._preempt_request

    def count(request, *args, **options):
        preempted.append(request.num_output_tokens)
        return stock(request, *args, **options)

    monkeypatch.setattr(scheduler, "_preempt_request", count)
    rollouts = engine.generate(wanted, SAMPLING)
    assert len(preempted) > 3 and max(preempted) > 3  # in the middle of their thinking
    assert tokens(rollouts) == tokens(hf(policy(method), FORCED, wanted))
    assert gaps(policy(method), batches(rollouts, "packed")).max() <= FP32_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_forward_gives_the_bits_of_vllm_s(family, dtype, monkeypatch):
    """At every step, chunks of prompts included. Both write the same keys and values."""
    from fastlatent.vllm_plugin import cpu_forward

    engine, ours, equal = start(policy(family=family, dtype=dtype)), cpu_forward.hidden_states, []
    stock = type(engine.runner.model).__mro__[1].forward

    def both(model, position_T, input_TD, context):
        wanted_TD = stock(engine.runner.model, None, position_T, None, input_TD.clone())
        equal.append(torch.equal(ours(model, position_T, input_TD, context), wanted_TD))
        return wanted_TD

    monkeypatch.setattr(cpu_forward, "hidden_states", both)
    engine.generate(requests(), SAMPLING)
    assert len(equal) > 20 and all(equal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", CPU_HEAD_SIZES)
def test_attention_with_blocks_of_16_is_float64_s(head_size, dtype):
    """Five queries of two texts, of 23 and 40 tokens, by vLLM's kernels for plain vectors, in blocks that lie in any order."""
    import vllm.platforms
    from vllm import _custom_ops as ops

    from fastlatent.vllm_plugin.cpu_attention import BLOCK_SIZE

    vllm.platforms.current_platform.import_kernels()
    draw, lengths, heads, kv_heads = torch.Generator().manual_seed(head_size), [23, 40], 4, 2

    def new(*shape):
        return torch.randn(*shape, generator=draw).to(dtype)

    cache = new(8, kv_heads, 2 * BLOCK_SIZE, head_size)  # with what others have left there
    keys, values = cache.chunk(2, dim=2)
    blocks = torch.tensor([[6, 1, 0], [3, 7, 2]], dtype=torch.int32)
    texts = [(new(5, heads, head_size), new(n, kv_heads, head_size), new(n, kv_heads, head_size)) for n in lengths]
    for row, (_, k, v) in enumerate(texts):
        place = torch.arange(lengths[row])
        slot = blocks[row, place // BLOCK_SIZE].long() * BLOCK_SIZE + place % BLOCK_SIZE
        ops.cpu_attn_reshape_and_cache(k, v, keys, values, slot, "vec16")
    start, seq_lens = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=2, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_size, seq_lens=seq_lens, dtype=dtype,
        query_start_loc=start, causal=True, sliding_window_size=-1, isa="vec16", enable_kv_split=True)
    query = torch.cat([q for q, _, _ in texts])
    out = torch.empty_like(query)
    ops.cpu_attention_with_kv_cache(query, keys, values, out, start, seq_lens, head_size**-0.5, True, None, -1, blocks, 0,
                                        plan, None)
    wanted = []
    for q, k, v in texts:
        q, k, v = (x.double().transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
        n = k.shape[1]
        is_seen = torch.arange(n)[None] <= torch.arange(n - 5, n)[:, None]
        wanted.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=is_seen).transpose(0, 1))
    error = (out.double() - torch.cat(wanted)).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_no_request_goes_on_with_keys_and_values_of_its_siblings(monkeypatch):
    """One token more fills a block: 40 siblings' blocks differ by the name of that token, of which there are 319."""
    engine = start(policy(), block_size=32, num_kv_blocks=12, max_prompt=64)
    scheduler, preempted = engine.engine.engine_core.engine_core.scheduler, []
    stock, reset, resets = scheduler._preempt_request, engine.engine.reset_prefix_cache, []
    monkeypatch.setattr(scheduler, "_preempt_request", lambda *a, **k: preempted.append(0) or stock(*a, **k))
    monkeypatch.setattr(engine.engine, "reset_prefix_cache", lambda: resets.append(0) or reset())
    for step in range(9):
        wanted = requests([31], 40, step)
        rollouts = engine.generate(wanted, SAMPLING)
        assert tokens(rollouts) == tokens(hf(policy(), FORCED, wanted))
        assert gaps(policy(), batches(rollouts, "packed")).max() <= FP32_TOLERANCE
    assert len(preempted) > 50
    assert len(resets) == 1  # in the eighth call, whose last request has the names of the very first


def test_a_group_reads_its_prompt_once(monkeypatch):
    from fastlatent.vllm_plugin.cpu_attention import block_size

    engine = plain_engine()
    known, stock = [], engine.runner._update_states

    def look(scheduler_output):
        known.extend(new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs)
        return stock(scheduler_output)

    monkeypatch.setattr(engine.runner, "_update_states", look)
    shared = block_size(torch.float32, 32)
    for length in (70, 28):
        rollouts = engine.generate(requests([length], 12, step=3), SAMPLING)
        assert sorted(known)[-6:] == [length // shared * shared] * 6  # the whole blocks of the prompt
        assert gaps(policy(), batches(rollouts, "packed")).max() <= FP32_TOLERANCE
        known.clear()


def test_200_requests_over_16_slots_in_any_order():
    engine, wanted = plain_engine(), requests([3 + 3 * (i % 20) for i in range(50)], 4)
    shuffled = random.Random(0).sample(wanted, len(wanted))
    together = engine.generate(shuffled, SAMPLING)
    assert [r.request for r in together] == shuffled
    in_order = dict(zip(map(id, shuffled), tokens(together), strict=True))
    assert [in_order[id(r)] for r in wanted] == tokens(hf(policy(), FORCED, wanted))
    alone = [engine.generate([request], SAMPLING)[0] for request in shuffled[:5]]
    assert tokens(alone) == tokens(together[:5])


def test_aborted_requests_leak_no_slot(monkeypatch):
    engine, stock, draw = plain_engine(), plain_engine().engine.step, random.Random(0)

    class Stop(Exception):
        pass

    aborted = 0
    for _ in range(25):
        left = iter(range(draw.randint(0, 20)))

        def step():
            if next(left, None) is None:
                raise Stop
            return stock()

        monkeypatch.setattr(engine.engine, "step", step)
        with pytest.raises(Stop):
            engine.generate(requests(LENGTHS * 10, 1), SAMPLING)
        aborted += 40
    monkeypatch.setattr(engine.engine, "step", stock)
    assert aborted == 1000 and len(engine.slots.free) == 16 and not engine.slots.slot_of
    assert tokens(engine.generate(requests(), SAMPLING)) == tokens(hf(policy(), FORCED, requests()))
    assert not engine.runner.requests.keys() - engine.runner.row_of.keys()


def test_latents_are_taken_away_here_too():
    """Switched off, the tokens are those of the hf engine without latents; a neighbour's change them, wherever it sits."""
    engine, theirs = plain_engine(), tiny.engine(policy(), *FORCED)
    drawn = {"on": tokens(engine.generate(requests(), SAMPLING))}
    for how in ("off", "shuffled"):
        with ablated(engine, how):
            drawn[how] = tokens(engine.generate(requests(), SAMPLING))
    with ablated(theirs, "off"):
        assert drawn["off"] == tokens(theirs.generate(requests(), SAMPLING))
    assert drawn["on"] != drawn["off"] != drawn["shuffled"] != drawn["on"]
    assert tokens(engine.generate(requests(), SAMPLING)) == drawn["on"]


def test_greedy_and_sampled_calls_share_nothing_they_should_not():
    engine, greedy = plain_engine(), replace(SAMPLING, greedy=True)
    for sampling in (greedy, SAMPLING, greedy):
        assert tokens(engine.generate(requests(), sampling)) == tokens(hf(policy(), FORCED, requests(), sampling))


def test_what_it_plans_to_hold_is_what_it_holds(monkeypatch):
    engine, take, put_aside = plain_engine(), plain_engine().slots.take, []

    def taken(key, num_tokens):
        row = take(key, num_tokens)
        columns = [row.latent_logprob_n, *row.columns.values(), *row.record.values(), *row.final.values()]
        put_aside.append(sum(column.nbytes for column in columns))
        return row

    monkeypatch.setattr(engine.slots, "take", taken)
    rollouts = engine.generate(requests(), SAMPLING)
    planned = engine.planned_bytes(len(rollouts), 256, SAMPLING)
    # a float32 mixture at each place of 16 slots and one
    assert planned["record"] == engine.slots.size_bytes > 17 * 22 * 64 * 4
    share = sum(len(r.token_ids) for r in rollouts) / (len(rollouts) * 22)  # of the longest completions that there may be
    assert sum(put_aside) == pytest.approx(share * planned["ended completions"], rel=0.01) and 0.5 < share <= 1
    assert 0 < planned["keys and values"] <= 0.05 * 2**30
    assert planned["weights"] >= sum(tensor.nbytes for _, tensor in policy().published())


def test_reading_decoding_and_sampling_are_timed():
    """With 40 requests for 16 slots: the first 16 prompts are read, in chunks, before decoding is said to begin."""
    engine, open_now, seen = plain_engine(), [], []

    class Watcher:
        def entered(self, name):
            open_now.append(name)
            seen.append(tuple(open_now))

        def left(self, name):
            assert open_now.pop() == name

    reset_timings()
    watch(Watcher())
    try:
        engine.generate(requests(LENGTHS * 10, 1), SAMPLING)
    finally:
        watch(None)
    prefill, decode, sample = phases = "rollout/prefill", "rollout/decode", "rollout/sample"
    assert set(seen) == {(prefill,), (decode,), (prefill, sample), (decode, sample)}
    assert seen.index((decode,)) > seen.index((prefill, sample)) and seen.count((prefill,)) == seen.count((decode,)) == 1
    seconds = timings()
    assert seconds.keys() == set(phases) and seconds[sample] < seconds[prefill] + seconds[decode]


def test_nothing_of_ours_waits_for_the_device():
    """In no step, whether it reads chunks of prompts, decodes or does both, nor when a completion ends; vLLM's own code on a
    CPU does wait."""
    engine = start(policy())
    for sampling in (SAMPLING, TRUNCATED):
        with watched(engine) as seen:
            engine.generate(requests(), sampling)
        counted = seen.operators.counted
        assert seen.num_steps > 20 and seen.num_ended > 3 and counted.operators > counted.own_operators > 20 * seen.num_steps
        assert seen.waits == []


def test_compiled_code_which_has_no_module_is_watched_too():
    with Crossings() as seen:
        exec("torch.tensor([1.0]).tolist()", {"torch": torch})
    assert seen.to_host == seen.from_host == []


def test_a_completion_of_another_length_than_the_scheduler_s_is_refused(monkeypatch):
    engine, take = plain_engine(), plain_engine().slots.take
    monkeypatch.setattr(engine.slots, "take", lambda key, num_tokens: take(key, num_tokens - 1))
    with pytest.raises(RuntimeError, match="not drawn one after the other"):
        engine.generate(requests([3], 2), SAMPLING)
    monkeypatch.undo()
    engine.slots.is_in_order.fill_(True)  # other tests share this engine
    assert len(engine.slots.free) == 16 and engine.generate([], SAMPLING) == []


# ---- vLLM's norm on a CPU ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_rounds_no_worse_than_the_one_it_replaces(dtype):
    from vllm import ir

    plain_engine()  # which offers it to vLLM
    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((37, 576), (37, 576), (576,)))
    norm, add = ({p: op.impls[p].impl_fn for p in (PROVIDER, "native")} for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm))

    def check(ours, native, read):
        exact = read.double() * torch.rsqrt(read.double().square().mean(-1, keepdim=True) + 1e-5) * weight.double()
        eps = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
        allowed = 2 * (native - exact).abs().max() + eps * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed
        assert (ours - exact).abs().max() > 0 and (x - exact).abs().max() > 5 * allowed

    check(norm[PROVIDER](x, weight, 1e-5), norm["native"](x, weight, 1e-5), x)
    (ours, summed), (native, native_sum) = (add[p](x.clone(), residual.clone(), weight, 1e-5) for p in (PROVIDER, "native"))
    assert torch.equal(summed, native_sum)
    check(ours, native, x.double() + residual.double())


def test_the_norm_is_the_one_that_runs():
    from vllm import ir

    plain_engine()
    x, weight = torch.ones(3, 64), torch.ones(64)
    assert ir.ops.rms_norm.dispatch(x, weight, 1e-5).provider == PROVIDER
    assert ir.ops.fused_add_rms_norm.dispatch(x, x, weight, 1e-5).provider == PROVIDER
    strided = torch.ones(3, 2, 64)[:, 0]  # a part of a row, as the norms of Qwen3's heads get it
    assert ir.ops.rms_norm.dispatch(strided, weight, 1e-5).provider == "native"
    assert ir.ops.rms_norm.dispatch(x, weight.bfloat16(), 1e-5).provider == "native"


# ---- closed --------------------------------------------------------------------------------------------------------------


def test_an_engine_beside_one_that_was_closed_says_why_it_draws_no_more():
    first, second = start(policy()), start(policy())
    drawn = tokens(second.generate(requests(), SAMPLING))
    first.close()
    for use in (lambda: second.generate(requests(), SAMPLING), lambda: second.load_weights(policy().published(), 1)):
        with pytest.raises(RuntimeError, match="^another vllm engine of this process has been closed, which ends vLLM's "):
            use()
    for engine in (start(policy()), second):  # which finds the new one's groups
        assert tokens(engine.generate(requests(), SAMPLING)) == drawn


def test_nothing_is_left_of_a_compiled_model_when_its_engine_is_closed(monkeypatch):
    """As a GPU's is; vLLM hooks it into torch's compiler, which would keep it."""
    import vllm

    with monkeypatch.context() as patch:
        stock, compiled = vllm.LLM, {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
        patch.setattr(vllm, "LLM", lambda **options: stock(**options | compiled))
        engine = start(policy())
    engine.generate(requests(), SAMPLING)
    left = weakref.WeakSet(engine.runner.model.parameters())
    assert engine.runner.model.model.compiled and len(left) > 10
    engine.close()
    assert [tuple(parameter.shape) for parameter in left] == []
    start(policy())  # the groups that other tests' engines need


# ---- weights -------------------------------------------------------------------------------------------------------------


def moved(policy_):
    """The policy with every weight changed, its method's too."""
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in policy_.named_parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return policy_


@pytest.mark.parametrize("is_tied", [False, True])
def test_new_weights_are_the_trainers(is_tied, monkeypatch):
    policy_ = tiny.policy("hrpo", num_heads=2, is_tied=is_tied)
    engine = start(policy_)
    before = engine.generate(requests(), SAMPLING)
    moved(policy_)
    assert gaps(policy_, batches(before, "packed")).max() > FP32_TOLERANCE
    engine.load_weights(policy_.published(), 1)
    after = engine.generate(requests(), SAMPLING)
    assert {r.version for r in before} == {0} and {r.version for r in after} == {1}
    assert tokens(after) == tokens(hf(policy_, FORCED, requests()))
    assert gaps(policy_, batches(after, "packed")).max() <= FP32_TOLERANCE

    # the head as vLLM leaves it on a CPU when tied weights are reloaded: in the layout of the old ones
    stale = engine.own_head_weight_VD
    monkeypatch.setattr(engine, "_own_head_weight", lambda weight_VD: stale)
    engine.load_weights(moved(policy_).published(), 2)
    assert gaps(policy_, batches(engine.generate(requests(), SAMPLING), "packed")).max() > FP32_TOLERANCE


@pytest.mark.parametrize("stale", ["model.", "method."])
def test_weights_of_one_kind_that_were_not_handed_over_are_caught(stale):
    policy_ = tiny.policy("hrpo", num_heads=2)
    engine, before = start(policy_), {name: tensor.clone() for name, tensor in policy_.published()}
    moved(policy_)
    engine.load_weights(((n, before[n] if n.startswith(stale) else t) for n, t in policy_.published()), 1)
    assert gaps(policy_, batches(engine.generate(requests(), SAMPLING), "packed")).max() > FP32_TOLERANCE


def test_merged_adapters_arrive():
    from fastlatent.schema import LoraConfig

    policy_ = tiny.policy("hrpo", num_heads=2, lora=LoraConfig(r=4, alpha=8))
    engine = start(policy_)
    with torch.no_grad():
        for name, parameter in policy_.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    engine.load_weights(policy_.published(), 1)
    assert gaps(policy_, batches(engine.generate(requests(), SAMPLING), "packed")).max() <= FP32_TOLERANCE


def test_a_stream_without_the_methods_weights_is_refused():
    engine = start(policy())
    with pytest.raises(RuntimeError, match="lacked method.gate_"):
        engine.load_weights(((n, t) for n, t in policy().published() if not n.startswith("method.")), 1)


# ---- bad input -----------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(surface, "installed", lambda: None)
    with pytest.raises(UserError, match="vllm is not installed; install it with `make vllm`"):
        VLLMEngine.check(VLLMEngine.Config(), policy().base.config, CPU)


def test_a_build_for_another_device_is_named(monkeypatch):
    monkeypatch.setattr(surface, "installed", lambda: ("vllm", "0.26.0"))
    with pytest.raises(UserError, match="vllm 0.26.0 does not run on cpu"):
        VLLMEngine.check(VLLMEngine.Config(), policy().base.config, CPU)


def test_what_a_version_lacks_is_named(monkeypatch):
    monkeypatch.setitem(surface.SURFACE, "v1", {"vllm.v1.outputs": ["SamplerOutput", "Nowhere.at_all"], "vllm.gone": ["x"]})
    with pytest.raises(UserError, match=r"lacks vllm.v1.outputs.Nowhere.at_all, vllm.gone \(no module vllm.gone\)"):
        VLLMEngine.check(VLLMEngine.Config(), policy().base.config, CPU)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_the_installed_version_has_all_we_stand_on(runner):
    assert surface.missing(runner) == []


def test_an_unknown_family_is_named():
    config = policy().base.config
    other = type("GemmaConfig", (type(config),), {"model_type": "gemma"})()
    with pytest.raises(UserError, match="vllm runs llama, qwen2, qwen3 models here, not 'gemma'"):
        VLLMEngine.check(VLLMEngine.Config(), other, CPU)


def test_heads_that_it_cannot_attend_with_are_named():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()
    with pytest.raises(UserError, match="engine.name: vllm attends on a CPU with heads of 32, .* and this model's have 16, "
                                        "or use"):
        VLLMEngine.check(VLLMEngine.Config(), tiny.policy("grpo").base.config, CPU)


def test_what_would_change_the_policy_is_no_option():
    for word in ("speculative_config=ngram", "pipeline_parallel_size=2", "logits_processors=[mine.edit]", "min_tokens=4"):
        with pytest.raises(UserError, match=f"engine.{word.partition('=')[0]}: no such option"):
            load_config("grpo_quickstart", "engine.name=vllm", f"engine.{word}")


def test_a_prompt_or_completion_that_does_not_fit_is_named():
    with pytest.raises(UserError, match="prompt 0: 300 tokens and a completion of 22 are 322, more than the 278"):
        plain_engine().generate(requests([300], 1), SAMPLING)
    assert len(plain_engine().slots.free) == 16


def test_too_little_memory_is_one_sentence():
    with pytest.raises(UserError, match="engine: vllm did not start: .*engine.kv_cache_gib"):
        start(policy(), kv_cache_gib=1e-6)


def test_what_vllm_says_of_an_option_is_said():
    with pytest.raises(UserError, match=r"vllm did not start: User-specified max_model_len \(5022\) is greater than .*"
                                        "engine.name=hf$"):
        start(policy(), max_prompt=5000)


@pytest.mark.parametrize("words, sentence", [
    (["engine.max_batch_tokens=3"], "engine.max_batch_tokens: wanted 0 or at least engine.max_batch=64, got 3"),
    (["engine.kv_cache_gib=0"], "engine.kv_cache_gib: wanted more than 0, got 0"),
    (["engine.gpu_memory_share=1.5"], "engine.gpu_memory_share: wanted more than 0 and at most 1, got 1.5"),
    (["engine.num_kv_blocks=-1"], "engine.num_kv_blocks: wanted 0 or more, got -1"),
])
def test_a_wrong_option_is_named_before_a_model_is_loaded(words, sentence):
    with pytest.raises(UserError) as error:
        load_config("grpo_quickstart", "engine.name=vllm", *words)
    assert sentence in str(error.value)


def test_blocks_that_it_cannot_attend_with_are_named_before_a_model_is_loaded():
    with pytest.raises(UserError, match="engine.name: vllm wants engine.block_size to be a multiple of 16 on a CPU, or of 32 "
                                        "on some, and got 7"):
        VLLMEngine.check(VLLMEngine.Config(block_size=7), policy().base.config, CPU)
    assert VLLMEngine.refusal(VLLMEngine.Config(block_size=24), policy().base.config, torch.device("cuda")) == (
        "vllm wants engine.block_size to be a multiple of 16 and got 24")
