"""vLLM's first model runner, which its CPU build uses, with our inputs and our draws: `worker_cls` of the engine."""

from __future__ import annotations

import numpy as np
import torch
import vllm.v1.worker.cpu_worker as cpu_worker
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from fastlatent.vllm_plugin.seats import Seats


class LatentRunner(CPUModelRunner):
    """Overrides what makes the model's inputs and what draws from its outputs; scheduling, cache and attention are vLLM's."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seats: Seats | None = None  # set by the engine before the first request
        self.row_of: dict[str, tuple[int, int]] = {}  # vLLM's request id -> slot and length of its prompt

    def _update_states(self, scheduler_output):
        out = super()._update_states(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            self.row_of.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            self.row_of[new.req_id] = self.seats.slot_of(new), len(new.prompt_token_ids)
        return out

    def _preprocess(self, scheduler_output, num_input_tokens, intermediate_tensors=None):
        out = super()._preprocess(scheduler_output, num_input_tokens, intermediate_tensors)
        batch = self.input_batch
        scheduled_B = np.array([scheduler_output.num_scheduled_tokens[r] for r in batch.req_ids], dtype=np.int64)
        computed_B = batch.num_computed_tokens_cpu[: len(scheduled_B)].astype(np.int64)
        slot_B, num_prompt_B = np.array([self.row_of[r] for r in batch.req_ids], dtype=np.int64).T
        # the completion token that each row can draw this step, and the one each of its inputs is; negative inside the prompt
        time_B = computed_B + scheduled_B - num_prompt_B
        self.rows = _tensor(slot_B), _tensor(time_B)
        row_T = np.repeat(np.arange(len(scheduled_B)), scheduled_B)
        before_end_T = scheduled_B.cumsum()[row_T] - np.arange(len(row_T))
        time_T = time_B[row_T] - before_end_T
        token_ids_T = self.input_ids.gpu[: len(row_T)].long()
        out[1][: len(row_T)] = (
            self.seats.inputs(token_ids_T, _tensor(slot_B[row_T]), _tensor(time_T)) if (time_T >= 0).any()
            else self.seats.prompt_inputs(token_ids_T))
        return out

    def _sample(self, logits: Tensor, spec_decode_metadata) -> SamplerOutput:
        """`logits` are hidden states: see `fastlatent.vllm_plugin.models.compute_logits`."""
        (slot_B, time_B), num_rows = self.rows, len(logits)
        row_N = _tensor(np.flatnonzero(~self.discard_request_mask.np[:num_rows]))  # not where a chunk ends before its text does
        name_B = torch.zeros(num_rows, dtype=torch.int32)
        if len(row_N):
            name_B[row_N] = self.seats.draw(logits[row_N], slot_B[row_N], time_B[row_N]).int()
        return SamplerOutput(sampled_token_ids=name_B[:, None], logprobs_tensors=None)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


class LatentWorker(cpu_worker.CPUWorker):
    """vLLM's CPU worker with our runner, whose class it names nowhere but in `init_device`."""

    def init_device(self) -> None:
        stock = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = LatentRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = stock
