"""Collapse, said in words: latent reasoning that is being unlearnt while the reward still looks fine.

The first steps of a run are its measure; a mean over the latest steps is held against it. Each alarm sounds once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

WINDOW = 5
"""Steps in each of the two means."""

LEAST_ENDINGS = 0.1
"""Share of own endings below which a fall means nothing: a completion or two of a step."""

WATCHED = {"latent/frac_tokens": "latent share", "latent/norm_ratio": "norm ratio", "latent/exit_end": "own endings"}
"""What the alarms listen to, and what their last line calls it."""


class CollapseAlarm:
    def __init__(self):
        self.rows: list[Mapping[str, float]] = []
        self.sounded: set[str] = set()

    def step(self, metrics: Mapping[str, float]) -> list[str]:
        """The alarms that this step's metrics set off; none where nothing is latent."""
        if "latent/frac_tokens" not in metrics:
            return []
        self.rows.append(metrics)
        if not self.can_tell:
            return []
        new = {name: text for name, text in self._alarms().items() if name not in self.sounded}
        self.sounded |= new.keys()
        return [f"collapse: {text}" for text in new.values()]

    @property
    def can_tell(self) -> bool:
        """Whether there are steps enough for two means that share none."""
        return len(self.rows) >= 2 * WINDOW

    def summary(self) -> str | None:
        """The line a run ends with: quiet or which sounded, and the two means of each; None where nothing was latent."""
        if not self.rows:
            return None
        if not self.can_tell:
            return f"collapse alarms: too few steps to tell ({len(self.rows)}); they compare {WINDOW} with {WINDOW} others"
        means = {label: self._means(name) for name, label in WATCHED.items()}
        told = [f"{label} {first:.2f} -> {last:.2f}" for label, (first, last) in means.items() if not math.isnan(first)]
        said = f"sounded ({', '.join(sorted(self.sounded))})" if self.sounded else "quiet"
        return f"collapse alarms: {said}; {', '.join(told)}"

    def _alarms(self) -> dict[str, str]:
        out = {}
        first, last = self._means("latent/frac_tokens")
        if first and last <= first / 3:
            out["share"] = (f"the latent share of the completions fell from {first:.2f} to {last:.2f}: the policy leaves its "
                            "latents for text; a longer latent SFT or a lower learning rate holds it")
        first, last = self._means("latent/norm_ratio")
        if first and (last < first / 2 or last > 2 * first):
            out["norm"] = (f"latent inputs went from {first:.2f} to {last:.2f} times a token's norm, away from what the model "
                           "can read; look at latent/effective_k or at the gate, and lower the learning rate")
        first, last = self._means("latent/exit_end")
        if first >= LEAST_ENDINGS and last <= first / 3:
            out["exit"] = (f"the share of completions that end their thinking themselves fell from {first:.2f} to {last:.2f}: "
                           "they are cut or forced instead; give them more tokens, or reward the ending")
        return out

    def _means(self, name: str) -> tuple[float, float]:
        """Over the first and over the latest WINDOW steps; NaN, which sets nothing off, where one has none."""
        parts = [[row[name] for row in rows if row.get(name) is not None] for rows in (self.rows[:WINDOW], self.rows[-WINDOW:])]
        return (fmean(parts[0]), fmean(parts[1])) if all(parts) else (math.nan, math.nan)
