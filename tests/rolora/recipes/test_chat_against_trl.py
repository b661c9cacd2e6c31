"""Tokens and masks of conversations are those that TRL's trainer makes."""

import pytest

from rolora.recipes.chat import Chat
from tests.rolora.recipes.trl_judge import labels, trl_examples
from tests.templates import (
    CHATS,
    FAMILIES,
    SHIPPED,
    say,
    tokenizer,
    told,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_masks_are_trls(family, tmp_path):
    words = tokenizer(FAMILIES[family])
    rows = [{"messages": chat} for chat in CHATS]
    if family in ("llama3", "qwen3", "gemma3", "phi3", "gpt-oss"):
        rows.append({"messages": say("the goat", "is old", system="Be brief.")})
    theirs = trl_examples(words, rows, tmp_path, assistant_only_loss=True)
    ours = Chat(words, 256).encode(rows)
    assert [(e.ids, labels(e)) for e in ours] == theirs
    everything = trl_examples(words, rows, tmp_path, assistant_only_loss=False)
    assert [(e.ids, labels(e)) for e in Chat(words, 256, "all").encode(rows)] == everything


@pytest.mark.parametrize(
    "name", ["llama3", "gemma3", "phi3", "cohere", "cohere2", "lfm2", "qwen3_instruct_2507"]
)
def test_turns_of_models_own_templates_are_those_that_trl_marks(name):
    """TRL ships templates of models, and the same with marks; its marks may hold a new line more,
    after the token that ends a turn.
    """
    own = (SHIPPED / f"{name}.jinja").read_text()
    marked = (SHIPPED / f"{name}_training.jinja").read_text()
    assert "generation %}" not in own and "generation %}" in marked
    for chat in CHATS[:2]:
        found = Chat(tokenizer(own), 4096).encode([{"messages": chat}])[0]
        words = tokenizer(marked)
        theirs = Chat(words, 4096).encode([{"messages": chat}])[0]
        assert words.decode(found.ids) == words.decode(theirs.ids)
        assert len(found.spans) == len(chat) // 2
        said = [text.rstrip("\n") for text in told(words, theirs)]
        assert [text.rstrip("\n") for text in told(words, found)] == said
