"""Stock vLLM, in process, with our latents: paged attention, continuous batching and prefix caching are vLLM's, the inputs and
the draws are ours (`fastlatent.vllm_plugin`). vLLM schedules names of tokens; the tokens are in our slots.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from fastlatent.errors import UserError
from fastlatent.models import head_size
from fastlatent.policy import EmbeddingInDtype
from fastlatent.profiling import span
from fastlatent.rollout.base import ENGINES, EngineConfig, EngineParts
from fastlatent.rollout.buffers import Buffers
from fastlatent.rollout.prepack import is_supported
from fastlatent.rollout.slots import LAST, Slots
from fastlatent.types import Capability, Request, Rollout, Sampling
from fastlatent.vllm_plugin import surface
from fastlatent.vllm_plugin.config_folder import config_folder
from fastlatent.vllm_plugin.models import FAMILIES, PREFIX
from fastlatent.vllm_plugin.seats import KEY, Seats

GIB = 2**30
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's CPU attention takes (CPUAttentionBackend.get_supported_head_sizes)."""


@ENGINES.register("vllm")
class VLLMEngine:
    capabilities = frozenset({Capability.TOKENS, Capability.MIXTURE, Capability.HIDDEN, Capability.LOGITS})

    @dataclass(kw_only=True)
    class Config(EngineConfig):
        name: str = "vllm"
        max_batch: int = 64
        """Most completions decoded at once (vLLM: max_num_seqs)."""
        max_batch_tokens: int = 0
        """Most tokens read in one step; longer prompts are read in chunks (vLLM: max_num_batched_tokens). 0: 1024 on a CPU,
        whose caches more would leave, 4096 elsewhere; at least max_batch."""
        kv_cache_gib: float = 2.0
        """Memory for keys and values on a CPU, in GiB."""
        gpu_memory_share: float = 0.4
        """Share of a GPU's memory for vLLM's weights, keys and values (vLLM: gpu_memory_utilization)."""
        prefix_caching: bool = True
        """Read a prompt once for all of its group."""
        sleep: bool = True
        """On a GPU, hand vLLM's memory back while the trainer updates (its sleep mode, level 1)."""
        eager: bool = False
        """Never capture CUDA graphs; on a CPU nothing is ever captured or compiled."""
        block_size: int = 0
        """Tokens in a block of keys and values; a group shares the whole blocks of its prompt. 0: 32, and 16 on a CPU whose
        attention takes so few."""
        runner: str = "auto"
        """vLLM's model runner: v2 on a GPU, v1 on a CPU (auto). v2 on a CPU needs Triton's interpreter and is for tests."""
        num_kv_blocks: int = 0
        """Blocks of keys and values; 0: as many as the memory holds. Few of them force preemption."""

        def __post_init__(self):
            if self.runner not in ("auto", "v1", "v2"):
                raise UserError(f"engine.runner: {self.runner!r} is not one of auto, v1, v2")
            for name, least in (("max_batch", 1), ("max_batch_tokens", 0), ("block_size", 0), ("num_kv_blocks", 0)):
                if getattr(self, name) < least:
                    raise UserError(f"engine.{name}: wanted {least} or more, got {getattr(self, name)}")
            if 0 < self.max_batch_tokens < self.max_batch:
                raise UserError(f"engine.max_batch_tokens: wanted 0 or at least engine.max_batch={self.max_batch}, got "
                                f"{self.max_batch_tokens}")
            if not self.kv_cache_gib > 0:
                raise UserError(f"engine.kv_cache_gib: wanted more than 0, got {self.kv_cache_gib}")
            if not 0 < self.gpu_memory_share <= 1:
                raise UserError(f"engine.gpu_memory_share: wanted more than 0 and at most 1, got {self.gpu_memory_share}")

    def __init__(self, config: Config, parts: EngineParts):
        self.config, self.parts, self.span, self.version = config, parts, parts.span, -1
        self.sleeps = config.sleep and parts.device.type != "cpu"  # a CPU has nothing to hand back to
        self.engine = _start(config, parts)
        self.runner = self.engine.model_executor.driver_worker.worker.model_runner
        self.table = _Table(self.runner.model.model.embed_tokens, parts.model.vocab_size)
        self.method = parts.method(EmbeddingInDtype(self.table, parts.dtype)).to(parts.device).eval().requires_grad_(False)
        self.own_head_weight_VD: Tensor | None = None
        seed = torch.tensor(parts.seed, dtype=torch.int64, device=parts.device)
        self.slots = Slots(config.max_batch, seed, parts.model.vocab_size)
        self.first_key = 0  # of the requests whose keys and values may be cached
        self.holder = self.runner.model_state if hasattr(self.runner, "model_state") else self.runner
        self.holder.seats = Seats(self.slots, self._head)

    @classmethod
    def refusal(cls, config: Config, model: PretrainedConfig, device: torch.device) -> str | None:
        """Why such a model cannot be run here, with the remedy where there is one; None where it can. Imports vllm last."""
        if model.model_type not in FAMILIES:
            return f"vllm runs {', '.join(FAMILIES)} models here, not {model.model_type!r}"
        if device.type == "cpu" and (heads := head_size(model)) not in CPU_HEAD_SIZES:
            return f"vllm attends on a CPU with heads of {', '.join(map(str, CPU_HEAD_SIZES))}, and this model's have {heads}"
        if config.block_size % 16:
            where = " on a CPU, or of 32 on some," if device.type == "cpu" else ""
            return f"vllm wants engine.block_size to be a multiple of 16{where} and got {config.block_size}"
        return surface.refusal(surface.runner_of(config.runner, device), device)

    @classmethod
    def check(cls, config: Config, model: PretrainedConfig, device: torch.device) -> None:
        if reason := cls.refusal(config, model, device):
            raise UserError(f"engine.name: {reason}, or use engine.name=hf")

    @classmethod
    def build(cls, config: Config, parts: EngineParts) -> VLLMEngine:
        cls.check(config, parts.model, parts.device)  # a run may be opened where it was not trained
        return cls(config, parts)

    # ---- weights -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        _check_groups()
        own = {f"method.{name}": value for name, value in self.method.state_dict(keep_vars=True).items()}
        head_name = "model.embed_tokens.weight" if self.parts.model.tie_word_embeddings else "lm_head.weight"

        def for_vllm() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                if name.startswith("method."):
                    own.pop(name).copy_(tensor)
                    continue
                if name == head_name:
                    self.own_head_weight_VD = self._own_head_weight(tensor)
                yield name, tensor

        stream = for_vllm()
        self.runner.reload_weights(weights_iterator=stream)
        for _ in stream:  # whatever vLLM had no more need to look at
            pass
        if own:
            raise RuntimeError(f"vllm engine: the weight stream lacked {', '.join(sorted(own)[:3])}")
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vllm engine: keys and values of the old weights could not be dropped")
        self.version = version

    def _own_head_weight(self, weight_VD: Tensor) -> Tensor | None:
        """The LM head's weight to draw with, where vLLM's own cannot be read: on a CPU vLLM keeps it only in a layout of its
        products, which for tied embeddings is not even made again when weights are reloaded."""
        if is_supported(self.parts.device, self.parts.dtype):
            return torch.ops.mkldnn._reorder_linear_weight(weight_VD.to(self.parts.dtype))
        if self.parts.device.type == "cpu" and not self.parts.model.tie_word_embeddings:
            return weight_VD.to(self.parts.dtype, copy=True)
        return None

    def _head(self) -> tuple[Tensor, Tensor]:
        """The LM head's weight and the embedding table, as they are now."""
        table_VD = self.table.weight
        if self.own_head_weight_VD is not None:
            return self.own_head_weight_VD, table_VD
        if self.parts.model.tie_word_embeddings:
            return table_VD, table_VD
        return self.runner.model.lm_head.weight[: len(table_VD)], table_VD

    @contextmanager
    def released(self) -> Iterator[None]:
        self.engine.reset_prefix_cache()  # the weights are about to change
        if not self.sleeps:
            yield
            return
        self.engine.sleep(level=1)  # weights to the host, keys and values away; what is in our slots is not vLLM's to move
        try:
            yield
        finally:
            torch.cuda.empty_cache()  # vLLM asks the driver for memory: what the update has let go of is still torch's
            self.engine.wake_up()

    def close(self) -> None:
        """Let go of all of vLLM's tensors, then shut it down: its pools of GPU memory, for one engine at a time, are given up
        with whatever is still in them. Other vllm engines of this process draw no more."""
        from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
        from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

        core, worker = self.engine.engine_core, self.engine.model_executor.driver_worker.worker
        for layer in self.runner.model.modules():  # what reloading remembers of a layer holds it, keys and values included
            LAYERWISE_INFO.pop(layer, None)
            if isinstance(layer, TorchCompileWithNoGuardsWrapper):
                layer.cleanup()  # as does its hook into torch's compiler
        self.holder.seats = self.own_head_weight_VD = None
        self.runner.shutdown()
        del layer, self.holder, self.slots, self.method, self.table, self.runner, self.engine, worker.model_runner
        gc.unfreeze()  # as vLLM had it frozen when it had started
        gc.collect()
        core.shutdown()

    def planned_bytes(self, num_requests: int, max_prompt: int, sampling: Sampling) -> dict[str, int]:
        """The most it holds while it draws, by what it is for: the buffers of `max_batch` completions, however many come, and
        what was written of those that have ended, which is put aside until all have."""
        spec, longest = self.method.record_spec(self.method.model.width, sampling), self.span.longest(sampling.max_new_tokens)
        record, ended = (Buffers(n, longest, spec, torch.device("meta")) for n in (self.slots.num_slots + 1, num_requests))
        with torch.device("meta"):  # vLLM's own parameters are empty where it has laid them out for a CPU's products
            model = AutoModelForCausalLM.from_config(self.parts.model, dtype=self.parts.dtype)
        weights = [*model.parameters(), *self.method.parameters()]
        weights += [] if self.own_head_weight_VD is None else [self.own_head_weight_VD]
        return {"weights": sum(w.numel() * w.element_size() for w in weights),
                "keys and values": sum(x.nbytes for x in self.runner.kv_caches), "record": record.size_bytes,
                "ended completions": ended.size_bytes}

    # ---- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        from vllm import SamplingParams

        _check_groups()
        longest, room = self.span.longest(sampling.max_new_tokens), self.engine.model_config.max_model_len
        for request in requests:
            if (wanted := len(request.prompt.token_ids) + longest) > room:
                raise UserError(f"prompt {request.prompt.id}: {len(request.prompt.token_ids)} tokens and a completion of "
                                f"{longest} are {wanted}, more than the {room} the vllm engine was started for "
                                "(chat.max_prompt_tokens and sampling.max_new_tokens)")
        keys = self.slots.begin(requests, sampling, self.method, self.span)
        if self.slots.next_key - self.first_key > self.slots.num_names:
            self.engine.reset_prefix_cache()
            self.first_key = self.slots.next_key - len(keys)
        waiting, rows = {f"{key}": key for key in keys}, {}
        try:
            for key, request in zip(keys, requests, strict=True):
                params = SamplingParams(
                    temperature=0.0, max_tokens=longest, stop_token_ids=[LAST],
                    ignore_eos=True, detokenize=False, extra_args={KEY: key})
                self.engine.add_request(f"{key}", {"prompt_token_ids": list(request.prompt.token_ids)}, params)
            started: set[str] = set()

            def step() -> None:
                for out in self.engine.step():
                    started.add(out.request_id)
                    if out.finished:  # the next step is on its way: what was drawn is put aside, not looked at
                        key = waiting[out.request_id]
                        rows[key] = self.slots.take(key, len(out.outputs[0].token_ids))
                        del waiting[out.request_id]

            # the prompts of as many as fit; those of others are read in the steps that decode
            first = requests[: self.config.max_batch]
            with span("rollout/prefill", sum(map(len, {r.prompt.token_ids for r in first}))):
                while self.engine.has_unfinished_requests() and len(started) < len(first):
                    step()
            with span("rollout/decode") as drawing:
                while self.engine.has_unfinished_requests():
                    step()
                out = self.slots.rollouts(keys, [rows.pop(key) for key in keys], self.version)
                drawing.tokens = sum(len(rollout.token_ids) for rollout in out)
        finally:
            if waiting:
                self.engine.abort_request(list(waiting))
                self.slots.leave(waiting.values())
        return out


class _Table:
    """vLLM's embedding without the rows it pads the vocabulary with."""

    def __init__(self, embed_tokens, vocab_size: int):
        self.embed_tokens, self.vocab_size = embed_tokens, vocab_size

    @property
    def weight(self) -> Tensor:
        return self.embed_tokens.weight[: self.vocab_size]

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        return torch.nn.functional.embedding(token_ids_T, self.weight)


def _check_groups() -> None:
    """RuntimeError where vLLM has no process groups: a process has one set of them, which every engine that is closed ends."""
    from vllm.distributed import model_parallel_is_initialized

    if not model_parallel_is_initialized():
        raise RuntimeError("another vllm engine of this process has been closed, which ends vLLM's process groups for all of "
                           "them: build this one anew, or close none before the last has drawn")


def _start(config: VLLMEngine.Config, parts: EngineParts):
    """vLLM's engine for this architecture, its weights not yet there."""
    runner, is_cpu = surface.runner_of(config.runner, parts.device), parts.device.type == "cpu"
    # one process, no telemetry, and no chatter; vLLM reads these when it is imported
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2"))}
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if parts.dtype == torch.float32:  # vLLM attends in it by Triton, whose products on a GPU keep 10 bits unless told
        defaults["TRITON_F32_DEFAULT"] = "ieee"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    set_num_threads = torch.set_num_threads
    from vllm import LLM

    from fastlatent.vllm_plugin import cpu_norm, register

    register()
    block_size = 32
    if is_cpu:
        from fastlatent.vllm_plugin import cpu_attention

        cpu_norm.register()
        block_size = cpu_attention.block_size(parts.dtype, head_size(parts.model))
        options = {"kv_cache_memory_bytes": int(config.kv_cache_gib * GIB), "ir_op_priority": cpu_norm.PRIORITY}
    else:
        options = {"gpu_memory_utilization": config.gpu_memory_share, "enable_sleep_mode": config.sleep}
    if runner == "v1":
        options |= {"enable_prompt_embeds": True, "worker_cls": "fastlatent.vllm_plugin.runner_v1.LatentWorker"}
    if config.num_kv_blocks:
        options["num_gpu_blocks_override"] = config.num_kv_blocks
    folder = config_folder(parts.model)
    try:
        llm = LLM(
            model=str(folder), skip_tokenizer_init=True, load_format="dummy", dtype=str(parts.dtype).removeprefix("torch."),
            hf_overrides={"architectures": [PREFIX + FAMILIES[parts.model.model_type]]}, seed=0,
            max_model_len=parts.max_prompt_tokens + parts.span.longest(parts.max_new_tokens), max_num_seqs=config.max_batch,
            max_num_batched_tokens=config.max_batch_tokens or max(1024 if is_cpu else 4096, config.max_batch),
            block_size=config.block_size or block_size,
            enforce_eager=is_cpu or config.eager, enable_prefix_caching=config.prefix_caching, **options)
    except Exception as error:  # a wrong option, too little memory, and whatever else vLLM and all it stands on may trip over
        raise UserError(f"engine: vllm did not start: {_cause(error)} (memory: engine.kv_cache_gib, engine.gpu_memory_share; "
                        "batch: engine.max_batch, engine.max_batch_tokens), or use engine.name=hf") from error
    finally:
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker disables it for the whole process
    return llm.llm_engine


def _cause(error: Exception) -> str:
    """What is wrong, in one line."""
    from pydantic import ValidationError  # vLLM's, as this error then is

    is_of_an_option = isinstance(error, ValidationError)  # whose own first line is how many there are
    said = error.errors()[0]["msg"].removeprefix("Value error, ") if is_of_an_option else str(error)
    said = said.strip().partition("\n")[0]
    if said and isinstance(error, (ValueError, RuntimeError)):  # what vLLM raises on purpose
        return said
    last, kind = traceback.extract_tb(error.__traceback__)[-1], type(error).__name__
    return f"{kind}: {said}" if said else f"{kind} in {last.filename}:{last.lineno}, {last.line}"
