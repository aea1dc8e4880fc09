"""The model as the trainer needs it: a stock causal LM, the method attached to its inputs, and scored completions.

Trained weights are float32 masters; a forward pass computes in `model.dtype` under autocast. With LoRA the base stays in
`model.dtype` and only the adapters are trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from fastlatent_kernels import token_logprob
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastlatent import objectives
from fastlatent.checkpoint import Checkpoint
from fastlatent.errors import UserError
from fastlatent.methods.base import Method, MethodConfig, ModelInfo
from fastlatent.models import attention, flash, liger, recompute
from fastlatent.models.supported import check_supported
from fastlatent.profiling import span
from fastlatent.schema import ModelConfig, ObjectiveConfig
from fastlatent.types import Batch, Loss, Scored

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    # without such instructions bfloat16 products run 8 times slower than float32 ones (measured, AVX2)
    is_fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if is_fast else torch.float32


def model_info(model, config: ModelConfig, dtype: torch.dtype) -> ModelInfo:
    return ModelInfo(
        width=model.config.hidden_size, vocab_size=model.get_input_embeddings().num_embeddings, dtype=dtype,
        embedding_is_frozen=config.freeze_embedding or config.lora is not None,
        initializer_range=getattr(model.config, "initializer_range", 0.02))


class Policy(nn.Module):
    """`model` must be a causal LM with float32 weights on its device; it is changed in place (attention, adapters)."""

    def __init__(self, model, config: ModelConfig, method: type[Method], method_config: MethodConfig, *, has_reference: bool):
        super().__init__()
        check_supported(model, config)
        attention.use(model, "model.path")
        self.config, self.dtype = config, compute_dtype(config, model.device)
        self.flash = flash.choose(config.attention, model.device, self.dtype, model.config)
        if config.liger:
            liger.check(model.config, model.device)
            liger.apply(model)
        # without adapters to switch off, the reference has to be a copy
        self._reference = None
        if has_reference and config.lora is None:
            self._reference = (cast_weights(copy.deepcopy(model), self.dtype).eval().requires_grad_(False),)
        if config.lora is not None:
            cast_weights(model, self.dtype)  # frozen: no master needed
            lora = PeftLora(r=config.lora.r, lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout,
                            target_modules=list(config.lora.target_modules), task_type="CAUSAL_LM")
            model = get_peft_model(model, lora, autocast_adapter_dtype=True)
        elif config.freeze_embedding:
            model.get_input_embeddings().requires_grad_(False)
            model.lm_head.requires_grad_(False)
        self.model = model
        if config.gradient_checkpointing:
            recompute.enable(self.base, config.gradient_checkpointing)
        if config.compile:
            for layer in self.base.model.layers:  # one graph serves all of them, and every length
                layer.compile(dynamic=True)
        table = EmbeddingInDtype(self.base.get_input_embeddings(), self.dtype)
        self.method = method(method_config, model_info(self.base, config, self.dtype), table)
        self.method.to(self.device)

    @property
    def base(self):
        """The transformers model, under the adapters if there are any."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        return self.base.get_input_embeddings().weight.device

    @property
    def head_weight(self) -> Tensor:
        return self.base.lm_head.weight

    def _autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def _body(self, base, input_TD: Tensor, batch: Batch) -> Tensor:
        # of a view the first block would be compiled apart from the others
        input_1TD = input_TD[None].clone() if self.config.compile else input_TD[None]
        with self._autocast():
            return base.model(inputs_embeds=input_1TD, position_ids=batch.position_T[None], use_cache=False,
                              layout=attention.Packed(batch.varlen, flash=self.flash)).last_hidden_state[0].to(self.dtype)

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Inside the block the model computes as an engine does, and draws no random numbers."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [T, D] of a packed batch, its latent inputs rebuilt by the method."""
        return self._body(self.base, self.method.embed(batch.token_ids_T, batch.latent_T, batch.record_T), batch)

    def scored_hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [A, D] at the places that predict a scored token, differentiable."""
        with span("update/forward"):
            return self.hidden(batch)[batch.score_A]

    def score(self, batch: Batch, temperature: float) -> Scored:
        """Log-probability and entropy of every scored token at `temperature`, differentiable."""
        hidden_AD = self.scored_hidden(batch)
        with span("update/head"):
            logprob_A, entropy_A = token_logprob(hidden_AD, self.head_weight, batch.target_A, temperature)
        return Scored(logprob_A, entropy_A)

    def loss(self, batch: Batch, temperature: float, objective: ObjectiveConfig) -> Loss:
        """The surrogate on what `score` gives, a matrix product cheaper: its gradient is made while the logits exist."""
        hidden_AD = self.scored_hidden(batch)
        with span("update/head"):
            return objectives.surrogate_of_hidden(hidden_AD, self.head_weight, batch, temperature, objective)

    @torch.no_grad()
    def reference_logprob(self, batch: Batch, temperature: float) -> Tensor:
        """Log-probabilities [A] under the frozen reference, which reads the plain tokens (HRPO's, too)."""
        hidden_AD = self.reference_hidden(batch)
        return token_logprob(hidden_AD, self.reference_head_weight, batch.target_A, temperature)[0]

    @torch.no_grad()
    def reference_hidden(self, batch: Batch, input_TD: Tensor | None = None) -> Tensor:
        """Last hidden states [A, D] of the frozen reference where a token is scored, of `input_TD` or else the plain tokens."""
        if self._reference is not None:
            base, off = self._reference[0], nullcontext()
        else:
            base, off = self.base, self.model.disable_adapter()
        with off:
            if input_TD is None:
                input_TD = base.get_input_embeddings()(batch.token_ids_T).to(self.dtype)
            return self._body(base, input_TD, batch)[batch.score_A]

    @property
    def reference_head_weight(self) -> Tensor:
        return (self.base if self._reference is None else self._reference[0]).lm_head.weight

    def reference_parameters(self) -> Iterator[nn.Parameter]:
        """The frozen copy's; none where there is no reference, or switched-off adapters are it."""
        return iter(()) if self._reference is None else self._reference[0].parameters()

    # ---- weights -------------------------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by a name that is stable across runs; the method's under `method.`."""
        out = {f"model.{name}": p for name, p in self.model.named_parameters() if p.requires_grad}
        return out | {f"method.{name}": p for name, p in self.method.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint's trained weights; UserError where it is of another model, method or configuration."""
        mine, stored = self.trainable(), checkpoint.tensors["weights"]
        if odd := sorted(set(mine) ^ set(stored)):
            raise UserError(f"{checkpoint.path}: does not fit this model: {odd[0]!r} is in only one of the two")
        for name, parameter in mine.items():
            if parameter.shape != stored[name].shape:
                raise UserError(f"{checkpoint.path}: {name} is {list(stored[name].shape)}, wanted {list(parameter.shape)}")
            parameter.copy_(stored[name])

    @torch.no_grad()
    def published(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight an engine needs: model tensors under their Hugging Face names, adapters merged in float32 on the way
        (the base itself is never touched), then the method's under `method.`."""
        layers = {name: m for name, m in self.base.named_modules() if isinstance(m, LoraLayer)}
        for name, tensor in self.base.named_parameters():
            owner, _, leaf = name.rpartition(".")
            if ".lora_" in name:
                continue
            if owner.endswith(".base_layer"):
                owner = owner.removesuffix(".base_layer")
                if leaf == "weight":
                    tensor = tensor.float() + layers[owner].get_delta_weight("default").float()
                name = f"{owner}.{leaf}"
            yield name, tensor.detach()
        for name, tensor in self.method.state_dict().items():
            yield f"method.{name}", tensor


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters only: `.to` would round the rotary frequencies, which stay float32 in a model loaded in `dtype`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


class EmbeddingInDtype:
    """The model's own embedding in the compute dtype: what a method sees of the table."""

    def __init__(self, table: nn.Embedding, dtype: torch.dtype):
        self.table, self.dtype = table, dtype

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        return self.table(token_ids_T).to(self.dtype)
