"""vLLM's second model runner, its default on a GPU, with our inputs and our draws: the model state of our model classes.

Inputs are written to one fixed buffer, whose address a CUDA graph may keep. Everything is on the device and in stream order:
nothing here looks at a value, so vLLM's asynchronous scheduling stays as it is.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from fastlatent.vllm_plugin.seats import Seats


class LatentModelState(DefaultModelState):
    supports_prompt_embeds = False

    def __init__(self, vllm_config, model, encoder_cache, device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.seats: Seats | None = None  # set by the engine when vLLM has profiled itself and captured its graphs
        self.input_TD = torch.zeros(self.max_num_tokens, self.inputs_embeds_size, dtype=self.dtype, device=device)
        # by vLLM's index of a request, which is another one after a preemption
        self.slot_R = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        self.num_prompt_R = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)

    def add_request(self, req_index: int, new_req_data) -> None:
        super().add_request(req_index, new_req_data)
        if self.seats is not None:  # vLLM warms up with requests of its own
            self.slot_R[req_index] = self.seats.slot_of(new_req_data)
            self.num_prompt_R[req_index] = len(new_req_data.prompt_token_ids)

    def prepare_inputs(self, input_batch, req_states) -> dict[str, Tensor]:
        out = super().prepare_inputs(input_batch, req_states)
        if self.seats is not None:
            B, T = input_batch.num_reqs, input_batch.num_tokens
            index_B = input_batch.idx_mapping[:B].long()
            # each token's row: the last one that starts at or before it
            row_T = torch.searchsorted(input_batch.query_start_loc[1 : B + 1], torch.arange(
                T, dtype=input_batch.query_start_loc.dtype, device=self.device), right=True)
            index_T = index_B[row_T]
            time_T = input_batch.positions[:T].long() - self.num_prompt_R[index_T]
            self.input_TD[:T] = self.seats.inputs(input_batch.input_ids[:T].long(), self.slot_R[index_T], time_T)
        return out | {"inputs_embeds": self.input_TD[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Tensor]:
        return super().prepare_dummy_inputs(num_reqs, num_tokens) | {"inputs_embeds": self.input_TD[:num_tokens]}

    def custom_sampler(self, sampler):
        return LatentSampler(sampler, self), None

    def draw(self, hidden_BD: Tensor, input_batch, num_sampled_B: Tensor) -> Tensor:
        """Names [B] of the tokens drawn; rows whose text goes on behind this step's chunk draw nothing."""
        index_B = input_batch.idx_mapping[: input_batch.num_reqs].long()
        time_B = input_batch.positions[input_batch.logits_indices].long() + 1 - self.num_prompt_R[index_B]
        slot_B = torch.where(num_sampled_B > 0, self.slot_R[index_B], self.seats.slots.nowhere)
        return self.seats.draw(hidden_BD, slot_B, time_B.clamp(min=0))


class LatentSampler:
    """In the place of vLLM's sampler, which still fills in everything of its output but the token."""

    def __init__(self, sampler, state: LatentModelState):
        # vLLM keeps the sampler when it lets go of the state, which holds the model
        self._sampler, self._state = sampler, weakref.proxy(state)

    def __getattr__(self, name: str):
        return getattr(self._sampler, name)

    def __call__(self, logits: Tensor, input_batch):
        """`logits` are hidden states: see `fastlatent.vllm_plugin.models.compute_logits`."""
        if self._state.seats is None:
            return self._sampler(logits, input_batch)
        hidden_BD = logits.clone()  # vLLM's sampler may change what it takes for logits
        out = self._sampler(logits, input_batch)
        names_B = self._state.draw(hidden_BD, input_batch, out.num_sampled[: input_batch.num_reqs])
        out.sampled_token_ids[: len(names_B), 0] = names_B.to(out.sampled_token_ids.dtype)
        return out
