"""What tests/test_vllm_v2.py runs in a process of its own: one engine on vLLM's second model runner, and what came of it as
JSON."""

from __future__ import annotations

import triton_interpreted  # noqa: F401  (first: it makes vllm take its second model runner on a CPU)

import json  # isort: skip
import weakref

import tiny
import torch
from test_replay import FORCED, SAMPLED, TEMPERATURE, batches, gaps, without_latents
from vllm.platforms.cpu import CpuPlatform
from waits import watched

from fastlatent.rollout.vllm_engine import VLLMEngine
from fastlatent.types import Sampling

SAMPLING = Sampling(temperature=TEMPERATURE, max_new_tokens=28)
LENGTHS = [20, 45, 28]


def schedule_asynchronously() -> None:
    """As on a GPU: a step is handed over before the one before it has been looked at. vLLM's CPU platform turns it off."""
    stock = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config) -> None:
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


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
    state, addresses, prepare = engine.runner.model_state, set(), engine.runner.model_state.prepare_inputs

    def prepare_inputs(input_batch, req_states):
        out = prepare(input_batch, req_states)
        assert len(out["inputs_embeds"]) == input_batch.num_tokens_after_padding
        addresses.add(out["inputs_embeds"].data_ptr())
        return out

    state.prepare_inputs = prepare_inputs
    requests = tiny.requests(tiny.prompts(LENGTHS), 1)
    with watched(engine) as draw:
        ours = engine.generate(requests, SAMPLING)
    del state.prepare_inputs
    theirs = tiny.engine(policy, *ends).generate(requests, SAMPLING)
    return {
        "same_tokens": [r.token_ids for r in ours] == [r.token_ids for r in theirs],
        "same_latents": [r.latent for r in ours] == [r.latent for r in theirs],
        "gap": gaps(policy, batches(ours, "packed")).max().item(),
        "gap_without_latents": gaps(policy, batches(ours, "packed"), without_latents).max().item(),
        "preempted": preempted, "num_tokens": [len(r.token_ids) for r in ours],
        "own_operators": draw.operators.counted.own_operators, "num_ended": draw.num_ended,
        "waits": draw.waits + draw.crossings.from_host,
        "addresses": sorted(addresses), "captured": state.prepare_dummy_inputs(1, 1)["inputs_embeds"].data_ptr(),
        "free_slots": len(engine.slots.free), "version": ours[0].version,
    }


class Stop(Exception):
    pass


def stop_after(engine: VLLMEngine, num_steps: int) -> None:
    """Draw for so many steps, then give all requests up; a step that was handed over is still to be looked at."""
    stock, left = engine.engine.step, iter(range(num_steps))

    def step():
        if next(left, None) is None:
            raise Stop
        return stock()

    engine.engine.step = step
    try:
        engine.generate(tiny.requests(tiny.prompts(LENGTHS), 1), SAMPLING)
    except Stop:
        pass
    engine.engine.step = stock


def left_of(engine: VLLMEngine) -> tuple[list[str], int]:
    """Close an engine: what there still is of it when vLLM shuts down, and of how much."""
    runner = engine.runner
    kept = weakref.WeakSet([runner, runner.model_state, runner.sampler, runner.block_tables, engine.slots, engine.method])
    kept |= {*runner.model.modules(), *runner.model.parameters(), *runner.kv_caches}
    num_kept, left, worker = len(kept), [], engine.engine.model_executor.driver_worker.worker
    del runner, engine.engine.step  # as it was set to watch
    stock, worker.shutdown = worker.shutdown, lambda: (left.extend(type(one).__name__ for one in kept), stock())
    del worker
    engine.close()
    return left, num_kept


def main() -> None:
    schedule_asynchronously()
    policy, out = tiny.policy("hrpo", num_heads=2), {}
    engine = start(policy, FORCED)
    out["runner"] = f"{type(engine.runner).__module__}.{type(engine.runner).__name__}"
    out["scheduler"] = type(engine.engine.engine_core.engine_core.scheduler).__name__
    out["forced"] = seen(engine, policy, FORCED)
    for num_steps in (2, 5, 9):
        stop_after(engine, num_steps)
    engine.sleeps = True  # vLLM's scheduler goes to sleep; on a CPU its memory stays
    with engine.released():
        out["asleep"] = engine.engine.is_sleeping()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    engine.load_weights(policy.published(), 1)
    out["reloaded"] = seen(engine, policy, FORCED)
    out["left"], out["kept"] = left_of(engine)
    out["sampled"] = seen(start(policy, SAMPLED), policy, SAMPLED)
    fed = tiny.policy("feedback.Gaussian", num_heads=2)
    out["fed back"] = seen(start(fed, FORCED), fed, FORCED)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
