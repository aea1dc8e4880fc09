"""The loop: draw groups, score them, update the policy, hand the new weights to the engine.

    Prompt --engine.generate--> Rollout x G --rewards--> Group --method.advantages--> Group --pack--> Batch
           --method.loss--> Loss --backward--> optimizer --> engine.load_weights(version + 1)

A step is a pure function of (configuration, weights, optimizer state, step number), so a resumed run repeats what an
uninterrupted one would have done, bit for bit.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from traceback import format_exception

import torch

from fastlatent import advantages, build, engine_choice, evaluation, log, manifest, memory_plan, parity, step_metrics
from fastlatent.alarms import CollapseAlarm
from fastlatent.checkpoint import Checkpoint
from fastlatent.config import to_dict
from fastlatent.errors import UserError
from fastlatent.evaluation import Sample
from fastlatent.guard import Guard
from fastlatent.held_out import HeldOut, Measured
from fastlatent.inputs import Inputs
from fastlatent.interrupt import Interrupted, Interrupts
from fastlatent.live import LiveView
from fastlatent.microbatch import OutOfMemory
from fastlatent.optim import Optimizer
from fastlatent.profiling import capture, reset_timings, span, timings
from fastlatent.report import write_report
from fastlatent.rewards.pool import RewardPool
from fastlatent.rollout.failure import EngineFailed, generate, load_weights, released
from fastlatent.runfolder import RunFolder
from fastlatent.schema import Config
from fastlatent.trackers import open_trackers
from fastlatent.types import Group, Request
from fastlatent.update import Updater, UpdateResult

MAX_TOLD = 10


@dataclass(slots=True)
class Learnt:
    """What a step leaves for the log."""

    result: UpdateResult
    metrics: dict[str, float]
    rows: list[dict] = field(default_factory=list)  # of samples.jsonl
    errors: Sequence[str] = ()  # of reward functions


class Trainer:
    """`Trainer(load_config("hrpo_quickstart")).run()`; everything that can be wrong with the input is found before a
    model loads."""

    def __init__(self, config: Config, argv: Sequence[str] = ()):
        self.config = config
        self._check_purpose()
        config, self.engine_reason = engine_choice.settled(config)
        self.config = config
        self.inputs = Inputs(config, argv)
        self.tokenizer, self.warnings = self.inputs.tokenizer, self.inputs.warnings
        self.trackers = open_trackers(config.log.trackers)
        self._check_prompts()
        held_out = self.inputs.held_out()
        with ExitStack() as opened:
            self.pool = opened.enter_context(RewardPool(config.rewards, columns=self.inputs.columns()))
            self.run_folder = opened.enter_context(RunFolder.open(
                to_dict(config), list(argv) or sys.argv, self.inputs.dataset.fingerprint(), build.backends(config),
                model=build.model_files(config)))
            self.trackers.start(self.run_folder.path)
            opened.callback(self.trackers.close)
            self.policy = build.policy(config, has_reference=config.objective.kl_coef > 0 and config.sft is None)
            manifest.keep_model(self.run_folder.path, build.model_files(config))  # the hub has sent it by now
            self.engine = build.engine(config, self.policy, self.tokenizer) if build.is_drawing(config) else None
            if self.engine is not None:
                opened.callback(self.engine.close)
            self.optimizer = Optimizer(self.policy, config)
            self.update = Updater(self.policy, self.optimizer, config)
            self.held_out = HeldOut(config, held_out, self.policy, self.engine, self.tokenizer, self.pool)
            self.told: list[str] = []
            self.alarm = CollapseAlarm()
            self.guard = Guard(self.run_folder.path, config.update.max_bad_steps)
            self.step = 0
            self.saved_step: int | None = None  # the last that this process has saved
            if self.run_folder.resumed is not None:
                self._restore(self.run_folder.resumed)
                self.run_folder.resumed = None  # as large as the model and its optimizer
            self._opened = opened.pop_all()

    # ---- the run -------------------------------------------------------------------------------------------------------

    def run(self):
        """Train to the end (or to an interruption) and return the run folder's path."""
        config, run = self.config, self.run_folder
        view = LiveView(config.num_steps, config.log.live)
        with Interrupts() as interrupts, view, capture.Capture(config, run.path, view.note) as recording:
            try:
                view.note(build.describe(config, self.policy))
                if self.engine_reason:
                    view.note(self.engine_reason)
                for line in memory_plan.plan(config, self.policy, self.engine).lines():
                    view.note(line)
                for warning in self.warnings:
                    view.note(f"warning: {warning}")
                if self.step:
                    view.note(f"resumed {run.path} at step {self.step}")
                self._probe(view)
                self._evaluate(view, interrupts)
                while self.step < config.num_steps:
                    with recording.step(self.step + 1):
                        self._train_step(view, interrupts)
                self._finish(view)
            except Interrupted:
                self._save()
                view.note(f"interrupted: saved step {self.step} in {run.path}; {run.how_to_go_on}")
                self._report()
            except EngineFailed as error:
                # no step was being learnt from, so the weights are those of the last whole one
                self._save()
                (run.path / "engine-failure.txt").write_text("".join(format_exception(error)))
                raise EngineFailed(f"{error}; saved step {self.step} in {run.path} beside engine-failure.txt; "
                                   f"{run.how_to_go_on}") from error
            except OutOfMemory as error:
                if not error.is_whole:  # the weights are those of a part of a step
                    raise
                self._save()
                raise OutOfMemory(f"{error}; saved step {self.step} in {run.path}") from None
            finally:
                self.close()
        return run.path

    def _train_step(self, view: LiveView, interrupts: Interrupts) -> None:
        config = self.config
        # dropout of adapters is the one thing that draws from torch's generator while training
        torch.manual_seed(_seed_of(config.seed, self.step))
        with ExitStack() as committed:
            # from the first optimizer step to the log line nothing may be torn apart: an interruption waits
            def commit() -> None:
                committed.enter_context(interrupts.shielded())

            learnt = self._learn(commit)
            metrics = learnt.metrics
            reset_timings()  # a checkpoint after this step is part of the next line
            with self.run_folder.writing():
                self.guard.count(self.step, learnt.result, metrics)
            self.run_folder.log(metrics, learnt.rows)
            self.trackers.log(metrics, self.step)
            view.step(metrics)
            self._tell_errors(learnt.errors, view)
            for text in self.alarm.step(metrics):
                view.note(text)
            self.guard.check()
        self._evaluate(view, interrupts)
        if config.checkpoint.every and self.step % config.checkpoint.every == 0 and self.step < config.num_steps:
            with interrupts.shielded():
                self._save()

    def _learn(self, commit: Callable[[], None]) -> Learnt:
        """One step's rollouts and update; `commit` is called before the first weight moves."""
        with span("step") as whole:
            groups, samples, drawn = self._collect()
            whole.tokens = drawn.num_tokens
            with released(self.engine):
                result = self.update(groups, commit)
                commit()
                self.step += 1
        metrics = step_metrics.of_step(self.step, groups, samples, drawn, result, self.optimizer.lr,
                                       has_latents=build.has_latents(self.config, self.policy))
        return Learnt(result, metrics, step_metrics.sample_rows(self.step, samples, self.config.log.samples), drawn.errors)

    def _collect(self) -> tuple[list[Group], list[Sample], step_metrics.Drawn]:
        """The groups of this step, scored and given their advantages; with filtering, redrawn until they can teach."""
        config, groups, samples = self.config, [], []
        drawn = step_metrics.Drawn()
        times: Counter[int] = Counter()  # by prompt: where one comes again within a step, so must not its noise
        rounds = 1 + (config.objective.max_filter_rounds if config.objective.filter_zero_variance else 0)
        for round_ in range(rounds):
            # a step's rounds own consecutive places of the endless prompt stream, used or not: a function of the step alone
            prompts = self.inputs.prompts((self.step * rounds + round_) * config.num_prompts)
            requests = []
            for prompt in prompts:
                first = times[prompt.id] * config.group_size
                requests += [Request(prompt, self.step, first + g) for g in range(config.group_size)]
                times[prompt.id] += 1
            with span("rollout") as drawing:
                self._sync_weights()
                rollouts = generate(self.engine, requests, build.sampling_of(config))
                drawing.tokens = sum(len(r.token_ids) for r in rollouts)
                if any(r.version != self.step for r in rollouts):
                    raise RuntimeError(f"engine sampled under version {rollouts[0].version}, expected {self.step}")
                self.guard.check_drawn(self.step, rollouts)
                with span("rollout/reward"):
                    scored, report = evaluation.score(rollouts, self.tokenizer, self.pool, config.thinking.end)
            fresh = [self._group(scored[i : i + config.group_size]) for i in range(0, len(scored), config.group_size)]
            drawn.add(fresh, report)
            for index, group in enumerate(fresh):
                if not config.objective.filter_zero_variance or advantages.has_variance(group):
                    groups.append(group)
                    samples += scored[index * config.group_size : (index + 1) * config.group_size]
            if len(groups) >= config.num_prompts:
                break
        keep = groups[: config.num_prompts]
        return keep, samples[: len(keep) * config.group_size], drawn

    def _tell_errors(self, errors: Sequence[str], view: LiveView) -> None:
        """Each new message of a reward function once, and only the first few of a run."""
        for error in dict.fromkeys(errors):
            if error not in self.told and len(self.told) < MAX_TOLD:
                self.told.append(error)
                view.note(f"reward missing: {error}")

    def _group(self, samples: Sequence[Sample]) -> Group:
        names = samples[0].result.values
        group = Group([s.rollout for s in samples], torch.tensor([s.result.total for s in samples], dtype=torch.float64),
                      {name: [s.result.values[name] for s in samples] for name in names})
        group.advantage_G = self.policy.method.advantages(group, self.config.objective)
        return group

    def _probe(self, view: LiveView) -> None:
        """Refuse to train where engine and trainer disagree about the first tokens."""
        if self.config.mismatch.probe_tokens:
            self._sync_weights()
            found = parity.probe(self.config, self.policy, self.engine, self.inputs.prompts(0))
            reset_timings()  # no part of the first step
            found.check()
            view.note(found.line())

    # ---- checks --------------------------------------------------------------------------------------------------------

    def _check_purpose(self) -> None:
        if self.config.sft is not None:
            raise UserError("sft: demonstrations are for python -m fastlatent.sft and would not be read here; wanted sft=null")

    def _check_prompts(self) -> None:
        """Find a prompt that is too long now."""
        for _ in self.inputs.each_prompt():
            pass

    # ---- evaluation ----------------------------------------------------------------------------------------------------

    def _evaluate(self, view: LiveView, interrupts: Interrupts) -> None:
        if not self.held_out.is_due(self.step):
            return
        with span("evaluate"):
            self._sync_weights()
            measured = self.held_out.measure(self.step)
        measured.metrics["time/evaluate"] = timings()["evaluate"]
        reset_timings()
        with interrupts.shielded():
            self._log_measured(measured, view)
            if self.held_out.remember(self.step, measured.metrics["eval/accuracy"]):
                self._save()

    def _log_measured(self, measured: Measured, view: LiveView) -> None:
        self.run_folder.log(measured.metrics, [])
        self.trackers.log(measured.metrics, self.step)
        for line in measured.lines:
            view.note(line)

    # ---- weights and checkpoints ---------------------------------------------------------------------------------------

    def _sync_weights(self) -> None:
        """Hand the engine the weights of this step, unless it has them: before it draws, whatever for."""
        if self.engine.version != self.step:
            with span("rollout/weight_sync"):
                load_weights(self.engine, self.policy.published(), self.step)

    def _save(self) -> None:
        """Once a step: what a step changes is complete before the first save of it, and lines logged later are not its own."""
        if self.saved_step == self.step:
            return
        with span("checkpoint"):
            tensors, state = self.optimizer.state()
            state |= self.held_out.state() | {"guard": self.guard.state()}
            weights = {name: p.detach() for name, p in self.policy.trainable().items()}
            self.run_folder.save(self.step, {"weights": weights, "optimizer": tensors}, state,
                                 protect=[] if self.held_out.best_step is None else [self.held_out.best_step])
        self.saved_step = self.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.step = checkpoint.step
        try:
            self.policy.restore(checkpoint)
            self.optimizer.load(checkpoint.tensors["optimizer"], checkpoint.state)
            self.held_out.load(checkpoint.state)
            self.guard.load(checkpoint.state["guard"])
        except KeyError as error:
            raise UserError(f"{checkpoint.path}: holds no {error}; another version of fastlatent may have written it") from None
        for row in log.read(self.run_folder.path / "metrics.jsonl"):
            self.alarm.step(row)

    def _finish(self, view: LiveView) -> None:
        self._save()
        if self.held_out.is_ablated:
            self._sync_weights()
            self._log_measured(self.held_out.ablate(self.step), view)
        if (line := self.alarm.summary()) is not None:
            view.note(line)
        self._report()
        view.note(f"done: {self.run_folder.path} (report.html, metrics.jsonl, samples.jsonl, checkpoints)")

    def _report(self) -> None:
        with self.run_folder.writing():
            write_report(self.run_folder.path)

    def close(self) -> None:
        self._opened.close()


def _seed_of(seed: int, step: int) -> int:
    return int.from_bytes(blake2b(b"%d %d" % (seed, step), digest_size=7).digest())
