"""Rows, templates and columns that a conversation cannot be made of: one line each, by number."""

import pytest

from rolora.data.conversations import read
from rolora.data.files import with_numbers
from rolora.errors import BadInput
from rolora.recipes.chat import Chat
from tests.templates import (
    CHATS,
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


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_a_template_of_images_that_drops_texts_is_refused(name):
    chat = Chat(tokenizer((SHIPPED / f"{name}.jinja").read_text()), 256)
    with pytest.raises(BadInput, match=r"row 1: the chat template drops message 1 \(user\)"):
        chat.encode([{"messages": CHATS[0]}])


def test_what_there_is_nothing_to_learn_from_is_told():
    chat = Chat(tokenizer(LLAMA3), 64)
    found = chat.encode([{"messages": []}, {"messages": say("the ship")}, {"messages": CHATS[0]}])
    assert [e.measure().lacks for e in found] == [
        "it has no messages",
        "it has no turn of the assistant's",
        None,
    ]
    every = Chat(tokenizer(LLAMA3), 64, "all").encode([{"messages": say("the ship")}])
    assert every[0].measure().lacks is None


ASK = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": None}, "row 7: it has no value for column 'messages'"),
        ({"messages": "hello"}, "row 7: column 'messages' is text 'hello', expected a list of"),
        ({"messages": ["a"]}, "row 7: message 1 is text 'a', expected an object"),
        (
            {"messages": [ASK, {"role": "narrator", "content": "b"}]},
            "row 7: message 2 has the role text 'narrator', expected system, developer, user,",
        ),
        ({"messages": [{"role": ["user"], "content": "b"}]}, "row 7: message 1 has the role list"),
        ({"messages": [{"content": "b"}]}, "row 7: message 1 has the role nothing"),
        ({"messages": [{"role": "user"}]}, r"row 7: message 1 \(user\) has no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "row 7: message 1 .* content is int 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"row 7: message 1 \(user\): its content is in parts, one of them 'image'",
        ),
        ({"messages": [ASK], "tools": "x"}, "row 7: column 'tools' is text 'x', expected a list"),
        ({"messages": [ASK], "tools": ["x"]}, "row 7: tool 1 is text 'x', expected a JSON schema"),
        (
            {"messages": [ASK, ASK, {"role": "assistant", "content": "b"}]},
            "row 7: the chat template refuses it: Roles must alternate user/assistant",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_number_of_the_row(row, message):
    good = {"messages": CHATS[0]}
    whole = with_numbers([good] * 6 + [row])
    rows = [whole[2], whole[6]]
    with pytest.raises(BadInput, match=message) as caught:
        Chat(tokenizer(GEMMA3), 64).encode(rows)
    assert "\n" not in str(caught.value)


def test_columns_of_another_format_are_named():
    with pytest.raises(
        BadInput, match=r"columns are messages, or conversations, .* there are a, b"
    ):
        Chat(tokenizer(GEMMA3), 64).encode([{"a": 1, "b": 2}])
    with pytest.raises(BadInput, match="row 2: it has no value for column 'instruction'"):
        Chat(tokenizer(GEMMA3), 64).encode([{"instruction": "a", "output": "b"}, {"messages": []}])
    with pytest.raises(ValueError, match="column 'output' is int 5"):
        read({"instruction": "a", "output": 5}, "instruction")


def test_a_template_that_drops_a_turn_is_refused():
    forgetful = LLAMA3.replace("{% for m in messages %}", "{% for m in messages[-2:] %}")
    chat = Chat(tokenizer(forgetful), 64)
    assert told(tokenizer(forgetful), chat.encode([{"messages": CHATS[0]}])[0])
    with pytest.raises(BadInput, match=r"row 1: the chat template drops message 1 \(user\)"):
        chat.encode([{"messages": CHATS[1]}])


def test_two_turns_of_the_systems_are_as_the_template_says():
    twice = say("the ship", "is old", system="Be brief.")
    twice.insert(1, {"role": "system", "content": "on the hill"})
    words = tokenizer(LLAMA3)
    assert "on the hill" in words.decode(Chat(words, 64).encode([{"messages": twice}])[0].ids)
    for template in (GEMMA3, MISTRAL):
        with pytest.raises(BadInput, match="row 1: the chat template refuses it: "):
            Chat(tokenizer(template), 64).encode([{"messages": twice}])


def test_turns_that_cannot_be_told_apart_are_refused():
    thought = say("a", "<think>\nhm\n</think>\n\nis old", "the ship", "is old")
    for template in (QWEN3, unmarked(QWEN3)):
        words = tokenizer(template)
        last = Chat(words, 256, "last").encode([{"messages": thought}])[0]
        assert told(words, last) == ["<think>\n\n</think>\n\nis old<|im_end|>"]
    with pytest.raises(BadInput, match="row 1: the tokens of its first 2 messages alone are not"):
        Chat(tokenizer(unmarked(QWEN3)), 256).encode([{"messages": thought}])
    with pytest.raises(BadInput, match="row 1: its first message is the assistant's"):
        Chat(tokenizer(unmarked(LLAMA3)), 64).encode([{"messages": say("a", "b")[1:]}])


def test_a_token_over_the_border_of_a_turn_is_refused():
    """Nothing asks a model with half a word: the header's "sh" and the answer's "ip" are one."""
    glued = "{% for m in messages %}{{ m.role + ' sh' + m.content + '\n' }}{% endfor %}"
    glued += "{% if add_generation_prompt %}{{ 'assistant sh' }}{% endif %}"
    words = tokenizer(glued)
    plain = Chat(words, 64).encode([{"messages": say(" a", " b")}])[0]
    assert told(words, plain) == [" b\n"]
    with pytest.raises(BadInput, match="row 1: the tokens of its first 1 messages alone are not"):
        Chat(words, 64).encode([{"messages": say(" a", "ip")}])
