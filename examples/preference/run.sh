#!/usr/bin/env bash
# Pairs of answers of which one is preferred (DPO), split over four clients:
#
#     bash examples/preference/run.sh
#
# makes a tiny model in ./tiny-preference, trains, and evaluates the adapter. The model has no chat
# template, so the plan says that ChatML is taken.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python "$here/../tiny_model.py" tiny-preference "$here/pairs.jsonl"
python -m rolora.train --model tiny-preference --train-file "$here/pairs.jsonl" --clients 4 \
    --max-length 96 --target-modules all-linear --dpo-beta 0.1 --rounds 4 --local-steps 5 --lr 1e-2 \
    --output-dir runs/preference
python -m rolora.evaluate --adapter runs/preference/adapter --eval-file "$here/pairs.jsonl"
