"""Chat templates in the styles of six families, written for the tests, and tokenizers for them.

Each says with `{% generation %}` what the assistant says; `unmarked` takes that out.
"""

from __future__ import annotations

import re
from pathlib import Path

import transformers as hf
import trl

from tests import models

LLAMA3 = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ (m['content'] | trim) + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ (m['content'] | trim) + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The thoughts of turns before the last question are left out.
QWEN3 = (
    "{% set ns = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% set words = m.content or '' %}"
    "{% if loop.index0 > ns.asked and '</think>' not in words %}{{ '<think>\n\n</think>\n\n' }}"
    "{% elif loop.index0 < ns.asked %}{% set words = words.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}"
    "{{ words }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The system's words go into the first question; content may be in parts; turns must alternate.
GEMMA3 = (
    "{{ bos_token }}"
    "{% set ns = namespace(first='') %}"
    "{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}"
    "{% set ns.first = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% if loop.first %}{{ ns.first }}{% endif %}"
    "{% if m.role == 'assistant' %}"
    "{% generation %}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>' }}{% endgeneration %}"
    "{% else %}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# No header for the assistant, no turn of the system's.
MISTRAL = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}"
    "{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
# One more token closes a whole conversation.
PHI3 = (
    "{% for m in messages %}"
    "{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Channels, and another end token for the last turn.
GPT_OSS = (
    "{{ '<|start|>system<|message|>You are a model.<|end|>' }}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{{ '<|start|>assistant' }}"
    "{% generation %}{{ '<|channel|>final<|message|>' + m.content }}"
    "{% if loop.last %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}{% endgeneration %}"
    "{% else %}"
    "{{ '<|start|>' + ('developer' if m.role == 'system' else m.role) + '<|message|>' }}"
    "{{ m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
SHIPPED = Path(trl.__file__).parent / "chat_templates"  # those of many models, by TRL
FAMILIES = {
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "gemma3": GEMMA3,
    "mistral": MISTRAL,
    "phi3": PHI3,
    "gpt-oss": GPT_OSS,
}
_TOKENS = re.compile(r"<\|[A-Za-z_]+\|>|</?[a-z]+_of_turn>|\[/?INST\]|</?tool_call>|</?think>")
WORDS = ["the ship is old", "Where is the goat?", "on the hill", "Be brief.", "assistant user"]


def unmarked(template: str) -> str:
    return re.sub(r"\{% (end)?generation %\}", "", template)


def tokenizer(template: str | None) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens that a template writes out; it opens a text with
    <s>.
    """
    made = models.tokenizer(WORDS)
    found = _TOKENS.findall(template or "")
    if "'<|' + m.role" in (template or ""):
        found += ["<|user|>", "<|system|>"]
    made.add_special_tokens({"additional_special_tokens": sorted(set(found))})
    made.chat_template, made.pad_token = template, made.eos_token
    return made


def say(*texts: str, system: str | None = None) -> list[dict]:
    """User and assistant by turns."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[number % 2], "content": text})
    return messages


CHATS = [
    say("Where is the goat?", "on the hill"),
    say("Where is the goat?", "on the hill", "the ship", "is old"),
    say("the ship", "is old", "Be brief.", "on", "the goat"),  # ends with a question
]


def told(words: hf.PreTrainedTokenizerFast, example) -> list[str]:
    """Texts of the spans of an example that carry loss."""
    return [words.decode(example.ids[start:end]) for start, end in example.spans]
