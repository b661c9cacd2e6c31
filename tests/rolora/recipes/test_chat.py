"""Conversations: the same tokens and masks as TRL's, and hand-made sequences."""

import json

import pytest
import torch
import transformers as hf

from rolora import config
from rolora.config import Config
from rolora.errors import BadInput
from rolora.recipes import choosing
from rolora.recipes.chat import Chat
from rolora.recipes.joined import opening_tokens
from rolora.recipes.rendering import CHATML
from tests.rolora.recipes.trl_judge import labels, trl_examples
from tests.templates import (
    CHATS,
    FAMILIES,
    GEMMA3,
    LLAMA3,
    MISTRAL,
    QWEN3,
    SHIPPED,
    say,
    tokenizer,
    told,
    unmarked,
)


@pytest.mark.parametrize("family", ["llama3", "gemma3", "mistral", "gpt-oss"])
def test_turns_found_by_rendering_are_those_that_a_template_marks(family):
    rows = [{"messages": chat} for chat in CHATS]
    for loss_on in ("assistant", "last"):
        marked = Chat(tokenizer(FAMILIES[family]), 256, loss_on).encode(rows)
        assert Chat(tokenizer(unmarked(FAMILIES[family])), 256, loss_on).encode(rows) == marked


def test_a_token_that_closes_the_conversation_belongs_to_its_last_turn():
    words = tokenizer(unmarked(FAMILIES["phi3"]))
    found = Chat(words, 256).encode([{"messages": CHATS[1]}])[0]
    assert told(words, found) == ["on the hill<|end|>", "is old<|end|>\n</s>"]


def test_hand_made_sequences():
    words = tokenizer(LLAMA3)
    messages = say("the ship", "is old", "the goat", "on the hill", system="Be brief.")

    def ids(text):
        return words(text, add_special_tokens=False)["input_ids"]

    def header(role):
        start, end = (words.convert_tokens_to_ids(f"<|{w}_header_id|>") for w in ("start", "end"))
        return [start, *ids(role), end, *ids("\n"), *ids("\n")]

    eot = words.convert_tokens_to_ids("<|eot_id|>")
    expected, carried = [words.bos_token_id], []
    for message in messages:
        expected += header(message["role"])
        start = len(expected)
        expected += [*ids(message["content"]), eot]
        if message["role"] == "assistant":
            carried.append((start, len(expected)))
    for template in (LLAMA3, unmarked(LLAMA3)):
        chat = Chat(tokenizer(template), 256)
        found = chat.encode([{"messages": messages}])[0]
        if template == LLAMA3:
            chars = tokenizer(template).convert_ids_to_tokens(found.ids)
            assert chars.count("<s>") == 1, "one opening token"
        assert words.decode(found.ids) == words.decode(expected)
        assert found.spans == tuple(carried) and found.ids == expected
    last = Chat(tokenizer(LLAMA3), 256, "last").encode([{"messages": messages}])[0]
    assert last.spans == (carried[-1],)
    batch = chat.collate([found, chat.encode([{"messages": say("the ship", "is old")}])[0]])
    assert batch.weight == sum(end - start for start, end in (*carried, *chat_spans(chat)))
    assert batch.inputs["attention_mask"].sum() == batch.tokens < batch.inputs["input_ids"].numel()


def chat_spans(chat):
    return chat.encode([{"messages": say("the ship", "is old")}])[0].spans


def test_formats_that_say_the_same_are_the_same_examples():
    chat = Chat(tokenizer(QWEN3), 256)
    asked, said = "Where is the goat?", "on the hill"
    messages = [{"messages": say(asked, said)}]
    expected = chat.encode(messages)
    sharegpt = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    same = [
        {"conversations": sharegpt},
        {"conversations": say(asked, said)},
        {"instruction": asked, "input": "", "output": said},
        {"messages": json.dumps(say(asked, said))},
        {"prompt": say(asked, said)[:1], "completion": say(asked, said)[1:]},
        {"prompt": asked, "completion": say(asked, said)[1:]},
        {"prompt": say(asked, said)[:1], "completion": said},
    ]
    for row in same:
        assert chat.encode([row]) == expected, row
    long = chat.encode(
        [{"instruction": asked, "input": "the ship", "output": said, "system": "Be"}]
    )
    turns = say(f"{asked}\n\nthe ship", said, system="Be")
    assert long == chat.encode([{"messages": turns}])


def test_a_prompt_carries_no_loss_and_texts_take_no_template(tmp_path):
    words = tokenizer(LLAMA3)
    whole = say("the ship", "is old", "the goat", "on the hill")
    row = {"prompt": whole[:3], "completion": whole[3:]}
    found = Chat(words, 256).encode([row])[0]
    assert told(words, found) == ["on the hill<|eot_id|>"]
    assert (found.ids, labels(found)) == trl_examples(words, [row], tmp_path)[0]
    listed = Chat(words, 256).encode([{"prompt": '[{"a": 1}]', "completion": "[] [x"}])[0]
    assert words.decode(listed.ids) == '<s>[{"a": 1}][] [x</s>', "JSON, but no messages"
    row = {"prompt": "the ship", "completion": " is old"}
    plain = Chat(words, 256).encode([row])[0]
    assert words.decode(plain.ids) == "<s>the ship is old</s>"
    assert told(words, plain) == [" is old</s>"]
    ((ids, theirs),) = trl_examples(words, [row], tmp_path)
    assert plain.ids == ids and labels(plain) == theirs


def test_tools_and_calls_and_their_results(tmp_path):
    words = tokenizer(QWEN3)
    schema = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "goat"}}}
    messages = [
        {"role": "user", "content": "Where is the goat?"},
        {"role": "assistant", "tool_calls": [call], "content": None},
        {"role": "tool", "content": "hill"},
        {"role": "assistant", "content": "on the hill"},
    ]
    row = {"messages": messages, "tools": json.dumps([schema])}
    found = Chat(words, 512).encode([row])[0]
    assert '"name": "find", "parameters"' in words.decode(found.ids)
    said = told(words, found)
    assert '<tool_call>{"name": "find", "arguments": {"what": "goat"}}</tool_call>' in said[0]
    assert said[1].endswith("on the hill<|im_end|>")
    rows = [{"messages": messages, "tools": json.dumps([schema])}]
    theirs = trl_examples(words, rows, tmp_path, assistant_only_loss=True, max_length=512)
    assert (found.ids, labels(found)) == theirs[0]
    with pytest.raises(BadInput, match="row 1: it has tools, and the chat template takes none"):
        Chat(tokenizer(LLAMA3), 512).encode([{"messages": CHATS[0], "tools": [schema]}])
    with pytest.raises(BadInput, match=r"row 1: the chat template drops message 2 \(assistant\)"):
        Chat(tokenizer(LLAMA3), 512).encode([{"messages": messages[:2]}])


def test_parts_where_the_template_takes_them():
    in_parts = [
        {"role": "user", "content": [{"type": "text", "text": "the ship"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "is old"}]},
    ]
    chat = Chat(tokenizer(GEMMA3), 64)
    assert chat.encode([{"messages": in_parts}]) == chat.encode(
        [{"messages": say("the ship", "is old")}]
    )
    for template in (LLAMA3, QWEN3):
        with pytest.raises(BadInput, match="row 1: message 1 has its content in parts"):
            Chat(tokenizer(template), 64).encode([{"messages": in_parts}])


def test_a_tokenizer_without_a_template_takes_chatml_and_says_so():
    words = tokenizer(None)
    chat = Chat(words, 256)
    chat.encode([{"prompt": "the ship", "completion": " is old"}])
    assert chat.describe()["chat template"] == "none: texts are taken as they are"
    found = chat.encode([{"messages": say("the ship", "is old", system="Be brief.")}])[0]
    assert chat.describe()["chat template"].startswith("ChatML, as the tokenizer has none; ")
    expected = (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthe ship<|im_end|>\n"
        "<|im_start|>assistant\nis old<|im_end|></s>\n"
    )
    assert words.decode(found.ids) == expected
    assert told(words, found) == ["is old<|im_end|></s>"]
    own = Chat(tokenizer(MISTRAL), 256, template=CHATML)
    assert "[INST]" not in words.decode(own.encode([{"messages": CHATS[0]}])[0].ids)
    assert own.describe()["chat template"].startswith("--chat-template; ")


def test_a_template_is_taken_from_a_file_and_kept_whole(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(LLAMA3)
    assert config.resolve({"chat_template": str(path)}).task.chat_template == LLAMA3
    assert config.resolve({"chat_template": LLAMA3}).task.chat_template == LLAMA3
    for text, message in ((None, "does not exist"), ("hello", "is no Jinja template")):
        other = tmp_path / "other.jinja"
        if text is not None:
            other.write_text(text)
        with pytest.raises(BadInput, match=message):
            config.resolve({"chat_template": str(other)})
    with pytest.raises(
        BadInput, match="row 1: the chat template refuses it: Expected an expression"
    ):
        Chat(tokenizer(None), 64, template="{% for %}").encode([{"messages": CHATS[0]}])


@pytest.mark.parametrize("marked", [True, False])
def test_a_template_that_writes_the_date_writes_the_same_on_every_day(marked):
    """Else a run could not be resumed on the morrow: its examples would be others."""
    template = "{{ strftime_now('%d %b %Y') + '\n' }}" + LLAMA3
    words = tokenizer(template if marked else unmarked(template))
    found = Chat(words, 256).encode([{"messages": CHATS[0]}])[0]
    assert words.decode(found.ids).startswith("26 Jul 2024\n")
    assert told(words, found) == ["on the hill<|eot_id|>"]


def test_the_templates_of_the_models_that_the_guide_names():
    """Llama 3.2's and Qwen3's of July 2025 take any conversation. Qwen3's of April leaves thoughts
    out of earlier turns: of several turns it can be asked for the last.
    """

    def said(name, chat, loss_on="assistant"):
        words = tokenizer((SHIPPED / f"{name}.jinja").read_text())
        return told(words, Chat(words, 4096, loss_on).encode([{"messages": chat}])[0])

    both = ["on the hill", "is old"]
    assert said("llama3_2", CHATS[1]) == [text + "<|eot_id|>" for text in both]
    assert said("qwen3_instruct_2507", CHATS[1]) == [text + "<|im_end|>" for text in both]
    with pytest.raises(BadInput, match="--loss-on last where only earlier turns are the trouble"):
        said("qwen3", CHATS[1])
    assert said("qwen3", CHATS[1], "last") == ["<think>\n\n</think>\n\nis old<|im_end|>"]


def test_what_is_too_long_is_cut_at_its_end(tmp_path):
    words = tokenizer(LLAMA3)
    rows = [{"messages": chat} for chat in CHATS]
    ours = Chat(words, 24).encode(rows)
    theirs = trl_examples(words, rows, tmp_path, assistant_only_loss=True, max_length=24)
    assert [(e.ids, labels(e)) for e in ours] == theirs
    whole = Chat(words, 256).encode(rows)
    for cut, full in zip(ours, whole, strict=True):
        measure = cut.measure()
        assert (measure.tokens, measure.cut) == (len(full.ids), len(full.ids) - len(cut.ids))
        assert measure.lacks is None
    short = Chat(words, 8).encode(rows)
    assert {e.measure().lacks for e in short} == {"its answer is cut away by --max-length"}


@torch.no_grad()
def test_the_metrics_are_those_of_the_tokens_that_the_assistant_says():
    words = tokenizer(LLAMA3)
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(words), **size)).eval()
    chat = Chat(words, 256)
    examples = chat.encode([{"messages": m} for m in CHATS])
    total, right, count = 0.0, 0, 0
    for example in examples:
        own = torch.tensor([labels(example)])
        out = model(torch.tensor([example.ids]), labels=own)
        carried = int((own != -100).sum())
        total, count = total + out.loss.item() * carried, count + carried
        right += int((out.logits[0, :-1].argmax(-1) == own[0, 1:]).sum())
    metrics = chat.evaluate(model, examples, 2)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["token_accuracy"] == right / count
    assert set(metrics) == {"token_accuracy", "loss", "perplexity"}
    batch = chat.collate(examples)
    assert chat.loss(model, batch).item() == pytest.approx(total, rel=1e-5)
    assert chat.losses(model, batch).sum().item() == pytest.approx(total, rel=1e-5)


def test_the_recipe_is_built_from_the_options():
    rows = [{"messages": CHATS[0]}]
    settled = choosing.settle(Config().with_values(loss_on="last", max_length=32), rows[0])
    made = choosing.build(settled, tokenizer(LLAMA3), rows, torch.device("cpu"))
    assert isinstance(made, Chat) and (made.loss_on, made.max_length) == ("last", 32)


def test_a_completion_alone_that_opens_by_itself_has_one_opening():
    words = tokenizer(LLAMA3)
    opening = opening_tokens(words)
    assert opening, "a tokenizer that opens texts"
    bos = words.decode(opening)
    texts = [{"prompt": "", "completion": text} for text in ("the goat", bos + "the goat")]
    plain, opened = Chat(words, 64).encode(texts)
    assert plain.ids == opened.ids and plain.ids.count(opening[0]) == 1
