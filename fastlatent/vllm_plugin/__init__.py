"""What stock vLLM loads of us, by the entry point `vllm.general_plugins`: model classes whose inputs and draws are our own.

`models` names the classes, `runner_v1` the worker of vLLM's first model runner (CPU), `state_v2` the model state of its second
(GPU). On a CPU `cpu_forward` runs the layers, with the norm of `cpu_norm` and the blocks of `cpu_attention`. Configurations are
read from a `config_folder`. The engine is `fastlatent.rollout.vllm_engine`; what is remembered of a request is
`fastlatent.rollout.slots`.
"""


def register() -> None:
    """Called by vLLM in each of its processes."""
    from fastlatent.vllm_plugin.models import register_models

    register_models()
