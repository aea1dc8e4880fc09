"""Ask a trained run: `python -m fastlatent.generate RUN "question"` prints its thinking, its answer and what its latents
did."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from fastlatent import build
from fastlatent.cli import Parser, run_command
from fastlatent.data.base import Example
from fastlatent.data.chat import make_prompt
from fastlatent.evaluation import EVAL_STEP
from fastlatent.rollout import failure
from fastlatent.schema import ChatConfig
from fastlatent.trained import Trained, add_arguments, add_engine, check_samples, open_run, run_config
from fastlatent.types import Prompt, Request, Rollout


def prompt_of(question: str, tokenizer, chat: ChatConfig) -> Prompt:
    """The question as the run's chat settings put it; UserError where it is too long for them."""
    return make_prompt(tokenizer, Example(0, question, "", source="question"), chat)


def draw(trained: Trained, question: str, *, num_samples: int = 1, greedy: bool = True) -> list[tuple[Rollout, str]]:
    """Completions of one question with the method's own decoding, each with its text."""
    prompt = prompt_of(question, trained.tokenizer, trained.config.chat)
    rollouts = failure.generate(trained.engine(), [Request(prompt, EVAL_STEP, i) for i in range(num_samples)],
                                build.sampling_of(trained.config, greedy=greedy))
    return [(r, trained.tokenizer.decode(r.token_ids, skip_special_tokens=True)) for r in rollouts]


def describe(trained: Trained, rollout: Rollout, text: str) -> str:
    """The completion split at the end of thinking, and its latent statistics, as printed."""
    end = trained.config.thinking.end
    thinking, found, answer = text.partition(end)
    lines = [f"thinking: {thinking.strip()}", f"answer:   {answer.strip()}" if found else f"(never wrote {end!r})"]
    num_latent = sum(rollout.latent)
    ended = "forced" if rollout.forced_end else "its own" if found else "none"
    lines.append(f"tokens:   {len(rollout.token_ids)} ({rollout.num_thinking} thinking, {num_latent} read as latents, "
                 f"end of thinking: {ended}), mean entropy {fmean(rollout.entropy):.3f} nats")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m fastlatent.generate", description=__doc__)
    add_arguments(parser)
    add_engine(parser)
    parser.add_argument("question")
    parser.add_argument("--samples", type=int, default=0, help="draw this many samples instead of the greedy completion")
    args = parser.parse_args(argv)
    check_samples(args.samples)
    config = run_config(args.run, args.device, args.engine)
    build.check_model(config)
    prompt_of(args.question, build.tokenizer(config), config.chat)  # what it refuses is known before weights are loaded
    trained = open_run(args.run, args.checkpoint, args.device, args.engine)
    with failure.kept_in(Path(args.run)):
        drawn = draw(trained, args.question, num_samples=args.samples or 1, greedy=not args.samples)
    print("\n\n".join(describe(trained, *row) for row in drawn))


if __name__ == "__main__":
    run_command(main)
