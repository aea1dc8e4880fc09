"""Imitation: what a chain is compressed into, the loss against float64 and against transformers, and a run that goes on."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_resume
import tiny
import torch
from fastlatent_kernels.noise import STREAM_LATENT, row_gumbel
from test_gpu_update import fail_at
from test_resume import assert_same, finish, newest, outcome, session_folder

from fastlatent import evaluate, export, train
from fastlatent.cli import run_command
from fastlatent.config import load_config
from fastlatent.log import read
from fastlatent.methods import gumbel_mixture
from fastlatent.methods.base import METHODS
from fastlatent.microbatch import OutOfMemory
from fastlatent.optim import Optimizer
from fastlatent.policy import Policy
from fastlatent.rollout.hf_engine import HFEngine
from fastlatent.sft.__main__ import main as sft_main
from fastlatent.sft.demonstration import Demonstrated, Demonstrator, compress, rollout_of
from fastlatent.sft.trainer import SftTrainer
from fastlatent.sft.update import SftUpdater
from fastlatent.types import Prompt

END = "thinking.end= ####"  # one token of the tiny tokenizer
LATENT = ["latent_sft_quickstart", "sft.tokens_per_latent=2", "model.dtype=float32", "model.path=model", END, "log.live=quiet"]
ROWS = ["data.name=jsonl", "data.train=rows.jsonl", "data.held_out_size=4", "num_prompts=4", "eval.num_prompts=4"]
TEXT = ["sft.tokens_per_latent=0", "method.name=grpo"]
PROMPTS = [Prompt(id, text, tuple(tiny.tokenizer().encode(text)), answer, {"chain": chain}) for id, text, answer, chain in (
    (3, "Tom has 12 apples and buys 30 more.", "42", "Tom has 12 + 30 = 42 apples"),
    (900, "5 + 7 = ", "12", "5 + 7 = 12"),
    (12, "How many apples does Tom have now?", "7", "none, buys 7"))]


def config_of(*words: str):
    return load_config(*LATENT, "optim.lr=1e-3", "optim.max_grad_norm=0", *words)


def policy_of(config) -> Policy:
    member = METHODS.find(config.method.name, "")
    return Policy(tiny.model(), config.model, member, config.method, has_reference=False)


def learn(config, step: int = 5):
    """One update on PROMPTS: the policy it leaves, what it was taught, and the result."""
    policy, demonstrator = policy_of(config), Demonstrator(config, tiny.tokenizer())
    written = [demonstrator.write(prompt, "row") for prompt in PROMPTS]
    rollouts = [rollout_of(d, p, policy.method, config, step) for d, p in zip(written, PROMPTS, strict=True)]
    return policy, written, SftUpdater(policy, Optimizer(policy, config), config)(rollouts)


# ---- what a chain is compressed into --------------------------------------------------------------------------------


def test_runs_of_tokens_become_mixtures():
    assert list(compress([7, 8, 7, 9, 5], 2, 1.0)) == [{7: 0.5, 8: 0.5}, {7: 0.5, 9: 0.5}, {5: 1.0}]
    assert list(compress([4, 4, 6], 3, 1.0)) == [{4: pytest.approx(2 / 3), 6: pytest.approx(1 / 3)}]
    assert list(compress([8, 9, 8], 3, 0.5)) == [{8: pytest.approx(5 / 7), 9: pytest.approx(2 / 7)}]
    assert [list(mixture) for mixture in compress([1, 2, 2, 3], 3, 1.0)] == [[2, 1], [3]]  # heaviest first
    assert list(compress([4, 6], 1, 0.5)) == [{4: 1.0}, {6: 1.0}]


def test_a_demonstration_ends_its_thinking_and_its_turn():
    tokens = tiny.tokenizer()
    written = Demonstrator(config_of(), tokens).write(PROMPTS[0], "row")
    chain = tokens.encode(PROMPTS[0].columns["chain"])
    assert [set(mixture) for mixture in written.mixtures] == [set(chain[i : i + 2]) for i in range(0, len(chain), 2)]
    assert written.answer_ids == [*tokens.encode(" ####"), *tokens.encode(" 42"), tokens.eos_token_id]
    parts = Prompt(0, "", (), "42", {"chain": ["Tom has 12", " + 30 =", " 42"]})
    ids = [tokens.encode(part) for part in parts.columns["chain"]]
    assert [len(part) for part in ids] == [3, 3, 1]  # no latent spans two parts
    assert [set(mixture) for mixture in Demonstrator(config_of(), tokens).write(parts, "row").mixtures] == [
        set(ids[0][:2]), set(ids[0][2:]), set(ids[1][:2]), set(ids[1][2:]), set(ids[2])]
    text = Demonstrator(config_of(*TEXT, "thinking.max_tokens=12", "thinking.force= #### now\n", "sft.answer=it is {answer}"),
                        tokens).write(PROMPTS[0], "row")
    assert text.mixtures == [] and tokens.decode(text.token_ids) == "Tom has 12 + 30 = 42 apples #### now\nit is 42<|end|>"


def test_without_a_chain_the_answer_is_the_whole_completion():
    tokens = tiny.tokenizer()
    config = config_of(*TEXT, "sft.chain=null", "sft.answer='{answer}'", "thinking.max_tokens=12", "thinking.force= #### now")
    written = Demonstrator(config, tokens).write(Prompt(0, "", (), "12 + 30 #### 42", {}), "row")
    assert written == Demonstrated([], [], [*tokens.encode("12 + 30 #### 42"), tokens.eos_token_id])


def test_mixtures_are_read_with_the_noise_of_a_rollout_that_predicts_them():
    """The scores are those that `draw` gives a policy with these very probabilities."""
    config = METHODS.find("latent_grpo", "").Config(top_k=3, noise_scale=0.5, delta=0.1)
    ids, weights = torch.tensor([[4, 0, 9], [1, 7, 8]]), torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]])
    counters = torch.tensor([[0, 5, 3 << 16], [1, 5, 3 << 16]])
    logits = torch.full((2, 12), -torch.inf).scatter(1, ids, weights.log())
    for noise in (True, False):
        drawn = gumbel_mixture.draw(config, logits, not noise, torch.tensor(7), counters)
        scores = gumbel_mixture.scores_of(config, ids, weights, torch.tensor(7), counters, noise)
        ours = torch.full((2, 12), -torch.inf).scatter(1, ids, scores)
        theirs = torch.full((2, 12), -torch.inf).scatter(1, drawn.ids_BK, drawn.score_BK)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert scores[0].tolist() == pytest.approx([math.log(w) for w in (0.5, 0.3, 0.2)])


# ---- the loss -------------------------------------------------------------------------------------------------------


def in_float64(config, written: list[Demonstrated], step: int):
    """Loss and gradient norm with every input, mixture and mean written out, one demonstration at a time."""
    model = tiny.model().double()
    model.lm_head.weight.requires_grad_(not config.model.freeze_embedding)
    table = model.get_input_embeddings().weight.requires_grad_(False)
    token_losses, divergences = [], []
    for demonstrated, prompt in zip(written, PROMPTS, strict=True):
        inputs, P = [table[list(prompt.token_ids)]], len(prompt.token_ids)
        for position, mixture in enumerate(demonstrated.mixtures):
            ids = torch.tensor(list(mixture))
            counter = torch.tensor([[position, prompt.id, step * 2**16]])
            noise = row_gumbel(torch.tensor(config.seed), ids, STREAM_LATENT, counter)[0].double().clamp(-1.5, 3.0)
            share = [w * math.exp(float(n)) for w, n in zip(mixture.values(), noise, strict=True)]
            inputs.append(sum(s / sum(share) * table[index] for s, index in zip(share, mixture, strict=True))[None])
        inputs.append(table[demonstrated.answer_ids])
        logprob = model(inputs_embeds=torch.cat(inputs)[None]).logits[0].log_softmax(-1)
        for place, mixture in enumerate(demonstrated.mixtures):
            divergences.append(sum(w * (math.log(w) - logprob[P - 1 + place, index]) for index, w in mixture.items()))
        start = P - 1 + len(demonstrated.mixtures)
        token_losses += [-logprob[start + k, index] for k, index in enumerate(demonstrated.answer_ids)]
    loss = sum(token_losses) / len(token_losses) + config.sft.latent_weight * sum(divergences) / len(divergences)
    loss.backward()
    gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return loss, torch.stack(gradients).norm(), sum(divergences) / len(divergences)


def test_loss_and_gradient_against_float64():
    config = config_of("sft.latent_weight=0.7", "sft.tokens_per_latent=3", "sft.decay=0.8", "seed=11")
    _, written, result = learn(config, step=5)
    loss, norm, divergence = in_float64(config, written, step=5)
    assert float(result.loss) == pytest.approx(loss.item(), rel=1e-5)
    assert float(result.grad_norm) == pytest.approx(norm.item(), rel=1e-4)
    total, count = result.statistics["sft/latent_kl"].tolist()
    assert total / count == pytest.approx(divergence.item(), rel=1e-5)
    assert count == sum(len(d.mixtures) for d in written)
    other = in_float64(config, written, step=6)[0].item()  # else the noise would not show
    assert abs(other - loss.item()) > 1e-3


def test_the_loss_of_text_is_that_of_transformers():
    config = config_of(*TEXT)
    _, written, result = learn(config)
    total, count = 0.0, 0
    for demonstrated, prompt in zip(written, PROMPTS, strict=True):
        ids, P = [*prompt.token_ids, *demonstrated.token_ids], len(prompt.token_ids)
        labels = torch.tensor([[-100] * P + demonstrated.token_ids])
        loss = tiny.model()(input_ids=torch.tensor([ids]), labels=labels).loss.item()
        total, count = total + loss * len(demonstrated.token_ids), count + len(demonstrated.token_ids)
    assert float(result.loss) == pytest.approx(total / count, rel=1e-5)
    assert "sft/latent_kl" in result.statistics and result.statistics["sft/latent_kl"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("words", [[], TEXT])
def test_packing_changes_nothing(words):
    whole, pieces = (learn(config_of(*words, f"update.tokens_per_microbatch={budget}"))
                     for budget in (4096, 28))
    assert len(whole[2].attempts[0].batches) == 1 < len(pieces[2].attempts[0].batches)
    assert float(whole[2].loss) == pytest.approx(float(pieces[2].loss), rel=1e-6)
    assert float(whole[2].grad_norm) == pytest.approx(float(pieces[2].grad_norm), rel=1e-5)
    assert float(whole[2].grad_norm) > 1


@pytest.mark.parametrize("num_minibatches", [1, 4])
def test_the_learning_rate_follows_the_steps_whatever_reinforcement_learning_makes_of_one(num_minibatches):
    config = config_of(*TEXT, "num_steps=4", "num_prompts=4", "optim.schedule=linear", "optim.warmup_ratio=0",
                       f"objective.num_minibatches={num_minibatches}")
    policy, demonstrator = policy_of(config), Demonstrator(config, tiny.tokenizer())
    optimizer = Optimizer(policy, config)
    rollouts = [rollout_of(demonstrator.write(p, "row"), p, policy.method, config, 0) for p in PROMPTS]
    SftUpdater(policy, optimizer, config)(rollouts)
    assert optimizer.lr == pytest.approx(0.75e-3)


# ---- memory runs out ------------------------------------------------------------------------------------------------


def learn_with_gradients(config, *failing: int):
    """The result of an update on PROMPTS whose backward passes `failing` find no memory, its gradients, and the passes seen."""
    policy, demonstrator, gradients = policy_of(config), Demonstrator(config, tiny.tokenizer()), {}
    rollouts = [rollout_of(demonstrator.write(p, "row"), p, policy.method, config, 5) for p in PROMPTS]
    passes = fail_at(policy, *failing)

    def commit() -> None:
        gradients.update({name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None})

    return SftUpdater(policy, Optimizer(policy, config), config)(rollouts, commit), gradients, passes


@pytest.mark.parametrize("words, budget", [([], 24), (TEXT, 29)])
def test_a_microbatch_for_which_memory_runs_out_is_split_and_the_gradient_stays(words, budget):
    """In the second of two microbatches, of two completions, whose gradient is by then in the head and the last block."""
    config = config_of(*words, f"update.tokens_per_microbatch={budget}")
    wanted, wanted_gradients, _ = learn_with_gradients(config)
    split, gradients, passes = learn_with_gradients(config, 1)
    assert (wanted.num_splits, len(wanted.attempts[0].batches)) == (0, 2)
    assert (split.num_splits, len(split.attempts[0].batches), len(passes)) == (1, 3, 2 + 3)
    assert gradients.keys() == wanted_gradients.keys() and len(gradients) > 10
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-4, msg=name)
    torch.testing.assert_close(split.loss, wanted.loss)
    torch.testing.assert_close(split.statistics, wanted.statistics)
    assert split.num_tokens == wanted.num_tokens  # no prompt is shared, in halves neither


@pytest.mark.parametrize("failing, budget, what", [((0, 1), 4096, "half of a microbatch"), ((0,), 24, "a single completion")])
def test_memory_that_runs_out_again_is_an_error_with_its_remedy(failing, budget, what):
    reason = rf"out of memory for \d+ packed tokens, {what}; wanted update.tokens_per_microbatch below {budget}, "
    with pytest.raises(OutOfMemory, match=reason) as caught:
        learn_with_gradients(config_of(f"update.tokens_per_microbatch={budget}"), *failing)
    assert caught.value.is_whole


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft")
    tiny.save(path / "model")
    rows = [{"question": f"Tom has {n} apples and buys 30 more.", "answer": n + 30, "chain": f"{n} + 30 = {n + 30} apples"}
            for n in range(16)]
    chains = {"no-chain": {}, "empty": {"chain": " "}, "number": {"chain": 42}, "end": {"chain": ["12 ##", "## 30"]},
              "none": {"chain": []},
              "long": {"chain": "12 + 30 = 42 " * 9}}
    for name, chain in {"rows": {}, **chains}.items():
        table = [*rows, {"question": "12 + 30?", "answer": 42, **chain}] if chain or name == "no-chain" else rows
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


@pytest.fixture
def inside(folder, monkeypatch):
    test_resume.enter(monkeypatch, folder)


def test_imitation_learns_latents_and_reasoning_goes_on_from_it(inside, capsys):
    """A text model, its latent SFT, the export of that, and Latent-GRPO on it."""
    trainer = SftTrainer(load_config(*LATENT, *ROWS, "out=run", "num_steps=60", "optim.lr=2e-3", "data.held_out_size=8",
                                     "model.freeze_embedding=false"))
    run = trainer.run()
    steps = [row for row in read(run / "metrics.jsonl") if "sft/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 61))
    assert steps[-1]["sft/token_loss"] < 0.3 * steps[0]["sft/token_loss"]
    assert steps[-1]["sft/latent_kl"] < 0.3 * steps[0]["sft/latent_kl"]
    ablations = [row for row in read(run / "metrics.jsonl") if "eval/accuracy_latents_off" in row]
    assert len(ablations) == 1 and 1 < ablations[0]["latent/effective_k"] <= 4
    told = capsys.readouterr().out
    assert "collapse" not in told and "warning" not in told  # the want of a latent SFT is no news to one

    export.main(["run", "latent-model"])
    evaluate.main(["run", "--limit=2"])
    greedy = capsys.readouterr().out
    assert "accuracy" in greedy and "latent " in greedy and "pass@" not in greedy
    evaluate.main(["run", "--limit=2", "--samples=4"])  # drawn with Gumbel noise
    table = capsys.readouterr().out
    assert all(f"pass@{k} " in table for k in (1, 2, 4))
    train.main(["latent_grpo_quickstart", "model.path=latent-model", "model.dtype=float32", *ROWS, END, "log.live=plain",
                "group_size=2", "num_steps=1", "out=rl"])
    out = capsys.readouterr().out
    assert "warning" not in out and "step 1/1" in out
    assert "step 0: latents off " in out and "collapse alarms: too few steps to tell (1)" in out
    sampled = read(Path("rl/samples.jsonl"))
    assert any(row["num_latent"] for row in sampled) and any("####" in row["completion"] for row in sampled)


def test_a_model_that_has_not_learnt_latents_is_warned_of_once(inside, capsys):
    train.main(["latent_grpo_quickstart", "model.path=model", "model.dtype=float32", *ROWS, END, "log.live=quiet",
                "group_size=2", "num_steps=1", "eval.every=0", "eval.ablations=false", "out=cold"])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(told) == 1 and "begin with python -m fastlatent.sft" in told[0]


def test_questions_and_answers_alone_are_learnt_from(inside):
    trainer = SftTrainer(load_config(*LATENT, *ROWS, *TEXT, "data.train=no-chain.jsonl", "sft.chain=null", "out=plain",
                                     "num_steps=20", "optim.lr=2e-3", "eval.every=0", "eval.ablations=false",
                                     "objective.kl_coef=0.1"))
    assert list(trainer.policy.reference_parameters()) == []  # nothing would be compared with it
    steps = read(trainer.run() / "metrics.jsonl")
    assert steps[-1]["sft/token_loss"] < 0.5 * steps[0]["sft/token_loss"]
    assert steps[0]["thinking/mean_length"] == 0 < steps[0]["completions/mean_length"] < 6


def test_a_run_that_has_no_memory_left_splits_and_at_last_saves_what_it_has_learnt(inside, capsys, monkeypatch):
    backward, passes = torch.Tensor.backward, []

    def failing(self):
        passes.append(len(passes))
        if passes[-1] == 0 or passes[-1] > 2:  # the first step's whole microbatch, and everything after its halves
            raise torch.OutOfMemoryError("CUDA out of memory")
        backward(self)

    monkeypatch.setattr(torch.Tensor, "backward", failing)
    with pytest.raises(SystemExit) as exit_:
        run_command(sft_main, [*LATENT, *ROWS, "out=full", "num_steps=3", "eval.every=0", "eval.ablations=false"])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: update: out of memory for ") and error.count("\n") == 1
    assert error.endswith("; saved step 1 in full\n") and newest(Path("full")) == 1
    assert [row["perf/oom_splits"] for row in read(Path("full/metrics.jsonl"))] == [1]


def test_the_engine_has_handed_its_memory_back_while_the_weights_move(inside, monkeypatch):
    seen = []

    @contextmanager
    def released(self):
        seen.append("released")
        yield
        seen.append("taken")

    generate, step = HFEngine.generate, Optimizer.step
    monkeypatch.setattr(HFEngine, "released", released)
    monkeypatch.setattr(HFEngine, "generate", lambda self, *args: (seen.append("draw"), generate(self, *args))[1])
    monkeypatch.setattr(Optimizer, "step", lambda self, is_bad: (seen.append("learn"), step(self, is_bad))[1])
    SftTrainer(load_config(*LATENT, *ROWS, "out=released", "num_steps=2", "eval.every=1", "eval.num_samples=0",
                           "eval.ablations=false")).run()
    assert seen == ["draw", *["released", "learn", "taken", "draw"] * 2]


def test_no_engine_is_built_where_nothing_is_drawn(inside, capsys, monkeypatch):
    words = [*LATENT, *ROWS, "num_steps=2", "eval.ablations=false"]
    drawing = SftTrainer(load_config(*words, "out=drawing", "eval.every=2")).run()
    assert "on engine hf" in (told := capsys.readouterr().out) and "memory: engine hf" in told

    def build(config, parts):
        raise AssertionError("an engine was built")

    monkeypatch.setattr(HFEngine, "build", build)
    silent = SftTrainer(load_config(*words, "out=silent", "eval.every=0")).run()
    told = capsys.readouterr().out
    assert "latent_grpo without an engine, float32" in told and "memory: update" in told and "memory: engine" not in told
    losses = [[row["sft/loss"] for row in read(run / "metrics.jsonl") if "sft/loss" in row] for run in (drawing, silent)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    with pytest.raises(AssertionError, match="an engine was built"):
        SftTrainer(load_config(*words, "out=another", "eval.every=2"))


@pytest.mark.parametrize("doing, saved_at", [("drawing 4 completions", 0), ("taking its memory again", 1)])
def test_an_engine_that_fails_ends_the_run_in_one_sentence_and_leaves_the_last_whole_step(
        inside, capsys, monkeypatch, doing, saved_at):
    @contextmanager
    def released(self):
        yield
        raise RuntimeError("CUDA error: out of memory")

    def generate(self, *args):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(HFEngine, "released", released)
    if not saved_at:
        monkeypatch.setattr(HFEngine, "generate", generate)
    out = f"failing-{saved_at}"
    with pytest.raises(SystemExit, match="^1$"):
        run_command(sft_main, [*LATENT, *ROWS, f"out={out}", "num_steps=3", "eval.num_samples=0", "eval.ablations=false"])
    error, cause = capsys.readouterr().err, "RuntimeError: CUDA error: out of memory"
    assert error.startswith(f"error: the engine failed while {doing}: {cause}; saved step {saved_at}")
    assert error.count("\n") == 1 and newest(Path(out)) == saved_at


def session(folder: Path, argv: list[str]) -> None:
    session_folder(folder)
    run_command(sft_main, argv)


@pytest.mark.parametrize("kind", ["latent", "text"])
def test_a_killed_run_ends_as_if_nothing_had_happened(folder, monkeypatch, kind):
    monkeypatch.chdir(folder)
    words = [*LATENT, *ROWS, *(TEXT if kind == "text" else []), "num_steps=12", "optim.lr=1e-3", "optim.schedule=cosine",
             "optim.warmup_ratio=0", "eval.every=4", "eval.ablations=false", "checkpoint.every=1"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastlatent.sft.trainer", "test_sft"])

    def start(out: str):
        again = ["resume=auto"] if Path(out, "config.yaml").exists() else []
        process = context.Process(target=session, args=(folder, [*words, f"out={out}", *again]))
        process.start()
        return process

    assert finish(start(f"{kind}-straight")) == 0
    run = folder / f"{kind}-killed"
    for wanted in (2, 7):
        process, deadline = start(run.name), time.monotonic() + 120
        while newest(run) < wanted:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        finish(process)
        assert newest(run) < 12
    assert finish(start(run.name)) == 0
    straight = outcome(folder / f"{kind}-straight")
    assert_same(outcome(run), straight)
    losses = [row["sft/loss"] for row in straight["metrics"] if "sft/loss" in row]
    assert len(losses) == 12 == len(set(losses))


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "data.train=no-chain.jsonl": "no-chain.jsonl, line 17: column 'chain': wanted the chain of thought, and there is no such",
    "data.train=empty.jsonl":
        "empty.jsonl, line 17: column 'chain': wanted the chain of thought, a text or a list of texts, got ' '",
    "data.train=none.jsonl":
        "none.jsonl, line 17: column 'chain': wanted the chain of thought, a text or a list of texts, got []",
    "data.train=number.jsonl":
        "number.jsonl, line 17: column 'chain': wanted the chain of thought, a text or a list of texts, got 42",
    "data.train=end.jsonl": "end.jsonl, line 17: column 'chain' holds thinking.end=' ####'",
    "data.train=long.jsonl": "long.jsonl, line 17: its demonstration has ",
    "sft.tokens_per_latent=5": "sft.tokens_per_latent: a mixture of 5 tokens is more than method.top_k=4",
    "sft.chain=null": "sft.tokens_per_latent: wanted 0, as with sft.chain=null there is nothing to compress, got 2",
    "sft.tokens_per_latent=-1": "sft.tokens_per_latent: wanted at least 0, got -1",
    "method.top_k=65": "method.top_k: wanted 1 to 64 tokens in a mixture, got 65",
    "method.name=hrpo": "sft.tokens_per_latent: wanted 0, as the latents of hrpo are no mixtures",
    "sft.decay=0": "sft.decay: wanted more than 0",
    "sft.answer=42": "sft.answer: wanted a text that contains {answer}",
    "thinking.end=####": "thinking.end: latent_grpo ends its latents with one token",
    "sft=null": "sft: latent_sft_quickstart has no such section",
    "sft.chian=x": "sft.chian: no such option; did you mean 'chain'?",
    "model.path=run-folder": "model.path: run-folder is a run folder; wanted a model, which python -m fastlatent.export",
}


@pytest.mark.parametrize("words, sentence", BAD.items())
def test_bad_input_is_one_sentence_before_a_model_is_loaded(inside, monkeypatch, capsys, words, sentence):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fastlatent.models.load_causal_lm", refuse)
    Path("run-folder").mkdir(exist_ok=True)
    Path("run-folder/config.yaml").touch()
    argv = [*LATENT, *ROWS, "data.held_out_size=0", "eval.every=0", "eval.ablations=false", "out=never", words]
    with pytest.raises(SystemExit) as exit_:
        run_command(sft_main, argv)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert sentence in err and err.startswith("error: ") and err.count("\n") == 1 and not Path("never").exists()


def test_reinforcement_learning_does_not_pass_demonstrations_over(inside, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(train.main, [*LATENT, *ROWS, "out=never"])
    assert exit_.value.code == 2 and not Path("never").exists()
    assert "sft: demonstrations are for python -m fastlatent.sft" in capsys.readouterr().err
