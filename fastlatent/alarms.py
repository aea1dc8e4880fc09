"""Collapse, said in words: latent reasoning that is being unlearnt while the reward still looks fine.

The first steps of a run are its measure; a mean over the latest steps is held against it. Each alarm sounds once.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

WINDOW = 5
"""Steps in each of the two means."""


class CollapseAlarm:
    def __init__(self):
        self.rows: list[Mapping[str, float]] = []
        self.sounded: set[str] = set()

    def step(self, metrics: Mapping[str, float]) -> list[str]:
        """The alarms that this step's metrics set off; none where nothing is latent."""
        if "latent/frac_tokens" not in metrics:
            return []
        self.rows.append(metrics)
        if len(self.rows) < 2 * WINDOW:
            return []
        new = {name: text for name, text in self._alarms().items() if name not in self.sounded}
        self.sounded |= new.keys()
        return [f"collapse: {text}" for text in new.values()]

    def _alarms(self) -> dict[str, str]:
        out = {}
        first, last = self._means("latent/frac_tokens")
        if first and last <= first / 3:
            out["share"] = (f"the latent share of the completions fell from {first:.2f} to {last:.2f}: the policy leaves its "
                            "latents for text; a longer latent SFT or a lower learning rate holds it")
        first, last = self._means("latent/norm_ratio")
        if first and not first / 2 <= last <= 2 * first:
            out["norm"] = (f"latent inputs went from {first:.2f} to {last:.2f} times a token's norm, away from what the model "
                           "can read; look at latent/effective_k or at the gate, and lower the learning rate")
        first, last = self._means("latent/exit_end")
        if first and last <= first / 3:
            out["exit"] = (f"the share of completions that end their thinking themselves fell from {first:.2f} to {last:.2f}: "
                           "they are cut or forced instead; give them more tokens, or reward the ending")
        return out

    def _means(self, name: str) -> tuple[float, float]:
        """Over the first and over the latest WINDOW steps; 0 and 1 where there is too little to tell."""
        parts = [[row[name] for row in rows if row.get(name) is not None] for rows in (self.rows[:WINDOW], self.rows[-WINDOW:])]
        return (fmean(parts[0]), fmean(parts[1])) if all(parts) else (0.0, 1.0)
