"""The in-process engine: a plain decode loop over a stock transformers model. Always works; the reference for every other.

Each prompt is read once and shared by its group; finished rows are dropped; every tensor stays on the device and the host
looks at it once every `read_every` steps. On a CPU the key-value places read grow with the text; elsewhere shapes are static.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from fastlatent.errors import UserError
from fastlatent.methods.base import Method
from fastlatent.models import attention
from fastlatent.packing import varlen
from fastlatent.policy import EmbeddingInDtype
from fastlatent.profiling import span
from fastlatent.rollout.base import ENGINES, EngineConfig, EngineParts
from fastlatent.rollout.buffers import Buffers
from fastlatent.rollout.draw import look, settle
from fastlatent.rollout.prepack import is_supported, prepack
from fastlatent.rollout.thinking import ThinkingSpan
from fastlatent.types import Capability, Request, Rollout, Sampling

MOST_GRAPHS = 128
"""Shapes that the decode step may be compiled for: numbers of rows times powers of two of prompt lengths. torch stops at 8."""


@dataclass(slots=True)
class Rows:
    """The rows still being decoded. `slot_B` says where each one's buffers are; the rest is what the next step needs."""

    slot_B: Tensor
    place_B: Tensor  # where the next input goes in the cache: prompt length + time
    counter_B2: Tensor  # prompt id and step * 2^16 + sample, for the noise
    input_BD: Tensor
    span: dict[str, Tensor]
    state: dict[str, Tensor]  # the method's
    time_B: Tensor  # index of the completion token being drawn


@dataclass(slots=True)
class Prefill:
    """Prompts as the model read them: each one's last hidden state, keys and values, and length."""

    key: tuple  # weights' version and the prompts' tokens
    hidden_SD: Tensor
    cache: attention.KVCache
    length_S: Tensor


@ENGINES.register("hf")
class HFEngine:
    capabilities = frozenset({Capability.TOKENS, Capability.MIXTURE, Capability.HIDDEN, Capability.LOGITS})

    @dataclass(kw_only=True)
    class Config(EngineConfig):
        name: str = "hf"
        max_batch: int = 64
        """Most completions decoded at once."""
        kv: str = "auto"
        """growing (fast on a CPU), static (fixed shapes for graphs) or auto: growing on a CPU, static elsewhere."""
        read_every: int = 0
        """Steps between two looks of the host at the device; 0: 1 on a CPU, where looking is free, 8 elsewhere."""
        compile: bool = False
        """torch.compile the decode step (fullgraph); needs kv=static."""
        prepack: bool = True
        """Lay float32 weights out for the CPU's matrix products: faster, for a second copy of them; elsewhere of no effect."""

        def __post_init__(self):
            if self.kv not in ("auto", "growing", "static"):
                raise UserError(f"engine.kv: {self.kv!r} is not one of auto, growing, static")
            if self.compile and self.kv != "static":
                raise UserError("engine.compile: needs engine.kv=static, because compiled shapes cannot grow")
            if self.max_batch < 1 or self.read_every < 0:
                raise UserError("engine.max_batch, engine.read_every: wanted at least 1 and at least 0")

    def __init__(self, config: Config, model, method: Method, span_: ThinkingSpan, seed: int):
        """`model` is a causal LM of the engine's own, in its compute dtype; `method` an instance bound to its embedding."""
        self.config, self.model, self.method, self.span = config, model.eval().requires_grad_(False), method.eval(), span_
        attention.use(model, "model.path")
        self.device, self.dtype = model.device, model.dtype
        prepacks = config.prepack and not config.compile and is_supported(self.device, self.dtype)
        self.packed_layers = prepack(model) if prepacks else []
        is_cpu = self.device.type == "cpu"
        self.is_static = config.kv == "static" or (config.kv == "auto" and not is_cpu)
        self.read_every = config.read_every or (1 if is_cpu else 8)
        self.seed = torch.tensor(seed, dtype=torch.int64, device=self.device)
        self.version = -1
        self._prefilled: Prefill | None = None  # the latest, in case the same prompts come again
        self._step = self._compiled() if config.compile else self.step

    @classmethod
    def check(cls, config: Config, model: PretrainedConfig, device: torch.device) -> None:
        """Runs wherever the trainer does."""

    @classmethod
    def build(cls, config: Config, parts: EngineParts) -> HFEngine:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(parts.model, dtype=parts.dtype).to(parts.device)
        model.tie_weights()
        method = parts.method(EmbeddingInDtype(model.get_input_embeddings(), parts.dtype)).to(parts.device)
        return cls(config, model, method, parts.span, parts.seed)

    # ---- weights -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        targets = dict(self.model.named_parameters())
        targets |= {f"method.{name}": value for name, value in self.method.state_dict(keep_vars=True).items()}
        for name, tensor in tensors:
            targets.pop(name).copy_(tensor)
        if targets:
            raise RuntimeError(f"hf engine: the weight stream lacked {', '.join(sorted(targets)[:3])}")
        for layer in self.packed_layers:
            layer.pack()
        self.version, self._prefilled = version, None

    @contextmanager
    def released(self) -> Iterator[None]:
        self._prefilled = None  # all that is held between two generate calls beside the weights
        yield

    def close(self) -> None:
        pass

    def planned_bytes(self, num_requests: int, max_prompt: int, sampling: Sampling) -> dict[str, int]:
        """The most it holds while it draws that many completions, by what it is for."""
        rows, meta = min(num_requests, self.config.max_batch), torch.device("meta")
        longest = self.span.longest(sampling.max_new_tokens)
        cache = attention.KVCache(self.model.config, rows, self._room(max_prompt, longest), self.dtype, meta)
        spec = self.method.record_spec(self.model.config.hidden_size, sampling)
        weights = [*self.model.parameters(), *self.method.parameters(), *(layer.weight for layer in self.packed_layers)]
        return {"weights": sum(w.nbytes for w in weights),
                "keys and values": sum(x.nbytes for x in (*cache.keys, *cache.values)),
                "record": Buffers(rows, longest, spec, meta).size_bytes}

    # ---- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        out: list[Rollout | None] = [None] * len(requests)
        # siblings side by side, so that a prompt is read once
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt.token_ids), requests[i].prompt.id, i))
        for start in range(0, len(order), self.config.max_batch):
            chosen = order[start : start + self.config.max_batch]
            for index, rollout in zip(chosen, self._generate([requests[i] for i in chosen], sampling), strict=True):
                out[index] = rollout
        return out

    def _generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        max_new = self.span.longest(sampling.max_new_tokens)
        with span("rollout/prefill", sum(map(len, {r.prompt.token_ids for r in requests}))):
            hidden_BD, cache, length_B = self._prefill(requests, max_new)
        B, device = len(requests), self.device
        spec = self.method.record_spec(hidden_BD.shape[1], sampling)
        buffers = Buffers(B, max_new, spec, device)
        rows = Rows(
            slot_B=torch.arange(B, device=device),
            place_B=length_B,
            counter_B2=torch.tensor([[r.prompt.id, (r.step << 16) + r.sample] for r in requests], device=device),
            input_BD=hidden_BD,
            span=self.span.start(B, device),
            state=self.method.start(B, device),
            time_B=torch.zeros(B, dtype=torch.int64, device=device),
        )
        longest = max(len(r.prompt.token_ids) for r in requests)
        with span("rollout/decode") as drawing:
            self.draw(rows, hidden_BD, buffers, sampling)
            for time in range(1, max_new):
                if time % self.read_every == 0:
                    done = rows.span["done"].tolist()
                    if all(done):
                        break
                    rows = self._drop(rows, done, cache, buffers, longest + time)
                limit = cache.keys[0].shape[2] if self.is_static else longest + time
                self._step(rows, cache, buffers, sampling, limit)
            buffers.park(rows.slot_B, rows.span)
            rollouts = buffers.rollouts(requests, self.version)
            drawing.tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        return rollouts

    def _prefill(self, requests: Sequence[Request], max_new: int) -> tuple[Tensor, attention.KVCache, Tensor]:
        """Last hidden state [B, D] of each row's prompt, the cache that holds it, and the prompt lengths [B]."""
        prompts, row_of = [], {}
        for request in requests:
            if request.prompt.id not in row_of:
                row_of[request.prompt.id] = len(prompts)
                prompts.append(request.prompt.token_ids)
        key = (self.version, tuple(prompts))
        if self._prefilled is None or self._prefilled.key != key:
            self._prefilled = None  # freed before the next one is made
            self._prefilled = self._read(key, prompts)
        read = self._prefilled
        row_B = torch.tensor([row_of[r.prompt.id] for r in requests], device=self.device)
        cache, longest = read.cache.view(), read.cache.keys[0].shape[2]
        cache.select(row_B, used=longest, room=self._room(longest, max_new))
        return read.hidden_SD[row_B], cache, read.length_S[row_B]

    def _room(self, longest_prompt: int, max_new: int) -> int:
        """Cache places of a row; compiled, one graph serves all longest prompts up to the next power of two."""
        return (1 << (longest_prompt - 1).bit_length() if self.config.compile else longest_prompt) + max_new

    def _read(self, key: tuple, prompts: Sequence[Sequence[int]]) -> Prefill:
        layout = varlen([len(ids) for ids in prompts]).to(self.device)
        token_ids_T = torch.tensor([t for ids in prompts for t in ids], device=self.device)
        position_T = torch.cat([torch.arange(len(ids)) for ids in prompts]).to(self.device)
        cache = attention.KVCache(self.model.config, len(prompts), layout.max_seqlen, self.dtype, self.device)
        input_TD = self.method.embed(token_ids_T, torch.zeros_like(token_ids_T, dtype=torch.bool), None)
        hidden_TD = self.model.model(
            inputs_embeds=input_TD[None], position_ids=position_T[None], use_cache=False,
            layout=attention.Packed(layout, cache)).last_hidden_state[0]
        last_S = layout.cu_seqlens[1:].long() - 1
        return Prefill(key, hidden_TD[last_S], cache, layout.cu_seqlens.diff().long())

    def step(self, rows: Rows, cache: attention.KVCache, buffers: Buffers, sampling: Sampling, limit: int) -> None:
        """Read each row's next input and draw a token from what comes out: the whole decode step, on the device."""
        layout = attention.Decode.at(cache, rows.place_B, limit)
        hidden_BD = self.model.model(
            inputs_embeds=rows.input_BD[:, None], position_ids=rows.place_B[:, None], use_cache=False,
            layout=layout).last_hidden_state[:, 0]
        rows.place_B += 1
        rows.time_B += 1
        self.draw(rows, hidden_BD, buffers, sampling)

    def _compiled(self) -> Callable[..., None]:
        compiled = torch.compile(self.step, fullgraph=True, dynamic=False)

        def step(*args) -> None:
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                compiled(*args)

        return step

    def draw(self, rows: Rows, hidden_BD: Tensor, buffers: Buffers, sampling: Sampling) -> None:
        """Draw a token from each hidden state, let the method decide, write down what happened, make the next input."""
        with span("rollout/sample"):
            lm_head = self.model.lm_head
            weight_VD = lm_head.packed if self.packed_layers else lm_head.weight
            counter_B3 = torch.cat([rows.time_B[:, None], rows.counter_B2], dim=1)
            view = look(hidden_BD, weight_VD, self.model.get_input_embeddings().weight, self.method.needs, sampling, self.seed,
                        counter_B3)
            read_B, decision = settle(view, self.span, rows.span, self.method, rows.state, buffers, rows.slot_B, rows.time_B)
            rows.input_BD = self.method.embed(read_B, decision.latent_B, decision.record or None).to(self.dtype)

    def _drop(self, rows: Rows, done: list[bool], cache: attention.KVCache, buffers: Buffers, used: int) -> Rows:
        """Without the finished rows, once enough of them have gathered to pay for moving the others."""
        alive = [row for row, is_done in enumerate(done) if not is_done]
        size = len(alive)
        if self.is_static:  # one shape per power of two: finished rows fill the gap
            size = min(len(done), 1 << (size - 1).bit_length())
        if size > 0.9 * len(done):
            return rows
        alive += [row for row, is_done in enumerate(done) if is_done][: size - len(alive)]
        index_B = torch.tensor(alive, device=self.device)
        buffers.park(rows.slot_B, rows.span)
        cache.select(index_B, used=used)
        return Rows(
            rows.slot_B[index_B], rows.place_B[index_B], rows.counter_B2[index_B], rows.input_BD[index_B],
            {k: v[index_B] for k, v in rows.span.items()}, {k: v[index_B] for k, v in rows.state.items()},
            rows.time_B[index_B])
