#!/usr/bin/env bash
# Conversations of four clients, loss on what the assistant says:
#
#     bash examples/chat/run.sh
#
# makes a tiny model in ./tiny-chat, prints the plan, trains, and evaluates the adapter. With a chat
# model of your own leave --chat-template out: its tokenizer has one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python "$here/../tiny_model.py" tiny-chat "$here/chat.jsonl"
run=(--model tiny-chat --train-file "$here/chat.jsonl" --chat-template "$here/chat_template.jinja"
    --partition column --client-column owner --max-length 64 --target-modules all-linear
    --rounds 4 --local-steps 6 --lr 2e-2 --output-dir runs/chat)
python -m rolora.train "${run[@]}" --dry-run
python -m rolora.train "${run[@]}"
python -m rolora.evaluate --adapter runs/chat/adapter --eval-file "$here/chat.jsonl"
