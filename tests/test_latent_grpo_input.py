"""What Latent-GRPO refuses and warns of, before any model is loaded, and the preset that SofT-GRPO is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
from mixtures import LATENT_GRPO, SOFT_GRPO

from fastlatent.config import load_config
from fastlatent.errors import UserError


def checked(*words: str) -> list[str]:
    config = load_config("model.path=some/model", "data.train=x.jsonl", "method.name=latent_grpo", *words)
    return LATENT_GRPO.check(config, tiny.tokenizer())


def test_an_end_of_several_tokens_is_refused_and_named():
    with pytest.raises(UserError, match=r"thinking.end: latent_grpo ends its latents with one token, and '</think>' is \d+ "
                                        r"here: '<'"):
        checked("thinking.end=</think>")
    assert checked("thinking.end=a", "method.is_latent_init=true") == []


def test_what_is_doubtful_is_warned_of():
    warnings = checked("thinking.end=a", "method.noise_scale=0.5")
    assert len(warnings) == 2
    assert warnings[0].startswith("method.noise_scale=0.5: the density") and "biased" in warnings[0]
    assert warnings[1].startswith("model.path=some/model: ") and "method.is_latent_init=true" in warnings[1]
    config = load_config("model.path=some/model", "data.train=x.jsonl", "method.name=soft_grpo", "thinking.end=a")
    assert SOFT_GRPO.check(config, tiny.tokenizer()) == []


def test_an_export_of_latents_needs_no_word_of_them(tmp_path):
    """What text SFT or GRPO left, and a file that is not ours, are no latent initialisation."""
    def warned(text: str) -> bool:
        (tmp_path / "fastlatent.json").write_text(text)
        return checked("thinking.end=a", f"model.path={tmp_path}") != []

    mixtures, sft = {"name": "latent_grpo", "mixture_temperature": 1.0}, {"tokens_per_latent": 2}
    for method, imitated, is_init in (
            (mixtures, sft, True), (mixtures, None, True), (mixtures, {"tokens_per_latent": 0}, False),
            ({"name": "grpo"}, None, False)):
        assert warned(json.dumps({"config": {"method": method, "sft": imitated}})) == (not is_init)
    assert warned("{}") and warned("[") and warned('{"config": {"method": null}}')


@pytest.mark.parametrize(("words", "message"), [
    ("top_k=65", "method.top_k: wanted 1 to 64 tokens in a mixture, got 65"),
    ("top_k=0", "method.top_k: wanted 1 to 64 tokens in a mixture, got 0"),
    ("top_p=0.0", "method.top_p: wanted more than 0"),
    ("noise_low=4.0", "method.noise_low, method.noise_high: wanted low <= high"),
    ("noise_scale=-1.0", "method.noise_scale: wanted 0 or more"),
    ("delta=-0.1", "method.delta: wanted 0 or more"),
    ("mixture_temperature=0.0", "method.mixture_temperature: wanted more than 0"),
    ("candidates=all", "method.candidates: 'all' is not one of union, renormalised"),
    ("end_rule=never", "method.end_rule: 'never' is not one of likeliest, contest"),
    ("truncated=cut", "method.truncated: 'cut' is not one of excluded, masked, kept")])
def test_options_out_of_range_are_one_sentence(words, message):
    with pytest.raises(UserError) as error:
        load_config("data.train=x.jsonl", "method.name=latent_grpo", f"method.{words}")
    assert str(error.value).startswith(message)


def test_more_tokens_than_there_are_is_refused():
    config = load_config("data.train=x.jsonl", "method.name=latent_grpo", "thinking.end=a", "method.top_k=20")
    few = type("Few", (), {"encode": lambda self, text, add_special_tokens: [1], "__len__": lambda self: 12})()
    with pytest.raises(UserError, match="method.top_k: a mixture of 20 tokens is more than the vocabulary's 12"):
        LATENT_GRPO.check(config, few)


def test_the_preset_is_what_was_published():
    config = SOFT_GRPO.Config()
    assert (config.top_k, config.top_p, config.mixture_temperature) == (5, 0.95, 0.1)
    assert (config.noise_low, config.noise_high) == (-1.5, 3.0)
    assert config.candidates == "renormalised" and not config.one_sided and config.clamp_density
    assert config.logprob_floor == -3.0 and config.noise_scale == 1.0
    assert replace(config, name="x") != config
