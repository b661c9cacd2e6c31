"""A prompt and what follows it as tokens: opened and ended as the tokenizer does, once."""

from __future__ import annotations


def opening_tokens(tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a text."""
    whole, plain = (
        tokenizer("a")["input_ids"],
        tokenizer("a", add_special_tokens=False)["input_ids"],
    )
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def joined(
    tokenizer, opening: list[int], prompt: str, response: str
) -> tuple[list[int], list[int]]:
    """(tokens of `prompt` after the opening tokens, tokens of `response` and the end token);
    tokenized apart, so that no token lies in both.

    A text that was made by a template may open and end by itself: neither is doubled.
    """
    end = tokenizer.eos_token_id
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    after = tokenizer(response, add_special_tokens=False)["input_ids"]
    if before[: len(opening)] == opening:
        before = before[len(opening) :]
    elif not before and after[: len(opening)] == opening:
        after = after[len(opening) :]
    if end is not None and after[-1:] != [end]:
        after = [*after, end]
    return opening + before, after
