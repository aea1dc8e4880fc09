"""What makes an update fit and fast on a GPU, as far as a CPU can show it: memory that runs out, what is planned and measured,
flash-attn's call, liger's parts, compiled blocks, selective recomputation. None of it may change a number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benches.update import model_flops
from fastlatent import build, memory_plan, mfu, models, train
from fastlatent.cli import run_command
from fastlatent.config import load_config
from fastlatent.errors import UserError
from fastlatent.log import read
from fastlatent.microbatch import OutOfMemory
from fastlatent.models import flash, liger
from fastlatent.models.flash import Flash
from fastlatent.optim import Optimizer
from fastlatent.packing import Item, pack, varlen
from fastlatent.policy import Policy
from fastlatent.rollout.hf_engine import HFEngine
from fastlatent.schema import (
    AnswerConfig, Config, LoraConfig, MismatchConfig, ObjectiveConfig, SamplingConfig, ThinkingConfig, UpdateConfig)
from fastlatent.trainer import Trainer
from fastlatent.types import Batch, Group, Sampling, Varlen
from fastlatent.update import Updater, UpdateResult

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ENDS = (ThinkingConfig(end="####", force="\n#### ", max_tokens=12, stop=["\n"]), AnswerConfig(max_tokens=6, stop=["\n"]))
SAMPLING = Sampling(temperature=0.8, max_new_tokens=24)


def drawn(policy: Policy) -> list[Group]:
    requests = tiny.requests(tiny.prompts([5, 9]), 4)
    rollouts = tiny.engine(policy, *ENDS).generate(requests, SAMPLING)
    return [Group(rollouts[i : i + 4], torch.zeros(4), {}, torch.tensor([1.5, -0.5, -1.25, 0.25])) for i in (0, 4)]


def batch_of(groups: list[Group], share_prompts: bool = True) -> Batch:
    rollouts = (r for g in groups for r in g.rollouts)
    return pack([Item(r, 1.0 - i % 2 * 2.0, 0.1) for i, r in enumerate(rollouts)], CPU, share_prompts)


def config(budget: int = 96, correction: str = "none", **objective) -> Config:
    out = Config(engine=HFEngine.Config(), sampling=SamplingConfig(temperature=0.8, max_new_tokens=24),
                 objective=ObjectiveConfig(**objective), mismatch=MismatchConfig(correction=correction, ratio_max=1.25),
                 update=UpdateConfig(tokens_per_microbatch=budget))
    out.optim.max_grad_norm = 0.0
    return out


def updated(policy: Policy, groups: list[Group], config_: Config) -> tuple[UpdateResult, list[dict[str, Tensor]]]:
    """The result of an update, and the gradient of each optimizer step."""
    gradients: list[dict[str, Tensor]] = []

    def commit() -> None:
        gradients.append({name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None})

    result = Updater(policy, Optimizer(policy, config_), config_)(groups, commit)
    return result, gradients[:-1]


def learnt(policy: Policy, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss and its gradients."""
    loss = policy.loss(batch, 0.8, ObjectiveConfig()).value
    policy.zero_grad()
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(got[name], x, atol=tolerance * float(x.abs().max()), rtol=1e-4,
                                   msg=lambda text, name=name: f"{name}: {text}")


# ---- memory runs out ------------------------------------------------------------------------------------------------


def fail_at(policy: Policy, *calls: int) -> list[int]:
    """Let memory run out in these backward passes, counted from 0, when they are half way through; the passes are counted."""
    seen: list[int] = []

    def hook(gradient: Tensor) -> None:
        seen.append(len(seen))
        if seen[-1] in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    policy.base.model.layers[0].mlp.down_proj.weight.register_hook(hook)
    return seen


@pytest.mark.parametrize("method, options, correction", [
    ("grpo", {}, "none"), ("hrpo", {"kl_coef": 0.1, "num_epochs": 2}, "sequence_truncate"),
    ("latent_grpo", {}, "token_truncate")])
def test_a_microbatch_for_which_memory_runs_out_is_split_and_the_gradient_stays(method, options, correction):
    """In the second of the first step's microbatches, whose gradient is by then in the head and the last block."""
    has_reference = "kl_coef" in options
    groups = drawn(tiny.policy(method))
    for group in groups[:1]:
        group.rollouts[1].logprobs = [x - 0.1 for x in group.rollouts[1].logprobs]  # something to correct
    plain, failing = (tiny.policy(method, has_reference=has_reference) for _ in range(2))
    wanted, wanted_gradients = updated(plain, groups, config(correction=correction, **options))
    passes = fail_at(failing, 1)
    result, found = updated(failing, groups, config(correction=correction, **options))
    num_epochs = options.get("num_epochs", 1)
    num_batches = len(wanted.attempts[0].batches)
    assert num_batches > 1 and result.num_splits == 1 and wanted.num_splits == 0
    # the failed attempt's two, the first step over with a batch more, and the other steps as they were
    assert len(passes) == 2 + (num_batches + 1) + (num_epochs - 1) * num_batches
    assert len(result.attempts[0].batches) == num_batches + 1
    assert len(found) == len(wanted_gradients) == num_epochs
    for got, want in zip(found, wanted_gradients, strict=True):
        assert_same(got, want, 1e-4)
    for name, x in wanted.sums.items():
        torch.testing.assert_close(result.sums[name], x, atol=1e-4, rtol=1e-4, msg=name)
    torch.testing.assert_close(result.statistics, wanted.statistics, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.loss, wanted.loss, atol=1e-5, rtol=1e-4)
    assert sum(len(gap.delta_A) for gap in result.gaps) == sum(len(gap.delta_A) for gap in wanted.gaps)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_halves_are_the_microbatch_with_its_columns(share_prompts):
    from fastlatent.microbatch import Microbatch

    rollouts = [r for g in drawn(tiny.policy("latent_grpo")) for r in g.rollouts]
    whole = Microbatch.of([Item(r, float(i), 0.1) for i, r in enumerate(rollouts)], CPU, share_prompts)
    whole.batch.weight_A = torch.arange(len(whole.batch.score_A), dtype=torch.float32)
    whole.batch.old_logprob_A = -whole.batch.weight_A
    halves = whole.halves(UpdateConfig(share_prompts=share_prompts))
    for name in ("target_A", "behaviour_logprob_A", "advantage_A", "weight_A", "old_logprob_A"):
        assert torch.equal(torch.cat([getattr(h.batch, name) for h in halves]), getattr(whole.batch, name)), name
    assert all(h.batch.ref_logprob_A is None and h.is_half for h in halves)
    assert sum(len(h.batch.actions.latent_N) for h in halves) == len(whole.batch.actions.latent_N) > 0
    sizes = [h.batch.num_tokens for h in halves]
    assert max(sizes) < 0.7 * whole.batch.num_tokens


@pytest.mark.parametrize("calls, budget, what", [((0, 1), 96, "half of a microbatch"), ((0,), 33, "a single completion")])
def test_memory_that_runs_out_again_is_an_error_with_its_remedy(calls, budget, what):
    policy = tiny.policy("grpo")
    groups = drawn(policy)
    fail_at(policy, *calls)
    reason = rf"out of memory for \d+ packed tokens, {what}; wanted update.tokens_per_microbatch below {budget}, model.gradient"
    with pytest.raises(OutOfMemory, match=reason) as caught:
        updated(policy, groups, config(budget))
    assert caught.value.is_whole
    assert all(p.grad is None for p in policy.trainable().values())


SCORING = {"score_old": {"num_epochs": 2}, "mismatch": {"correction": "sequence_truncate"}, "score_ref": {"kl_coef": 0.1},
           "score_ref of adapters": {"kl_coef": 0.1}}
"""What makes an update score before it learns, by what the pass is for."""


def scoring_policy(what: str, *failing: int) -> Policy:
    """One whose forward passes without gradient find no memory at these calls, counted from 0; where there is a frozen
    copy, its own."""
    lora = LoraConfig(r=4, alpha=8, dropout=0.0, target_modules=["q_proj"]) if "adapters" in what else None
    policy = tiny.policy("hrpo", has_reference="score_ref" in what, lora=lora)
    base = policy._reference[0] if what == "score_ref" else policy.base
    seen: list[int] = []

    def hook(*_) -> None:
        if not torch.is_grad_enabled():
            seen.append(len(seen))
            if seen[-1] in failing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    base.model.layers[1].mlp.register_forward_hook(hook)
    return policy


@pytest.mark.parametrize("what", SCORING)
def test_a_microbatch_that_cannot_be_scored_in_one_is_split_and_the_gradient_stays(what):
    groups = drawn(tiny.policy("hrpo"))
    groups[0].rollouts[1].logprobs = [x - 0.1 for x in groups[0].rollouts[1].logprobs]  # something to correct
    wanted, wanted_gradients = updated(scoring_policy(what), groups, config(**SCORING[what]))
    result, found = updated(scoring_policy(what, 1), groups, config(**SCORING[what]))
    num_batches = [len(attempt.batches) for attempt in wanted.attempts]
    assert num_batches[0] > 1 and (wanted.num_splits, result.num_splits) == (0, 1)
    assert [len(attempt.batches) for attempt in result.attempts] == [n + 1 for n in num_batches]  # what was split stays so
    for got, want in zip(found, wanted_gradients, strict=True):
        assert_same(got, want, 1e-4)
    for name, x in wanted.sums.items():
        torch.testing.assert_close(result.sums[name], x, atol=1e-4, rtol=1e-4, msg=name)
    for name in ("delta_A", "ratio_A", "latent_A"):
        got, want = (torch.cat([getattr(gap, name) for gap in of.gaps]) for of in (result, wanted))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("what", SCORING)
@pytest.mark.parametrize("calls, budget, which", [((0, 1), 96, "half of a microbatch"), ((0,), 33, "a single completion")])
def test_memory_that_runs_out_again_while_scoring_is_an_error_with_its_remedy(what, calls, budget, which):
    policy = scoring_policy(what, *calls)
    reason = (rf"{'score_ref' if 'ref' in what else 'score_old'}: out of memory for \d+ packed tokens, {which}; wanted "
              f"update.tokens_per_microbatch below {budget} or a smaller sampling.max_new_tokens")
    groups = drawn(tiny.policy("hrpo"))
    with pytest.raises(OutOfMemory, match=reason) as caught:
        updated(policy, groups, config(budget, **SCORING[what]))
    assert caught.value.is_whole
    assert all(p.grad is None for p in policy.trainable().values())


def test_an_error_after_the_first_optimizer_step_says_so():
    policy = tiny.policy("grpo")
    groups, config_ = drawn(policy), config(num_epochs=2)
    num_batches = len(updated(tiny.policy("grpo"), groups, config_)[0].attempts[0].batches)
    fail_at(policy, num_batches, num_batches + 1)
    with pytest.raises(OutOfMemory) as caught:
        updated(policy, groups, config_)
    assert not caught.value.is_whole


# ---- operations, memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_prompts", [False, True])
def test_pairs_of_query_and_key_are_those_that_see_each_other(share_prompts):
    batch = batch_of(drawn(tiny.policy("grpo")), share_prompts)
    where, pairs = batch.varlen, 0
    for s, length in enumerate(where.cu_seqlens.diff().tolist()):
        seen_LK = torch.ones(length, length).tril() if where.mask_SLK is None else where.mask_SLK[s, :length]
        padding = 0 if where.mask_SLK is None else int(seen_LK[:, where.prefix_SP.shape[1] + length :].sum())
        pairs += int(seen_LK.sum()) - padding
    assert float(mfu.num_pairs(where)) == pairs


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)])
def test_operations_are_those_that_torch_counts(lora):
    """Of the blocks' matrix products; the weights of norms, which need none, are counted like any other."""
    policy = tiny.policy("hrpo", family="llama", lora=lora)  # whose gate makes every block's input need a gradient
    batch = batch_of(drawn(policy))
    with FlopCounterMode(display=False) as counter:
        policy.hidden(batch).square().sum().backward()
    counts = {str(name).partition(".")[2]: n for name, n in counter.get_flop_counts()["Global"].items()}
    cost = mfu.Cost.of(policy.base)
    norms = sum(p.numel() * (6 if p.requires_grad else 4) for name, p in policy.base.named_parameters() if "norm" in name)
    gates = (6 if lora is None else 4) * 2 * 64 * 64 * batch.num_tokens  # the method's own, which do not count
    found = sum(n for name, n in counts.items() if "attention" not in name) - gates
    rotations = (0, 2 * 8 * batch.num_tokens)  # transformers 5.17 makes their angles with a matrix product
    assert found - (cost.token - norms) * batch.num_tokens in rotations
    assert cost.scored == (6 if lora is None else 4) * len(tiny.tokenizer()) * 64
    head_dim, heads, layers = 16, 4, 2
    assert cost.pair == 3 * layers * (2 * 2 * heads * head_dim)
    assert int(cost.flops(batch)) == cost.token * batch.num_tokens + cost.scored * len(batch.score_A) + cost.pair * int(
        mfu.num_pairs(batch.varlen))


@pytest.mark.parametrize("share_prompts", [False, True])
def test_the_bench_of_the_update_counts_the_operations_that_an_update_says_it_needed(share_prompts):
    policy, config_ = tiny.policy("hrpo"), config(budget=96)
    groups, config_.update.share_prompts = drawn(policy), share_prompts
    assert model_flops(policy, groups, config_) == float(updated(policy, groups, config_)[0].flops) > 0


def test_a_mixture_of_experts_is_not_counted():
    base = SimpleNamespace(config=SimpleNamespace(num_experts_per_tok=2))
    assert mfu.Cost.of(base) is None and model_flops(SimpleNamespace(base=base), [], config()) is None


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None),
    ("NVIDIA H200 NVL", None), ("NVIDIA GH200 480GB", None), ("NVIDIA A100-SXM4-80GB", None), ("NVIDIA B200", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H200 MIG 1g.18gb", None), ("NVIDIA GeForce RTX 3060", None)])
def test_the_peak_is_that_of_a_known_gpu_in_bfloat16(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert mfu.peak_flop_s(GPU, torch.bfloat16) == peak
    assert mfu.peak_flop_s(GPU, torch.float32) is None and mfu.peak_flop_s(CPU, torch.bfloat16) is None


@pytest.mark.parametrize("dtype, lora", [
    ("float32", None), ("bfloat16", None), ("bfloat16", LoraConfig(r=4, target_modules=["q_proj"]))])
def test_the_memory_plan_is_what_the_parts_take(dtype, lora):
    policy = tiny.policy("hrpo", family="llama", dtype=dtype, lora=lora, has_reference=True)
    V, D, size = len(tiny.tokenizer()), 64, 4 if dtype == "float32" else 2
    # by hand: q, k, v, o, gate, up, down and two norms in each of two blocks, the last norm, embedding and head
    block = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64
    base = 2 * block + 64 + 2 * V * D
    gate = sum(p.numel() for p in policy.method.parameters())
    adapters = 0 if lora is None else 2 * (64 * 4 + 4 * 64)
    trained = gate + (base if lora is None else adapters)
    engine = HFEngine.build(HFEngine.Config(max_batch=6, prepack=False), tiny.parts(policy, *ENDS))
    config_ = config(budget=1000)
    config_.num_prompts, config_.group_size, config_.chat.max_prompt_tokens = 2, 4, 40
    plan = memory_plan.plan(config_, policy, engine)
    assert plan.weights == 4 * (gate + adapters) + (4 if lora is None else size) * base
    assert plan.reference == (size * base if lora is None else 0) and plan.gradients == 4 * trained
    # 22 new tokens at most: 12 of thinking, 4 of its forced end, 6 of answer; keys and values of two blocks with two heads of
    # 16; six rows of the eight completions at once
    assert plan.engine["weights"] == size * base + sum(p.nbytes for p in engine.method.parameters())
    assert plan.engine["keys and values"] == 2 * 2 * 6 * 2 * (40 + 22) * 16 * size
    # per token: two ids, five flags with latent_acted, four floats; HRPO's mixture of D; per row: length and two flags
    assert plan.engine["record"] == 6 * 22 * (2 * 8 + 4 + 4 * 4 + D * size) + 6 * (8 + 2)
    cast = 2 * (block - 2 * 64) if lora is None else adapters  # not the norms
    assert plan.copies == (0 if dtype == "float32" else 2 * cast)
    rows = 125  # an eighth of 1000
    copy = V * D * 2 if dtype == "bfloat16" and lora is None else 0
    assert plan.head == rows * V * (4 + size) + copy + (4 * V * D if lora is None else 0) + 1000 * D * size
    optimizer = Optimizer(policy, config_)
    for parameter in policy.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.adamw.step()
    held = sum(x.nbytes for state in optimizer.adamw.state.values() for x in state.values())
    assert plan.optimizer == held
    first, second = plan.lines()
    assert first.startswith("memory: update ") and "and activations" in first and ("reference" in first) == (lora is None)
    assert second.startswith("memory: engine hf ")
    assert f"keys and values {'186.0' if dtype == 'float32' else '93.0'} KiB" in second


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, target_modules=["q_proj", "o_proj"])])
def test_the_copies_of_weights_that_are_planned_are_those_that_a_pass_keeps(lora):
    policy = tiny.policy("hrpo", family="llama", dtype="bfloat16", lora=lora)  # whose gate makes every input need a gradient
    batch, kept = batch_of(drawn(policy)), {}
    shapes = {frozenset(p.shape) for p in policy.base.model.layers.parameters() if p.ndim == 2}
    own = {p.data_ptr() for p in policy.base.parameters()}
    assert len(batch.position_T) not in (4, 32, 64, 96)  # no activation looks like a weight

    def keep(tensor: Tensor) -> Tensor:
        if frozenset(tensor.shape) in shapes and tensor.dtype == torch.bfloat16 and tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = policy.hidden(batch)
    engine = HFEngine.build(HFEngine.Config(), tiny.parts(policy, *ENDS))
    assert hidden.requires_grad
    assert memory_plan.plan(config(), policy, engine).copies == sum(x.nbytes for x in kept.values()) > 0


def test_an_engine_that_plans_nothing_is_said_to():
    plan = memory_plan.MemoryPlan(2**30, 0, 2**20, 0, 0, 1024, "other", capacity=140 * 2**30)
    assert plan.lines() == [
        "memory: update 1.0 GiB (weights 1.0 GiB, gradients 1.0 MiB, head 1.0 KiB), and activations, of 140.0 GiB",
        "memory: engine other as its own options say"]


# ---- flash-attn -----------------------------------------------------------------------------------------------------


def reference_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                     causal=False):
    """What flash-attn documents, in float64: segments back to back, fewer key heads than query heads, and a causal triangle
    aligned to the bottom right corner."""
    assert q.dtype == k.dtype == v.dtype and q.ndim == 3 and causal and not dropout_p
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths = [x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
    assert max(lengths[0]) == max_seqlen_q and max(lengths[1]) == max_seqlen_k
    assert (sum(lengths[0]), sum(lengths[1])) == (len(q), len(k)) and len(k) == len(v)
    out = []
    for Q, K in zip(q.split(lengths[0]), zip(k.split(lengths[1]), v.split(lengths[1]), strict=True), strict=True):
        keys, values = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in K)
        score = torch.einsum("qhd,khd->hqk", Q.double(), keys) * softmax_scale
        hidden = torch.ones(len(Q), len(keys)).triu(len(keys) - len(Q) + 1).bool()
        out.append(torch.einsum("hqk,khd->qhd", score.masked_fill(hidden, -torch.inf).softmax(-1), values).to(q.dtype))
    return torch.cat(out)


def fake(monkeypatch, module: str = "flash_attn", returns: Callable = reference_varlen) -> None:
    found = ModuleType(module)
    found.flash_attn_varlen_func, found.__version__ = returns, "2.8.3"
    if module == "flash_attn.cute":
        package = ModuleType("flash_attn")
        package.__path__, package.cute = [], found
        monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, module, found)


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("family, dtype", [
    ("llama", "float32"), ("qwen2", "float32"), ("qwen3", "float32"), ("qwen3", "bfloat16")])
def test_flash_attention_gives_what_torchs_gives(monkeypatch, family, dtype, share_prompts):
    fake(monkeypatch)
    policy = tiny.policy("hrpo", family=family, dtype=dtype)
    batch = batch_of(drawn(policy), share_prompts)
    assert (batch.varlen.key_K is not None) == share_prompts
    wanted_hidden, (_, wanted) = policy.hidden(batch).detach(), learnt(policy, batch)
    policy.flash = flash.installed()
    assert policy.flash.name == "flash-attn 2.8.3"
    hidden, (_, found) = policy.hidden(batch).detach(), learnt(policy, batch)
    if dtype == "float32":
        torch.testing.assert_close(hidden, wanted_hidden, atol=1e-5, rtol=1e-5)
        assert not torch.equal(hidden, wanted_hidden)  # it was flash-attn's
        assert_same(found, wanted, 1e-4)
    else:
        assert hidden.dtype == torch.bfloat16
        torch.testing.assert_close(hidden.float(), wanted_hidden.float(), atol=0.15, rtol=0.05)


def test_the_keys_of_a_segment_are_its_prefix_and_then_its_own():
    where = varlen([2, 3, 1, 2], [None, 0, 0, None])
    assert where.key_K.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 7]
    assert where.cu_seqlens_k.tolist() == [0, 2, 7, 10, 12] and where.max_seqlen_k == 5
    moved = where.to(CPU)
    assert all(torch.equal(getattr(moved, n), getattr(where, n)) for n in ("key_K", "cu_seqlens_k")) and moved.max_seqlen_k == 5
    assert varlen([2, 3]).key_K is None


def test_version_4_is_found_without_version_2_and_its_row_sums_are_dropped(monkeypatch):
    assert flash.installed() is None
    fake(monkeypatch, "flash_attn.cute", lambda *args, **options: (reference_varlen(*args, **options), None))
    found = flash.installed()
    q, where = torch.randn(1, 2, 5, 8), varlen([3, 2])
    wanted = reference_varlen(*[q[0].transpose(0, 1)] * 3, *[where.cu_seqlens] * 2, 3, 3, softmax_scale=0.3, causal=True)
    torch.testing.assert_close(found.attend(where, q, q, q, 0.3)[0], wanted)


def test_a_flash_attn_that_does_not_load_is_no_absence(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert flash.installed() is None  # None in sys.modules is how Python says absent

    def broken(name):
        raise ModuleNotFoundError("No module named 'cutlass'", name="cutlass")

    monkeypatch.setattr(flash, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="cutlass"):
        flash.installed()


def test_flash_asked_for_runs_or_is_refused_with_the_reason(monkeypatch):
    model = tiny.model().config
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    bf16 = torch.bfloat16
    wide = SimpleNamespace(head_dim=512)
    for device, dtype, architecture, reason in [
            (CPU, bf16, model, "flash-attn needs a GPU, and this run is on the cpu"),
            (GPU, torch.float32, model, "needs model.dtype=bfloat16, and this run computes in float32"),
            (GPU, bf16, wide, "has heads of at most 256, and this model's are 512"),
            (GPU, bf16, model, "is not installed; pip install flash-attn --no-build-isolation, or flash-attn-4")]:
        said = f"^model.attention: flash-attn .*{reason.removeprefix('flash-attn ')}; wanted model.attention=sdpa"
        with pytest.raises(UserError, match=said):
            flash.choose("flash", device, dtype, architecture)
        assert flash.choose("auto", device, dtype, architecture) is None
    fake(monkeypatch)
    assert flash.choose("flash", GPU, bf16, model).name == flash.choose("auto", GPU, bf16, model).name == "flash-attn 2.8.3"
    assert flash.choose("sdpa", GPU, bf16, model) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match="needs compute capability 8.0, and this GPU has 7.5"):
        flash.choose("flash", GPU, bf16, model)


# ---- options, before a model loads ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("words, reason", [
    (["model.attention=flash"],
     "model.attention: flash-attn needs a GPU, and this run is on the cpu; wanted model.attention=sdpa or auto"),
    (["model.attention=flex"], "model.attention: 'flex' is not one of auto, flash, sdpa"),
    (["model.liger=true"],
     "model.liger: liger-kernel's Triton kernels need a GPU, and this run is on the cpu; wanted model.liger=false"),
    (["model.compile=true"], "model.compile: on a CPU torch.compile needs a C++ compiler"),
    (["model.gradient_checkpointing=some"], "model.gradient_checkpointing: wanted true, false or selective, got 'some'"),
    (["model.gradient_checkpointing=selective", "model.compile=true"], "selective cannot see into compiled blocks"),
    (["model.gradient_checkpointing=selective", "model.liger=true"], "selective stores what liger's kernels overwrite"),
])
def test_what_cannot_run_is_refused_before_weights_are_loaded(words, reason, model, tmp_path, monkeypatch):
    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(models, "load_causal_lm", load)
    monkeypatch.setattr(build, "which", lambda name: None)
    with pytest.raises(UserError) as caught:
        Trainer(load_config("grpo_quickstart", f"model.path={model}", "model.device=cpu", f"out={tmp_path / 'run'}", *words))
    assert reason in str(caught.value) and not (tmp_path / "run").exists()


def test_liger_refuses_an_architecture_it_lacks_and_its_own_absence(monkeypatch):
    with pytest.raises(UserError, match="in .*llama.*qwen2.* models, not in 'gpt2'"):
        liger.check(SimpleNamespace(model_type="gpt2"), GPU)
    liger.check(SimpleNamespace(model_type="qwen2"), GPU)
    for name in [name for name in sys.modules if name.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UserError, match="liger-kernel is not installed; pip install liger-kernel"):
        liger.check(SimpleNamespace(model_type="qwen2"), GPU)


def test_liger_replaces_norms_mlps_and_rotation_and_changes_no_number():
    story = Path(__file__).with_name("liger_story.py")
    done = subprocess.run([sys.executable, story, "llama", "qwen3"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["family"] for row in rows] == ["llama", "qwen3"]
    for row in rows:
        assert row["patched"] == ["liger_kernel"] * 4 and not row["is_same"]
        assert row["hidden"] < 1e-5 and row["gradient"] < 1e-5


# ---- compiled and recomputed blocks ---------------------------------------------------------------------------------


def test_compiled_blocks_give_the_same_and_are_compiled_once_for_all_blocks_and_lengths():
    torch._dynamo.reset()
    eager = tiny.policy("hrpo")
    groups = drawn(eager)
    batches = [batch_of(part) for part in (groups, groups[1:])]
    wanted = [learnt(eager, b) for b in batches]
    compiled = tiny.policy("hrpo", compile=True)
    torch._dynamo.utils.counters.clear()  # other tests compile, too
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [learnt(compiled, b) for b in batches]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [len(b.position_T) for b in batches][0] != len(batches[1].position_T)
    for (loss, got), (wanted_loss, want) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-5, abs=1e-6)
        assert_same(got, want, 1e-4)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products and attentions, and everything else, as they run."""

    def __init__(self):
        super().__init__()
        self.costly = self.cheap = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if any(word in name for word in ("::mm", "::addmm", "::bmm", "_attention")):
            self.costly += 1
        else:
            self.cheap += 1
        return function(*args, **(kwargs or {}))


def recomputed(how: bool | str, batch: Batch) -> tuple[dict[str, Tensor], int, int]:
    """Gradients, and the products and other operations that the backward pass ran."""
    policy = tiny.policy("hrpo", gradient_checkpointing=how).train()
    loss = policy.hidden(batch).square().sum()
    with Products() as ran:
        loss.backward()
    return {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}, ran.costly, ran.cheap


def test_selective_recomputation_repeats_only_what_is_cheap():
    batch = batch_of(drawn(tiny.policy("hrpo")))
    nothing, everything, selective = (recomputed(how, batch) for how in (False, True, "selective"))
    for other in (everything, selective):
        assert_same(other[0], nothing[0], 1e-5)
    assert selective[1] == nothing[1] < everything[1]  # matrix products and attention
    assert nothing[2] < selective[2]


# ---- a run ----------------------------------------------------------------------------------------------------------

WORDS = [
    "grpo_quickstart", "num_prompts=2", "group_size=4", "num_steps=1", "sampling.max_new_tokens=12", "thinking.max_tokens=6",
    "answer.max_tokens=3", "eval.every=0", "eval.num_samples=0", "eval.ablations=false", "log.live=plain", "model.device=cpu",
    "objective.entropy_coef=0.01"]  # so that every completion is learnt from


def test_a_run_tells_its_plan_and_logs_its_speed(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastlatent.trainer.write_report", lambda run: None)
    monkeypatch.setattr(mfu, "peak_flop_s", lambda device, dtype: 1e15)
    out = tmp_path / "run"
    train.main([*WORDS, f"model.path={model}", f"out={out}", "model.gradient_checkpointing=selective"])
    said = " ".join(capsys.readouterr().out.split())
    assert "; update sdpa attention; ops" in said
    assert "memory: update " in said and "memory: engine hf " in said and "record " in said
    row = next(row for row in read(out / "metrics.jsonl") if "reward" in row)
    assert row["perf/oom_splits"] == 0 and row["perf/update_tokens_per_s"] > 0
    assert row["perf/mfu"] == pytest.approx(row["perf/update_tflop_per_s"] / 1e3) and row["perf/mfu"] > 0


def test_a_run_that_has_no_memory_left_saves_what_it_has_learnt(model, tmp_path, capsys, monkeypatch):
    backward = torch.Tensor.backward
    steps = []

    def failing(self, *args, **options):
        if len(steps) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        backward(self, *args, **options)

    step = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, is_bad: (step(self, is_bad), steps.append(1)))
    monkeypatch.setattr(torch.Tensor, "backward", failing)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        run_command(train.main, [*WORDS, f"model.path={model}", f"out={out}", "num_steps=3"])
    assert caught.value.code == 2
    assert f"half of a microbatch; wanted update.tokens_per_microbatch below 4096" in (said := capsys.readouterr().err)
    assert f"saved step 1 in {out}" in said and [path.name for path in (out / "checkpoints").iterdir()] != []
