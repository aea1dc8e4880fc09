"""Collapse is told in words, once, against the run's own first steps."""

from fastlatent.alarms import WINDOW, CollapseAlarm


def heard(rows: list[dict]) -> list[tuple[int, str]]:
    alarm = CollapseAlarm()
    return [(step, text) for step, row in enumerate(rows) for text in alarm.step(row)]


def row(share=0.6, norm=1.0, end=0.9) -> dict:
    return {"latent/frac_tokens": share, "latent/norm_ratio": norm, "latent/exit_end": end}


def test_a_steady_run_is_quiet_and_so_is_one_without_latents():
    assert heard([row(0.6 - 0.01 * step) for step in range(30)]) == []
    assert heard([{"reward": 1.0}] * 30) == []


def test_a_latent_share_that_falls_to_a_third_is_told_once():
    told = heard([row()] * 8 + [row(0.19)] * 12)
    assert len(told) == 1
    step, text = told[0]
    # the mean of the latest steps is 0.2 or less only when all of them are low
    assert step == 8 + WINDOW - 1
    assert text.startswith("collapse: the latent share of the completions fell from 0.60 to 0.19")


def test_one_low_step_and_a_start_that_is_low_are_no_collapse():
    assert heard([row()] * 10 + [row(0.0)] + [row()] * 10) == []
    assert heard([row(0.1)] * 20) == []


def test_norms_that_drift_either_way_and_endings_that_are_lost_are_told():
    for norm in (0.4, 2.2):
        (_, text), = heard([row()] * 8 + [row(norm=norm)] * 8)
        assert f"from 1.00 to {norm:.2f} times a token's norm" in text
    (_, text), = heard([row()] * 8 + [row(end=0.2)] * 8)
    assert "that end their thinking themselves fell from 0.90 to 0.20" in text


def test_what_a_method_does_not_log_sounds_nothing():
    rows = [{"latent/frac_tokens": 0.5}] * 20
    assert heard(rows) == []
    never = [{"latent/frac_tokens": 0.5, "latent/exit_end": 0.0}] * 20
    assert heard(never) == []
    assert heard([row(end=0.02)] * 8 + [row(end=0.0)] * 8) == []  # one completion of the first steps


# ---- the last line --------------------------------------------------------------------------------------------------


def summary(rows: list[dict]) -> str | None:
    alarm = CollapseAlarm()
    for each in rows:
        alarm.step(each)
    return alarm.summary()


def test_the_last_line_says_that_nothing_sounded_and_by_which_numbers():
    assert summary([row(0.6, 1.0, 0.8)] * 6 + [row(0.5, 1.1, 0.9)] * 6) == (
        "collapse alarms: quiet; latent share 0.60 -> 0.50, norm ratio 1.00 -> 1.10, own endings 0.80 -> 0.90")


def test_the_last_line_keeps_what_sounded_even_where_it_has_recovered():
    assert summary([row()] * 8 + [row(0.1, end=0.1)] * 8 + [row()] * 8) == (
        "collapse alarms: sounded (exit, share); latent share 0.60 -> 0.60, norm ratio 1.00 -> 1.00, own endings 0.90 -> 0.90")


def test_the_last_line_of_a_short_run_claims_nothing():
    assert summary([row()] * 9) == "collapse alarms: too few steps to tell (9); they compare 5 with 5 others"
    assert summary([{"reward": 1.0}] * 30) is None
    lost = [row()] * 5 + [{"latent/frac_tokens": 0.6}] * 5  # nothing to compare with, which is no fall
    assert summary(lost) == "collapse alarms: quiet; latent share 0.60 -> 0.60"
    assert summary([{"latent/frac_tokens": 0.5}] * 10) == "collapse alarms: quiet; latent share 0.50 -> 0.50"
