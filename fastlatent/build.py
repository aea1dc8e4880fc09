"""The parts of a run, made from its configuration: what training, evaluation, generation and export share."""

from __future__ import annotations

from functools import partial
from shutil import which

import torch
from fastlatent_kernels.overview import choices

from fastlatent import mfu, models
from fastlatent.data.base import DATASETS, Dataset
from fastlatent.errors import UserError
from fastlatent.methods.base import METHODS, Method
from fastlatent.models import files, flash, liger
from fastlatent.models.supported import check_supported
from fastlatent.policy import Policy, compute_dtype
from fastlatent.rollout.base import ENGINES, EngineParts, RolloutEngine, match
from fastlatent.rollout.thinking import ThinkingSpan, eos_ids
from fastlatent.schema import Config
from fastlatent.types import Sampling

COMPILERS = ("g++", "clang++")


def device_of(config: Config) -> torch.device:
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device: cuda was asked for and torch sees no GPU here")
    wanted = config.model.device
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)


def method_of(config: Config) -> type[Method]:
    return METHODS.find(config.method.name, "method.name")


def engine_of(config: Config) -> type[RolloutEngine]:
    return ENGINES.find(config.engine.name, "engine.name")


def dataset(config: Config) -> Dataset:
    """Everything that is trained on and held out; UserError where it cannot be read."""
    return DATASETS.find(config.data.name, "data.name")(config.data, config.seed)


def backends(config: Config) -> dict[str, str]:
    """Which implementation each op will use here, by op."""
    device = device_of(config)
    dtype = str(compute_dtype(config.model, device)).removeprefix("torch.")
    return {c.op: c.backend for c in choices() if (c.device, c.dtype) == (device.type, dtype)}


def describe(config: Config, policy: Policy) -> str:
    """What the run computes on and with, in one line."""
    device = device_of(config)
    by_backend: dict[str, list[str]] = {}
    for op, backend in backends(config).items():
        by_backend.setdefault(backend, []).append(op)
    ops = "; ".join(f"{backend}: {', '.join(names)}" for backend, names in sorted(by_backend.items()))
    dtype = str(compute_dtype(config.model, device)).removeprefix("torch.")
    where = f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else torch.cuda.get_device_name(device)
    drawn = f"on engine {config.engine.name}" if is_drawing(config) else "without an engine"
    return f"{config.method.name} {drawn}, {dtype} on {where}; update {_update(config, policy)}; ops {ops}"


def _update(config: Config, policy: Policy) -> str:
    """How the update computes, and by what peak its share of the GPU is measured."""
    words = [policy.flash.name if policy.flash else "sdpa attention"]
    words += [name for name in ("liger", "compile") if getattr(config.model, name)]
    if policy.device.type == "cuda":
        peak = mfu.peak_flop_s(policy.device, policy.dtype)
        words.append("MFU n/a" if peak is None else f"MFU of {peak / 1e12:.0f} TFLOP/s")
    return ", ".join(words)


def sampling_of(config: Config, *, greedy: bool = False) -> Sampling:
    s = config.sampling
    return Sampling(s.temperature, s.top_k, s.top_p, s.max_new_tokens, greedy)


def is_drawing(config: Config) -> bool:
    """Whether training draws completions: to learn from them, or to answer held-out questions."""
    return config.sft is None or config.eval.every > 0


def has_latents(config: Config, policy: Policy) -> bool:
    """Whether the method has latents at all."""
    return bool(policy.method.record_spec(policy.method.model.width, sampling_of(config)))


def tokenizer(config: Config):
    return models.load_tokenizer(models.resolve_model(config.model.path), config.model.trust_remote_code)


def model_files(config: Config) -> dict[str, str]:
    """A digest of each of the model's files, by name; nothing for one that the hub has yet to send."""
    return files.model_files(models.resolve_model(config.model.path))


def check_model(config: Config) -> None:
    """Find out from its architecture alone whether the model can be trained and rolled out, before its weights are loaded."""
    model = models.skeleton(models.resolve_model(config.model.path), config.model.trust_remote_code)
    check_supported(model, config.model)
    _check_length(config, getattr(model.config, "max_position_embeddings", None))
    device = device_of(config)
    flash.choose(config.model.attention, device, compute_dtype(config.model, device), model.config)
    if config.model.liger:
        liger.check(model.config, device)
    if config.model.compile and device.type == "cpu" and not any(map(which, COMPILERS)):
        raise UserError(f"model.compile: on a CPU torch.compile needs a C++ compiler, one of {', '.join(COMPILERS)} on the "
                        "PATH")
    engine_of(config).check(config.engine, model.config, device)


def _check_length(config: Config, most: int | None) -> None:
    """`most`: tokens that the model was made to read; None where it does not say."""
    prompt, completion = config.chat.max_prompt_tokens, config.sampling.max_new_tokens
    if most is not None and prompt + completion > most:
        raise UserError(f"model.path: the model reads at most {most} tokens; wanted chat.max_prompt_tokens={prompt} and "
                        f"sampling.max_new_tokens={completion} to add up to no more")


def check_method(config: Config, tokenizer) -> list[str]:
    """What the method has to warn of; UserError where it cannot work with this configuration and tokenizer."""
    return method_of(config).check(config, tokenizer)


def policy(config: Config, *, has_reference: bool = False) -> Policy:
    """The trainable policy, its masters in float32, the method's parameters drawn from the run's seed."""
    path, device = models.resolve_model(config.model.path), device_of(config)
    model = models.load_causal_lm(path, torch.float32, config.model.trust_remote_code).to(device)
    torch.manual_seed(config.seed)  # the initialisers of method parameters and adapters are the only ones to draw from it
    return Policy(model.train(), config.model, method_of(config), config.method, has_reference=has_reference)


def engine(config: Config, policy: Policy, tokenizer) -> RolloutEngine:
    """The engine with weights of its own, shaped like the policy's; they arrive with the first load_weights."""
    member, method = engine_of(config), method_of(config)
    match(method, config.engine.name, member.capabilities)
    info, device = policy.method.model, policy.device
    span = ThinkingSpan(tokenizer, info.vocab_size, eos_ids(tokenizer, policy.base.generation_config), config.thinking,
                        config.answer, device)
    return member.build(config.engine, EngineParts(
        model=policy.base.config, dtype=policy.dtype, device=device, method=partial(method, config.method, info), span=span,
        seed=config.seed, max_prompt_tokens=config.chat.max_prompt_tokens, max_new_tokens=config.sampling.max_new_tokens))


def check_engine(config: Config) -> None:
    """Match method and engine by name before anything heavy is loaded."""
    match(method_of(config), config.engine.name, engine_of(config).capabilities)
