#!/usr/bin/env bash
# Proves everything on one GPU: a bare CUDA machine with torch and no network is enough.
#
#   benches/gpu.sh [--part build|tests|train|vllm|kernels|rollout|update|sanitize]... [--device cuda|cpu] [--minutes N]
#                  [--out DIR] [--store DIR] [--keep PIECE]... [--commit SHA]
#   benches/gpu.sh --needs               what must be carried to such a machine, and whether it is here
#   benches/gpu.sh --pack DIR            fetch it (with a network) into DIR/1, DIR/2, ... of at most 60 MB each
#
# Paths are relative to the checkout. Each part takes at most 9 minutes and writes as it goes. Without --part the parts run in
# the order above, that of value, until --minutes (default 27) are spent; a part that was not begun is said to be so. What is
# built and carried stays in --store between calls (--part build then only imports it), and so do the lines of earlier calls:
# the summary is always of all of them. --out receives six files: summary.md (one page, written last), results.jsonl (of the
# benchmarks), parts.jsonl, log.txt, sanitize.txt, train.jsonl.
# --device cpu runs every part at small sizes: it proves the battery, not the GPU.
#
# A schedule for 30 minutes of a GPU with Python 3.12 and no network, lent in calls of at most 10 minutes, one soon after the
# other. Before it, where there is a network: benches/gpu.sh --pack carried --python 3.12 --also pybind11,scikit-build-core
#
#   1. benches/gpu.sh --store S --keep carried/2 --part build --part tests --minutes 6
#   2. benches/gpu.sh --store S --keep carried/3 --part build --part train --minutes 4
#   3. benches/gpu.sh --store S --keep carried/1 --part build --part vllm --minutes 9
#   4. benches/gpu.sh --store S --keep carried/1 --part build --part kernels --part rollout --part update --part sanitize --minutes 8
#
# Piece 1 holds vLLM, cut down to what a Hopper runs (benches/gpu_vllm.py), 2 and 3 hold a half of the small model each, and all
# three what the build of the rest needs: a call that finds a fresh machine instead of the last one builds again (2 minutes)
# and goes on, with random weights where a half is missing. Where the checkout has no history there, say --commit SHA to each.
# Afterwards: results.jsonl belongs into benches/baselines/<hardware>.jsonl, then python -m benches.readme.
# `python -m benches.compare OLD NEW` marks what changed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benches.gpu_battery "$@"
