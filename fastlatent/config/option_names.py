"""Which option was meant by a name that none has: what trl, transformers and the released HRPO call it, the same name in
another section, or one that is spelt nearly so. For error messages alone; no configuration is ever read by these names.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator

from fastlatent.schema import Config

TRL = {
    "num_generations": "group_size",
    "max_completion_length": "sampling.max_new_tokens",
    "generation_batch_size": "num_prompts",
    "steps_per_generation": "objective.num_minibatches",
    "num_iterations": "objective.num_epochs",
    "beta": "objective.kl_coef",
    "epsilon": "objective.clip_low and objective.clip_high",
    "epsilon_high": "objective.clip_high",
    "delta": "objective.dual_clip",
    "loss_type": "objective.normalizer",
    "scale_rewards": "objective.advantage",
    "reward_weights": "rewards.0.weight",
    "use_vllm": "engine.name=vllm",
    "vllm_gpu_memory_utilization": "engine.gpu_memory_share",
    "vllm_importance_sampling_correction": "mismatch.correction",
    "vllm_importance_sampling_mode": "mismatch.correction",
    "vllm_importance_sampling_clip_max": "mismatch.ratio_max",
    "vllm_importance_sampling_clip_min": "mismatch.ratio_min",
    "num_completions_to_print": "log.samples",
    "log_completions": "log.samples",
}
"""Options of trl's GRPOConfig that transformers' TrainingArguments has not."""

TRAINING_ARGUMENTS = {
    "per_device_train_batch_size": "num_prompts and update.tokens_per_microbatch",
    "gradient_accumulation_steps": "num_prompts and update.tokens_per_microbatch",
    "max_steps": "num_steps",
    "num_train_epochs": "num_steps",
    "learning_rate": "optim.lr",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "lr_scheduler_type": "optim.schedule",
    "warmup_steps": "optim.warmup_ratio",
    "output_dir": "out",
    "run_name": "recipe",
    "report_to": "log.trackers",
    "resume_from_checkpoint": "resume",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "eval.every",
    "bf16": "model.dtype",
    "torch_compile": "model.compile",
    "use_liger_kernel": "model.liger",
}

MODEL_CONFIG = {
    "model_name_or_path": "model.path",
    "attn_implementation": "model.attention",
    "use_peft": "model.lora",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target_modules",
}
"""Options of trl's ModelConfig."""

HRPO = {
    "max_prompt_length": "chat.max_prompt_tokens",
    "model_name": "model.path",
    "lora_rank": "model.lora.r",
    "residual_r_min": "method.r_min",
    "residual_r_max": "method.r_max",
    "lr_residual_gate": "method.lr_gate",
    "lr_residual_Lambda": "method.lr_lambda",
}
"""Options of the scripts released with HRPO (arXiv:2505.18454) that trl has not, or no longer."""

ELSEWHERE = TRL | TRAINING_ARGUMENTS | MODEL_CONFIG | HRPO


def hint(key: str, section: type) -> str:
    """The second half of `no such option; ...` about `key`, which the dataclass `section` has not."""
    names = [field.name for field in dataclasses.fields(section)]
    same = [path for path in _paths(Config) if path.rpartition(".")[2] == key]
    if meant := ELSEWHERE.get(key) or " or ".join(same):
        return f"did you mean {meant}?"
    near = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"options here are {', '.join(names)}"


def _paths(schema: type, above: str = "") -> Iterator[str]:
    """The dotted path of every option beneath a dataclass."""
    for name, kind in typing.get_type_hints(schema).items():
        yield above + name
        for part in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(part):
                yield from _paths(part, f"{above}{name}.")
