"""`python check_learning.py RUN`: exit 1 unless the mean reward of the run's last five steps exceeds its first three by 0.3."""

import sys
from pathlib import Path
from statistics import fmean

from fastlatent.log import read

WANTED = 0.3


def main(run: str) -> int:
    rewards = [row["reward"] for row in read(Path(run) / "metrics.jsonl") if "reward" in row]
    if len(rewards) < 20:
        print(f"{run}: {len(rewards)} training steps in metrics.jsonl, wanted 20", file=sys.stderr)
        return 1
    before, after = fmean(rewards[:3]), fmean(rewards[-5:])
    print(f"mean reward {before:.3f} in the first three steps, {after:.3f} in the last five (wanted {WANTED} more)")
    return 0 if after - before > WANTED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
