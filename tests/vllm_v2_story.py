"""What tests/test_vllm_v2.py runs in a process of its own: one engine on vLLM's second model runner, and what came of it as JSON."""

from __future__ import annotations

import triton_interpreted  # noqa: F401  (first: it makes vllm take its second model runner on a CPU)

import json  # isort: skip

import tiny
import torch
from test_replay import FORCED, SAMPLED, TEMPERATURE, batches, gaps, without_latents

from benches.steps import Operators
from fastlatent.rollout.vllm_engine import VLLMEngine
from fastlatent.types import Sampling

SAMPLING = Sampling(temperature=TEMPERATURE, max_new_tokens=28)
LENGTHS = [20, 45, 28]


def start(policy, ends) -> VLLMEngine:
    config = VLLMEngine.Config(runner="v2", max_batch=4, max_batch_tokens=32, kv_cache_gib=0.05, block_size=32, num_kv_blocks=5)
    engine = VLLMEngine.build(config, tiny.parts(policy, *ends, max_new=28, max_prompt=64))
    engine.load_weights(policy.published(), 0)
    return engine


def seen(engine: VLLMEngine, policy, ends) -> dict:
    """A call of generate, beside the same on the hf engine."""
    scheduler = engine.engine.engine_core.engine_core.scheduler
    preempted, stock = [], type(scheduler)._preempt_request

    def count(request, *args, **options):
        preempted.append(request.num_output_tokens)
        return stock(scheduler, request, *args, **options)

    scheduler._preempt_request = count
    requests = tiny.requests(tiny.prompts(LENGTHS), 1)
    operators, step = Operators(), engine.engine.step

    def counted():
        with operators:
            return step()

    engine.engine.step = counted
    ours = engine.generate(requests, SAMPLING)
    engine.engine.step = step
    theirs = tiny.engine(policy, *ends).generate(requests, SAMPLING)
    return {
        "same_tokens": [r.token_ids for r in ours] == [r.token_ids for r in theirs],
        "same_latents": [r.latent for r in ours] == [r.latent for r in theirs],
        "gap": gaps(policy, batches(ours, "packed")).max().item(),
        "gap_without_latents": gaps(policy, batches(ours, "packed"), without_latents).max().item(),
        "preempted": preempted, "num_tokens": [len(r.token_ids) for r in ours],
        "own_operators": operators.counted.own_operators, "own_syncs": operators.own_syncs_seen,
        "free_slots": len(engine.slots.free), "version": ours[0].version,
    }


def main() -> None:
    policy, out = tiny.policy("hrpo", num_heads=2), {}
    engine = start(policy, FORCED)
    out["runner"] = f"{type(engine.runner).__module__}.{type(engine.runner).__name__}"
    out["forced"] = seen(engine, policy, FORCED)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    engine.load_weights(policy.published(), 1)
    out["reloaded"] = seen(engine, policy, FORCED)
    engine.close()
    out["sampled"] = seen(start(policy, SAMPLED), policy, SAMPLED)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
