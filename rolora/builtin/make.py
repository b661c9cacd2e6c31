"""Remakes the embedded default: the text and the tiny Llama that was pre-trained on it.

    python -m rolora.builtin.make --stdlib /path/to/lib/python3.13 --version 3.13.0 [--only
    text|model]

Text: the docstrings of twelve packages of a CPython standard library (PSF licence, beside this
file); the label is the package. One docstring is one example, so no part of an evaluated text is
ever seen in training. `source.json` keeps the version and a digest of the library that was read.

Model: a Llama in Hugging Face format with a byte-level BPE of its own and, like Llama-2, no pad
token. It is pre-trained as a causal LM on the library's comments and docstrings, the evaluation
texts left out.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import math
import time
import tokenize
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PACKAGES = {  # directory or module of the library -> label
    "idlelib": "idlelib",
    "tkinter": "tkinter",
    "asyncio": "asyncio",
    "email": "email",
    "importlib": "importlib",
    "logging": "logging",
    "xml": "xml",
    "_pydecimal": "decimal",
    "multiprocessing": "multiprocessing",
    "mailbox": "mailbox",
    "unittest": "unittest",
    "http": "http",
}
EVAL_FRACTION = 0.2
VOCABULARY, WINDOW = 4096, 128
STEPS, BATCH, PEAK_LR = 5000, 24, 3e-3


def modules(stdlib: Path):
    """(top-level name, source text) of every module, sorted by path; third-party code is left
    out.
    """
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        if parts[0] in ("site-packages", "lib-dynload", "__pycache__"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            ast.parse(source)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # the test suite ships files that are broken on purpose
        yield (parts[0] if len(parts) > 1 else path.stem), source


def docstrings(source: str):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 20:
                yield text.strip()


def comments(source: str):
    """Runs of comment lines, joined."""
    run: list[str] = []
    last = -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1 and run:
            yield "\n".join(run)
            run = []
        run.append(token.string.lstrip("#!: ").rstrip())
        last = token.start[0]
    if run:
        yield "\n".join(run)


def make_text(stdlib: Path, version: str) -> None:
    digest, labelled = hashlib.sha256(), dict[str, str]()
    for top, source in modules(stdlib):
        digest.update(source.encode())
        for text in docstrings(source) if top in PACKAGES else ():
            labelled.setdefault(text, PACKAGES[top])  # a text that occurs twice counts once
    rows = [{"text": text, "label": label} for text, label in labelled.items()]
    order = np.random.default_rng(0).permutation(len(rows))
    cut = round(len(rows) * EVAL_FRACTION)
    (HERE / "text").mkdir(exist_ok=True)
    for name, chosen in (("eval", order[:cut]), ("train", order[cut:])):
        lines = [json.dumps(rows[i], ensure_ascii=False) for i in sorted(chosen)]
        (HERE / "text" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source_of_text = {
        "source": "CPython standard library, docstrings",
        "version": version,
        "licence": "PSF-2.0 (LICENSE-PSF.txt)",
        "sha256_of_sources": digest.hexdigest(),
        "texts": len(rows),
    }
    (HERE / "text" / "source.json").write_text(json.dumps(source_of_text, indent=2) + "\n")
    (HERE / "LICENSE-PSF.txt").write_text((stdlib / "LICENSE.txt").read_text())
    print(source_of_text)


def pretraining_texts(stdlib: Path) -> list[str]:
    held_out = {
        json.loads(line)["text"] for line in open(HERE / "text" / "eval.jsonl", encoding="utf-8")
    }
    texts: dict[str, None] = {}
    for _, source in modules(stdlib):
        for text in (*docstrings(source), *comments(source)):
            if len(text) >= 30 and text not in held_out:
                texts.setdefault(text)
    return list(texts)


def make_tokenizer(texts: list[str]):
    """A byte-level BPE trained on `texts`; it opens a text with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def make_model(stdlib: Path, threads: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    texts = pretraining_texts(stdlib)
    tokenizer = make_tokenizer(texts)
    rng = np.random.default_rng(0)
    ids = [tokenizer(texts[i])["input_ids"] + [1] for i in rng.permutation(len(texts))]
    stream = torch.tensor(np.concatenate(ids), dtype=torch.long)
    held, stream = stream[: 64 * WINDOW].view(64, WINDOW), stream[64 * WINDOW :]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(texts)} texts, {len(stream)} tokens, {size} parameters", flush=True)
    pretrain(model, stream, held, rng)
    model.bfloat16().save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model")


def pretrain(model, stream, held, rng: np.random.Generator) -> None:
    """AdamW on windows of `stream` (token ids `[n]`), with a warm-up and a cosine; the loss of
    `held` (`[64, WINDOW]`) is printed on the way.
    """
    import torch

    decayed = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
    )
    start = time.time()
    for step in range(STEPS):
        rate = PEAK_LR * min(
            (step + 1) / 200, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        offsets = torch.from_numpy(rng.integers(0, len(stream) - WINDOW, BATCH))
        batch = stream[offsets[:, None] + torch.arange(WINDOW)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0 or step == STEPS - 1:
            with torch.no_grad():
                held_loss = model(input_ids=held, labels=held).loss.item()
            print(
                f"step {step} loss {loss.item():.3f} held out {held_loss:.3f} seconds "
                f"{time.time() - start:.0f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stdlib", type=Path, required=True, help="the lib/python3.x folder of a CPython release"
    )
    parser.add_argument(
        "--version", required=True, help="that release, such as 3.13.0 (recorded beside the text)"
    )
    parser.add_argument("--only", choices=["text", "model"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.only != "model":
        make_text(args.stdlib, args.version)
    if args.only != "text":
        make_model(args.stdlib, args.threads)


if __name__ == "__main__":
    main()
