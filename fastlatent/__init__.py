"""fastlatent trains language models that reason in latent vectors.

Where what is, from the command line down to the log; `types`, `trainer` and `methods` are the place to begin:

    commands         train, sft, evaluate, generate, export, report, profile_report, doctor, cli, output
    configuration    schema, config, recipes, registry, build, engine_choice
    families         methods, rollout, vllm_plugin, rewards, data
    the loop         trainer, inputs, parity, held_out, evaluation, guard, alarms, memory_plan, interrupt
    the update       update, microbatch, packing, policy, models, objectives, advantages, mismatch, optim, mfu
    what passes      types, errors
    the run folder   runfolder, checkpoint, manifest, log, trained
    what is told     metrics, step_metrics, live, figures, trackers, profiling
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    # lazy: a reward worker imports this package and must not pay for torch
    if name == "Trainer":
        from fastlatent.trainer import Trainer
        return Trainer
    if name == "load_config":
        from fastlatent.config import load_config
        return load_config
    raise AttributeError(f"module 'fastlatent' has no attribute {name!r}")
