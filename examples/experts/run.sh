#!/usr/bin/env bash
# A mixture of experts whose experts are adapted, each with factors of its own:
#
#     bash examples/experts/run.sh
#
# makes a tiny mixture in ./tiny-experts, prints the plan without and with the experts, trains,
# evaluates the adapter and merges it into the model.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data="$here/../chat/chat.jsonl"
python "$here/../tiny_model.py" tiny-experts "$data" --experts 4
run=(--model tiny-experts --train-file "$data" --partition column --client-column owner
    --max-length 64 --target-modules all-linear --rounds 4 --local-steps 6 --lr 2e-2)
python -m rolora.train "${run[@]}" --dry-run
run+=(--target-parameters experts.gate_up_proj,experts.down_proj --output-dir runs/experts)
python -m rolora.train "${run[@]}" --dry-run
python -m rolora.train "${run[@]}"
python -m rolora.evaluate --adapter runs/experts/adapter --eval-file "$data"
python -m rolora.export --adapter runs/experts/adapter --to merged --output-dir runs/experts-merged
