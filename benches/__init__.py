"""Measurements, each of which appends JSON lines to `baselines/<hardware>.jsonl`:

    python -m benches.rollout     tokens per second of our engine and of transformers' generate
    python -m benches.update      seconds and memory of our update and of trl's
    python -m benches.step        seconds of a whole training step, ours and the released HRPO loop's
    python -m benches.kernels     every op: time, traffic, arithmetic and memory beside its rivals
    python -m benches.learning    what finished runs learnt
    python -m benches.compare     two sets of such lines, changes marked
    benches/gpu.sh                all of it on one GPU, with build and tests, where there is no network
"""

import os

# before torch starts its threads, and as fastlatent.train sets them: a benchmark runs the way training does
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
