"""Named sets of options. Flags and TOML keys given beside a preset win over it."""

from __future__ import annotations

PRESETS: dict[str, dict] = {
    # The embedded model and text: 12 packages over 10 label-skewed clients. The learning rate was chosen on a validation slice
    # (benchmarks/builtin_study.py).
    "builtin": dict(
        task_type="classification", clients=10, rounds=20, local_steps=4, batch_size=8, partition="dirichlet",
        dirichlet_alpha=0.3, rank=4, alpha=16.0, target_modules="q_proj,v_proj", layers="3-5", lr=4e-2, max_length=48,
        lr_schedule="linear"),
    # PAPER.md section 5: Llama-2-7B on eight merged commonsense sets, split evenly.
    "commonsense": dict(
        task_type="multiple-choice", dataset="commonsense", clients=50, rounds=10, local_steps=30, batch_size=1, partition="iid",
        rank=8, alpha=32.0, target_modules="q_proj,k_proj,v_proj,o_proj", layers="26-31", lr=5e-4, max_length=512,
        eval_max_examples=2000, eval_batch_size=8, eval_every=2),
}
