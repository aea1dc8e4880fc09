"""Layers add up to a typed configuration; what cannot be one is refused in a sentence that begins with the key."""

import dataclasses
import os
import subprocess
import sys

import pytest
import yaml

from fastlatent.config import from_dict, load_config, option_names, to_dict
from fastlatent.config.helptext import options
from fastlatent.config.validation import SCHEDULES
from fastlatent.errors import UserError
from fastlatent.methods.hrpo import HRPO
from fastlatent.rewards.base import RewardConfig
from fastlatent.rollout.vllm_engine import VLLMEngine
from fastlatent.runfolder import RunFolder
from fastlatent.schema import Config, LoraConfig

QUICK = "hrpo_quickstart"


def write(folder, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.fixture
def own_parts(tmp_path, monkeypatch) -> None:
    """A module of the user's own with a reward, a method, and something that is neither."""
    write(tmp_path, "own_parts.py", '''
from dataclasses import dataclass
from fastlatent.methods.base import Method, MethodConfig

def brevity(prompt, completion, answer):
    return -len(completion)

class Mine(Method):
    @dataclass(kw_only=True)
    class Config(MethodConfig):
        depth: int
        """Has no default."""

class Bare:
    pass

limit = 3
''')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)


def test_quickstart_itself_is_accepted():
    assert load_config(QUICK).recipe == QUICK  # so that what the tables below refuse is what they add


# ---- layers ---------------------------------------------------------------------------------------------------------


def test_later_layers_win_and_overrides_win_over_all(tmp_path):
    first = write(tmp_path, "first.yaml", "seed: 1\noptim: {lr: 0.1, eps: 0.01}\nnum_steps: 5\n")
    second = write(tmp_path, "second.yaml", "optim: {lr: 0.2}\nnum_steps: 6\n")
    config = load_config("num_steps=7", first, second)
    assert (config.seed, config.optim.lr, config.optim.eps, config.num_steps) == (1, 0.2, 0.01, 7)
    assert load_config(second, first).optim.lr == 0.1


def test_base_lies_beneath_the_file_that_names_it(tmp_path):
    write(tmp_path, "grand.yaml", "seed: 1\nnum_steps: 1\nnum_prompts: 1\n")
    write(tmp_path, "parent.yaml", "base: ./grand.yaml\nnum_steps: 2\nnum_prompts: 2\n")
    config = load_config(write(tmp_path, "child.yaml", "base: parent.yaml\nnum_prompts: 3\n"))
    assert (config.seed, config.num_steps, config.num_prompts) == (1, 2, 3)
    assert config.recipe == "child"


def test_run_is_named_for_the_last_layer_unless_one_says_otherwise(tmp_path):
    file = write(tmp_path, "my_gpu.yaml", "seed: 1\n")
    assert load_config(QUICK).recipe == QUICK
    assert load_config(QUICK, file, "seed=2").recipe == "my_gpu"
    assert load_config(QUICK, file, "recipe=mine").recipe == "mine"
    assert load_config("recipe=mine", QUICK).recipe == "mine"


def test_choosing_another_member_replaces_its_section(tmp_path):
    hrpo = write(tmp_path, "hrpo.yaml", "method: {name: hrpo, r_min: 0.5, r_max: 0.6}\n")
    same = write(tmp_path, "same.yaml", "method: {name: hrpo, r_max: 0.7}\n")
    grpo = write(tmp_path, "grpo.yaml", "method: {name: grpo}\n")
    assert (load_config(hrpo, same).method.r_min, load_config(hrpo, same).method.r_max) == (0.5, 0.7)
    assert dataclasses.asdict(load_config(hrpo, grpo).method) == {"name": "grpo"}
    assert load_config(hrpo, grpo, "method.name=hrpo").method == HRPO.Config()


def test_order_of_overrides_does_not_matter_to_a_member_chosen_among_them():
    one = load_config("method.name=hrpo", "method.r_min=0.5", "data.name=word_problems")
    other = load_config("data.name=word_problems", "method.r_min=0.5", "method.name=hrpo")
    assert one == other and one.method.r_min == 0.5


def test_rewards_are_reached_by_index_and_replaced_as_a_list():
    two = "rewards=[{name: exact_number, strict: false}, {name: length}]"
    config = load_config(QUICK, "rewards.1.weight=0.25", two)
    assert [(r.name, r.weight) for r in config.rewards] == [("exact_number", 1.0), ("length", 0.25)]
    assert config.rewards[0].strict is False
    assert load_config(QUICK, "rewards.0.name=format").rewards == [RewardConfig(name="format")]


@pytest.mark.parametrize("word, want", [
    ("optim.lr=1e-6", 1e-6),
    ("optim.lr=2", 2.0),
    ("optim.betas=[0.5, 0.6]", (0.5, 0.6)),
    ("thinking.end=####", "####"),  # a comment to yaml
    ("chat.suffix=", ""),
    ("chat.suffix=\" x\\n\"", " x\n"),
    ("chat.system=null", None),
    ("chat.system=a=b", "a=b"),
    ("chat.system=007", "007"),  # 7 to yaml
    ("out=2024_11_21", "2024_11_21"),
    ("out=1e3", "1e3"),
    ("chat.suffix=no", "no"),
    ("thinking.end=0x10", "0x10"),
    ("optim.lr=1_000.0", 1000.0),
    ("num_steps=1_000", 1000),
    ("eval.ablations=no", False),
    ("model.liger=true", True),
    ("model.lora={}", LoraConfig()),
])
def test_override_is_read_as_what_its_option_holds(word, want):
    value = load_config("hrpo_quickstart", "thinking.force=null", word)
    for name in word.partition("=")[0].split("."):
        value = getattr(value, name)
    assert value == want and type(value) is type(want)


def test_number_without_a_dot_is_a_number_in_a_file_too(tmp_path):
    assert load_config(write(tmp_path, "x.yaml", "optim: {lr: 1e-6}\n")).optim.lr == 1e-6


def test_section_is_turned_on_by_an_option_of_it_and_off_by_null(tmp_path):
    assert load_config("model.lora.r=4").model.lora == LoraConfig(r=4)
    on = write(tmp_path, "on.yaml", "model: {lora: {r: 8}}\n")
    assert load_config(on).model.lora == LoraConfig(r=8)
    assert load_config(on, "model.lora={}").model.lora == LoraConfig(r=8)
    assert load_config(on, "model.lora=null").model.lora is None


# ---- families -------------------------------------------------------------------------------------------------------


def test_own_parts_are_found_by_dotted_path(own_parts):
    config = load_config(
        QUICK, "method.name=own_parts.Mine", "method.depth=3", "rewards=[{name: own_parts:brevity, weight: 2}]")
    assert (config.method.name, config.method.depth) == ("own_parts.Mine", 3)
    assert config.rewards == [RewardConfig(name="own_parts:brevity", weight=2.0)]
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("words, sentence", [
    (["method.name=own_parts.Mine"], "method.depth: no value given and there is no default; add method.depth=..."),
    (["method.name=own_parts.Bare"], "method.name: wanted a class with a Config that is a MethodConfig, got 'own_"),
    (["rewards.0.name=own_parts.limit"], "rewards.0.name: wanted a function, got 'own_parts.limit'"),
    (["rewards.0.name=own_parts.nope"], "rewards.0.name: module 'own_parts' has no 'nope'"),
    (["rewards.0.name=no_such_module.f"], "rewards.0.name: 'no_such_module.f': no module named 'no_such_module'"),
])
def test_own_part_that_does_not_fit_is_refused(own_parts, words, sentence):
    with pytest.raises(UserError) as error:
        load_config(QUICK, *words)
    assert str(error.value).startswith(sentence)


# ---- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    ["hrpo_quickstart"],
    ["hrpo_gsm8k", "data.train=train.jsonl"],
    # texts that look like other types
    ["hrpo_math", "data.train='1e5'", "chat.suffix=\"null\"", "recipe='007'", "chat.system='a: #b'"],
])
def test_configuration_of_a_run_folder_loads_back_equal(tmp_path, words):
    config = load_config(*words)
    assert from_dict(to_dict(config)) == config
    run = RunFolder.open(to_dict(config), ["train"], "fingerprint", cwd=tmp_path)
    run.close()
    assert load_config(run.path / "config.yaml") == config
    assert yaml.safe_load(yaml.safe_dump(to_dict(config))) == to_dict(config)  # nothing but plain types


def test_loads_without_torch():
    code = ("import sys, fastlatent.config, fastlatent.cli; "
            "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


# ---- errors ---------------------------------------------------------------------------------------------------------

ERRORS = [
    # unknown names
    ("optim.lrr=1", "optim.lrr: no such option; did you mean 'lr'?"),
    ("method.r_mn=1", "method.r_mn: no such option; did you mean 'r_min'?"),
    ("rewards.0.wait=1", "rewards.0.wait: no such option; did you mean 'weight'?"),
    ("model.lora.rank=1", "model.lora.rank: no such option; options here are r, alpha"),
    ("nonsense=1", "nonsense: no such option; options here are recipe, seed"),
    ("method.name=hrp", "method.name: 'hrp' is not one of "),
    ("rewards.0.name=exact", "rewards.0.name: 'exact' is not one of "),
    # names of other sections
    ("lr=1e-6", "lr: no such option; did you mean optim.lr?"),
    ("objective.temperature=1", "objective.temperature: no such option; did you mean sampling.temperature?"),
    ("every=5", "every: no such option; did you mean eval.every or checkpoint.every?"),
    ("lora={}", "lora: no such option; did you mean model.lora?"),
    # names of other trainers
    ("num_generations=8", "num_generations: no such option; did you mean group_size?"),
    ("optim.learning_rate=1", "optim.learning_rate: no such option; did you mean optim.lr?"),
    ("epsilon=0.2", "epsilon: no such option; did you mean objective.clip_low and objective.clip_high?"),
    ("method.residual_r_min=0.9", "method.residual_r_min: no such option; did you mean method.r_min?"),
    # types
    ("optim.lr=fast", "optim.lr: wanted a number, got 'fast'"),
    ("num_steps=2.5", "num_steps: wanted a whole number, got 2.5"),
    ("num_steps=true", "num_steps: wanted a whole number, got True"),
    ("seed=null", "seed: wanted a whole number, got null"),
    ("chat.template=maybe", "chat.template: wanted true or false, got 'maybe'"),
    ("optim=3", "optim: wanted a section, got 3"),
    ("optim=null", "optim: wanted a section, got null"),
    ("optim.betas=[1,2,3]", "optim.betas: wanted a list of 2: a number, a number, got [1, 2, 3]"),
    ("thinking.stop=x", "thinking.stop: wanted a list, each entry a text, got 'x'"),
    ("thinking.max_tokens=x", "thinking.max_tokens: wanted a whole number or null, got 'x'"),
    ("model.lora=3", "model.lora: wanted a section or null, got 3"),
    ("method=grpo", "method: wanted a section with a name, as in method.name=..., got 'grpo'"),
    ("method.name=3", "method.name: wanted one of "),
    ("rewards=exact_number", "rewards: wanted a list of sections, got 'exact_number'"),
    ("rewards=[format]", "rewards.0: wanted a section with a name"),
    ("rewards=[{weight: 1}]", "rewards.0.name: wanted one of "),
    ("rewards.1.weight=1", "rewards.1.weight: wanted rewards.N with N below 1"),
    ("method.r_min=high", "method.r_min: wanted a number, got 'high'"),
    ("chat.system=a: b: c", "chat.system: 'a: b: c' is not valid yaml"),
    ("chat.system=${oc.env:HOME}", "chat.system: '${' begins an interpolation"),
    ("chat.system=${", "chat.system: '${' begins an interpolation"),
    ("rewards=[{name: '${seed}'}]", "rewards.0.name: '${' begins an interpolation"),
    # ranges
    ("group_size=1", "group_size: wanted at least 2, got 1"),
    ("num_steps=0", "num_steps: wanted at least 1, got 0"),
    ("num_prompts=0", "num_prompts: wanted at least 1, got 0"),
    ("recipe=a/b", "recipe: wanted a name without slashes, for the run folder, got 'a/b'"),
    ("seed=-1", "seed: wanted at least 0, got -1"),
    ("sampling.temperature=0", "sampling.temperature: wanted more than 0, got 0.0"),
    ("sampling.top_k=65", "sampling.top_k: wanted 0 (no truncation) to 64, got 65"),
    ("sampling.top_k=-1", "sampling.top_k: wanted 0 (no truncation) to 64, got -1"),
    ("sampling.top_p=0", "sampling.top_p: wanted more than 0, got 0.0"),
    ("sampling.top_p=1.5", "sampling.top_p: wanted at most 1, got 1.5"),
    ("sampling.top_p=0.9", "sampling.top_p: 0.9 needs sampling.top_k"),
    ("objective.clip_low=0", "objective.clip_low: wanted more than 0, got 0.0"),
    ("objective.clip_low=1.5", "objective.clip_low: wanted at most 1, got 1.5"),
    ("objective.clip_high=-0.1", "objective.clip_high: wanted more than 0, got -0.1"),
    ("objective.dual_clip=1", "objective.dual_clip: wanted more than 1, got 1.0"),
    ("objective.score_temperature=0", "objective.score_temperature: wanted more than 0, got 0.0"),
    ("objective.num_minibatches=3", "objective.num_minibatches: wanted a divisor of num_prompts=8, got 3"),
    ("objective.constant_length=9", "objective.constant_length: needs objective.normalizer=constant"),
    ("optim.betas=[0.9, 1]", "optim.betas.1: wanted 0 to below 1, got 1.0"),
    ("optim.lr=.nan", "optim.lr: wanted a finite number, got nan"),
    ("rewards.0.weight=.nan", "rewards.0.weight: wanted a finite number, got nan"),
    ("optim.lr=.inf", "optim.lr: wanted a finite number, got inf"),
    ("optim.warmup_ratio=-0.1", "optim.warmup_ratio: wanted at least 0, got -0.1"),
    ("optim.warmup_ratio=1.1", "optim.warmup_ratio: wanted at most 1, got 1.1"),
    ("optim.warmup_ratio=0.1", "optim.warmup_ratio: optim.schedule=constant does not warm up"),
    ("eval.every=-1", "eval.every: wanted at least 0, got -1"),
    ("eval.every=0", "eval.ablations: needs eval.every"),
    ("eval.num_samples=65537", "eval.num_samples: wanted at most 65536, got 65537"),
    ("checkpoint.every=-1", "checkpoint.every: wanted at least 0, got -1"),
    ("checkpoint.keep=0", "checkpoint.keep: wanted at least 1, got 0"),
    ("model.lora={dropout: 1}", "model.lora.dropout: wanted 0 to below 1, got 1.0"),
    ("model.lora={target_modules: []}", "model.lora.target_modules: wanted at least one name, got []"),
    ("thinking.end=</think>", "thinking.force: wanted a text that contains thinking.end='</think>'"),
    ("thinking.end=", "thinking.end: wanted a text of 1 to 254 bytes"),
    ("thinking.max_tokens=null", "thinking.force: needs thinking.max_tokens"),
    ("sampling.max_new_tokens=22", "sampling.max_new_tokens: wanted at least 23, for thinking.max_tokens=16"),
    ("rewards=[]", "rewards: wanted at least one reward"),
    ("rewards.0.weight=0", "rewards: wanted at least one reward with a weight other than 0"),
    ("rewards.0.timeout_s=0", "rewards.0.timeout_s: wanted more than 0, got 0.0"),
    ("rewards=[{name: format}, {name: format}]", "rewards.1.name: 'format' is listed twice"),
    # choices
    ("objective.advantage=zscore",
     "objective.advantage: 'zscore' is not one of z_score, mean_only, leave_one_out; did you mean 'z_score'?"),
    ("objective.normalizer=token", "objective.normalizer: 'token' is not one of "),
    ("objective.kl_estimator=k4", "objective.kl_estimator: 'k4' is not one of k1, k2, k3"),
    ("model.dtype=float16", "model.dtype: 'float16' is not one of auto, float32, bfloat16; did you mean 'bfloat16'?"),
    ("model.device=gpu", "model.device: 'gpu' is not one of auto, cpu, cuda"),
    ("optim.schedule=cosin", "optim.schedule: 'cosin' is not one of "),
    ("log.live=on", "log.live: 'on' is not one of auto, plain, quiet"),
    ("log.trackers=[tensorbord]",
     "log.trackers.0: 'tensorbord' is not one of tensorboard, nor a dotted path to your own; did you mean"),
    ("resume=yes", "resume: 'yes' is not one of auto"),
]


@pytest.mark.parametrize("word, sentence", ERRORS, ids=[word for word, _ in ERRORS])
def test_bad_option_is_refused_in_one_sentence(word, sentence):
    with pytest.raises(UserError) as error:
        load_config(QUICK, word)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, sentence", [
    ("optim: {lr: 1\n", "line 2: not valid yaml: "),
    ("seed: 1\nseed: 2\n", "line 2: not valid yaml: found duplicate key seed"),
    ("seed: !!python/object/apply:os.getpid []\n", "line 1: not valid yaml: could not determine a constructor"),
    ("- 1\n", "wanted a mapping of options, got a list"),
    ("7\n", "wanted a mapping of options"),
    ("base: 7\n", "base: wanted the name of a recipe or a path, got 7"),
    ("base: ./bad.yaml\n", "base: the file is based on itself"),
    ("chat: {system: '${'}\n", "'${' begins an interpolation"),
])
def test_bad_file_is_refused_with_its_place(tmp_path, text, sentence):
    path = write(tmp_path, "bad.yaml", text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert sentence in str(error.value) and str(error.value).startswith(path)
    assert "\n" not in str(error.value)


def test_bad_bytes_and_missing_files_are_refused(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"seed: \xff\n")
    for name, sentence in [("bytes.yaml", "not valid yaml: wanted a text in UTF-8"), ("none.yaml", "no such file")]:
        with pytest.raises(UserError, match=f"{name}: {sentence}"):
            load_config(tmp_path / name)


def test_names_of_other_trainers_are_theirs_and_lead_to_options_of_ours():
    from trl import GRPOConfig as TrlConfig
    from trl import ModelConfig as TrlModelConfig

    theirs = {field.name for field in dataclasses.fields(TrlConfig)}
    assert theirs >= {*option_names.TRL, *option_names.TRAINING_ARGUMENTS}
    assert {field.name for field in dataclasses.fields(TrlModelConfig)} >= set(option_names.MODEL_CONFIG)
    ours = {path for path, _, _ in options(Config)} | {"model.lora", "rewards.0.weight", "engine.name=vllm"}
    for member, section in ((HRPO, "method"), (VLLMEngine, "engine")):
        ours |= {path for path, _, _ in options(member.Config, section)}
    assert {path for meant in option_names.ELSEWHERE.values() for path in meant.split(" and ")} <= ours


def test_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="'hrpo_quikstart' is not a recipe.*; did you mean hrpo_quickstart"):
        load_config("hrpo_quikstart")
    with pytest.raises(UserError, match="'zzz' is not a recipe.*; recipes are grpo_gsm8k, "):
        load_config("zzz")


def test_every_schedule_is_one_that_transformers_runs_without_more_options():
    import torch
    from transformers import get_scheduler

    for name in SCHEDULES:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)
        optimizer.step()
        schedule.step()
        assert 0 < schedule.get_last_lr()[0] <= 1
