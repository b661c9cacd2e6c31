"""Tiny models of many architectures beside PEFT: what is adapted, and whether outputs, gradients,
merged weights and files agree.

    python -m benchmarks.architectures            # writes docs/reference/architectures.md
    python -m benchmarks.architectures llama bert # prints some rows

PEFT adapts the same modules, by their paths, and gets the same random factors. The base is fp32, so
that a disagreement is no rounding: a difference counts as one from 1e-5 of what is compared.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor

from benchmarks import mixtures
from benchmarks.mixtures import apart
from rolora import LoRAConfig, attach, load_adapter, merge, save_adapter
from rolora.adapter.model import adapted_layers

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "architectures.md"
_GATE = 1e-5
_V = 96  # entries of every vocabulary
_S: dict[str, Any] = dict(
    vocab_size=_V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
)
_KV: dict[str, Any] = dict(num_key_value_heads=2, **_S)
_GPT: dict[str, Any] = dict(vocab_size=_V, n_embd=32, n_layer=2, n_head=4)
_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_KV),
    "mistral": lambda: hf.MistralConfig(**_KV),
    "qwen2": lambda: hf.Qwen2Config(**_KV),
    "qwen3": lambda: hf.Qwen3Config(head_dim=8, **_KV),
    "gemma": lambda: hf.GemmaConfig(head_dim=8, **_KV),
    "gemma2": lambda: hf.Gemma2Config(head_dim=8, **_KV),
    "gemma3_text": lambda: hf.Gemma3TextConfig(head_dim=8, **_KV),
    "phi": lambda: hf.PhiConfig(**_S),
    "phi3": lambda: hf.Phi3Config(**_KV, **_IDS),
    "smollm3": lambda: hf.SmolLM3Config(**_KV, **_IDS),
    "granite": lambda: hf.GraniteConfig(**_KV),
    "cohere": lambda: hf.CohereConfig(**_KV),
    "olmo": lambda: hf.OlmoConfig(**_KV),
    "olmo2": lambda: hf.Olmo2Config(**_KV),
    "stablelm": lambda: hf.StableLmConfig(**_KV),
    "starcoder2": lambda: hf.Starcoder2Config(**_KV),
    "glm": lambda: hf.GlmConfig(head_dim=8, pad_token_id=0, **_KV),
    "nemotron": lambda: hf.NemotronConfig(**_KV),
    "falcon": lambda: hf.FalconConfig(
        vocab_size=_V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False
    ),
    "mpt": lambda: hf.MptConfig(vocab_size=_V, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "bloom": lambda: hf.BloomConfig(vocab_size=_V, hidden_size=32, n_layer=2, n_head=4),
    "opt": lambda: hf.OPTConfig(
        vocab_size=_V,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "gpt2": lambda: hf.GPT2Config(n_positions=64, **_GPT),
    "gptj": lambda: hf.GPTJConfig(rotary_dim=4, n_positions=64, **_GPT),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=_V,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_S),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(n_positions=64, **_GPT),
    "codegen": lambda: hf.CodeGenConfig(rotary_dim=4, n_positions=64, **_GPT),
    "xglm": lambda: hf.XGLMConfig(
        vocab_size=_V, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4
    ),
    **mixtures.MIXTURES,
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertConfig(**_S),
    "roberta": lambda: hf.RobertaConfig(max_position_embeddings=66, **_S),
    "xlm-roberta": lambda: hf.XLMRobertaConfig(max_position_embeddings=66, **_S),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=_V, dim=32, hidden_dim=64, n_layers=2, n_heads=4
    ),
    "electra": lambda: hf.ElectraConfig(embedding_size=32, **_S),
    "albert": lambda: hf.AlbertConfig(embedding_size=16, **_S),
    "mpnet": lambda: hf.MPNetConfig(max_position_embeddings=66, **_S),
    "deberta": lambda: hf.DebertaConfig(max_position_embeddings=64, **_S),
    "deberta-v2": lambda: hf.DebertaV2Config(
        max_position_embeddings=64, relative_attention=True, pos_att_type=["p2c", "c2p"], **_S
    ),
    "modernbert": lambda: hf.ModernBertConfig(pad_token_id=0, cls_token_id=1, sep_token_id=2, **_S),
}


@dataclass(frozen=True)
class Row:
    """One architecture. The differences are relative, the largest of what is compared; `to_peft`
    and `from_peft` are of outputs after a file went that way.
    """

    name: str
    auto: tuple[str, ...]
    all_linear: int
    unadapted: float
    outputs: float
    gradients: float
    merged: float
    to_peft: float
    from_peft: float
    experts: mixtures.Experts | None

    def agrees(self) -> bool:
        found = [self.outputs, self.gradients, self.merged, self.to_peft, self.from_peft]
        if self.experts is not None:
            found.append(self.experts.worst)
        return all(difference < _GATE for difference in found)


def build(name: str) -> Any:
    """The tiny model, the same every time, without dropout."""
    torch.manual_seed(0)
    if name in CAUSAL:
        return hf.AutoModelForCausalLM.from_config(CAUSAL[name]()).eval()
    return hf.AutoModelForSequenceClassification.from_config(ENCODERS[name]()).eval()


def examine(name: str) -> Row:
    """Everything about one architecture."""
    ours, theirs = build(name), build(name)
    report = attach(ours, LoRAConfig(rank=mixtures.RANK, alpha=6.0), seed=0)
    other = peft.get_peft_model(theirs, judged(ours, report.replaced)).eval()
    _same_factors(ours, other)
    batch = inputs(name)
    mine, judge = ours(**batch), other(**batch)
    mine.loss.backward(), judge.loss.backward()
    outputs, gradients = apart(mine.logits, judge.logits), _gradients(ours, other)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(ours, folder)
        loaded = peft.PeftModel.from_pretrained(build(name), folder).eval()
        to_peft = apart(loaded(**batch).logits, judge.logits)
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        again = build(name)
        load_adapter(again, folder)
        from_peft = apart(again(**batch).logits, judge.logits)
    merge(ours)
    state = other.merge_and_unload().state_dict()
    weights = [f"{path}.weight" for path in report.replaced]
    merged = max(apart(ours.get_parameter(w).detach(), state[w]) for w in weights)
    count, share = _all_linear(name)
    last = dict.fromkeys(path.rpartition(".")[2] for path in report.replaced)
    stacked = mixtures.examine(lambda: build(name), batch)
    found = (outputs, gradients, merged, to_peft, from_peft, stacked)
    return Row(name, tuple(last), count, share, *found)


def judged(model: Any, paths: list[str]) -> peft.LoraConfig:
    """PEFT's configuration for the same modules."""
    conv = any(layer.fan_in_fan_out for _, layer in adapted_layers(model))
    return peft.LoraConfig(r=mixtures.RANK, lora_alpha=6, target_modules=paths, fan_in_fan_out=conv)


def inputs(name: str) -> dict[str, Tensor]:
    ids = torch.randint(5, _V, (3, 12), generator=torch.Generator().manual_seed(1))
    labels = ids if name in CAUSAL else torch.tensor([0, 1, 1])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@torch.no_grad()
def _same_factors(ours: Any, theirs: Any) -> None:
    draw = torch.Generator().manual_seed(5)
    modules = dict(theirs.base_model.model.named_modules())
    for path, layer in adapted_layers(ours):
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=draw) * 0.1)
        modules[path].lora_A["default"].weight.copy_(layer.lora_A)
        modules[path].lora_B["default"].weight.copy_(layer.lora_B)


def _gradients(ours: Any, theirs: Any) -> float:
    modules = dict(theirs.base_model.model.named_modules())
    worst = 0.0
    for path, layer in adapted_layers(ours):
        for factor in "AB":
            mine = getattr(layer, f"lora_{factor}").grad
            other = getattr(modules[path], f"lora_{factor}")["default"].weight.grad
            worst = max(worst, apart(mine, other))
    return worst


def _all_linear(name: str) -> tuple[int, float]:
    """(linears that "all-linear" adapts, the share of the linear parameters that it leaves)."""
    report = attach(build(name), LoRAConfig(rank=1, target_modules="all-linear"), seed=0)
    return len(report.layers), report.unadapted_share


_HEAD = (
    "| architecture | `auto` adapts | `all-linear` adapts | not adapted then "
    "| experts adapted | not adapted then | beside PEFT |"
)


def as_table(rows: list[Row]) -> str:
    lines = [_HEAD, "|---|---|---|---|---|---|---|"]
    for row in rows:
        verdict = "agrees"
        if not row.agrees():
            verdict = f"outputs {row.outputs:.0e}, gradients {row.gradients:.0e}"
        names = ", ".join(f"`{name}`" for name in row.auto)
        lines.append(
            f"| {row.name} | {names} | {row.all_linear} linears | {row.unadapted:.0%} "
            f"| {_experts(row.experts)} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def _experts(found: mixtures.Experts | None) -> str:
    """Two cells: which and how, and what is left."""
    if found is None:
        return "— | "
    names = ", ".join(f"`{name}`" for name in found.names)
    how = "routed" if found.routed else "as W + Δ"
    return f"{names}, {how} | {found.unadapted:.0%}"


_TEXT = """# Architectures

{count} architectures of transformers {transformers} as tiny models in fp32, beside PEFT {peft} with
the same modules and the same factors: outputs, gradients of both factors, merged weights, and
adapter files both ways. They agree where the largest relative difference is under {gate:.0e}.

"Not adapted then" is the share of the linear parameters (weight matrices, embeddings aside) that
`all-linear` leaves: output layers, routers, and the experts of a mixture, which transformers keeps
as one tensor. "Experts adapted" names the parameters that `target_parameters` takes, judged by
PEFT's in the same five ways, and after it what is left beside `all-linear`. *Routed*: every token
meets the factors of its own experts; *as W + Δ*: the changed weight is made
([experts](../guides/experts.md)).
Made by `python -m benchmarks.architectures`.

"""


def main() -> None:
    warnings.filterwarnings("ignore")
    hf.logging.set_verbosity_error()
    asked = sys.argv[1:]
    rows = []
    for name in asked or [*CAUSAL, *ENCODERS]:
        try:
            rows.append(examine(name))
            print(rows[-1], flush=True)
        except Exception as error:
            print(name, type(error).__name__, str(error)[:200], flush=True)
            raise SystemExit(1) from None
    if not asked:
        known = {n: version(n) for n in ("transformers", "peft")}
        PAGE.write_text(_TEXT.format(count=len(rows), gate=_GATE, **known) + as_table(rows))
    else:
        print(as_table(rows))


if __name__ == "__main__":
    main()
