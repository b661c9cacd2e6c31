"""Conversations as tokens, by the tokenizer's chat template, and which of them the assistant says.

Where the template marks them with `{% generation %}`, its marks are taken. Else a turn is what the
rendering up to it adds to the rendering of what was before it; both must be beginnings of the whole
conversation's tokens, which is checked for every turn of every row.
"""

from __future__ import annotations

import copy
import re
from datetime import datetime

from rolora.data.conversations import Conversation
from rolora.errors import BadInput
from rolora.recipes.spans import Span

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
# Stands for today's, which some templates write: the date that Llama 3.2's own falls back on.
_DATE = datetime(2024, 7, 26)
# What is taken where neither the tokenizer nor --chat-template says anything: ChatML. An end token
# of another name follows, so that a model that has no token <|im_end|> learns to stop.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% if eos_token and eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}"
    "{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Renderer:
    """`template`: one's own, in place of the tokenizer's. `source` says in words which is used.

    Raises BadInput for a tokenizer with several templates of which none is the default.
    """

    def __init__(self, tokenizer, template: str | None = None):
        self.tokenizer, self.template, self.source = tokenizer, template, "--chat-template"
        self._special = set(tokenizer.added_tokens_decoder)
        self._proved: set[tuple] = set()  # the shapes of conversations of which no turn is dropped
        if template is None and tokenizer.chat_template is None:
            self.template, self.source = CHATML, "ChatML, as the tokenizer has none"
            if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
                self.template = "{{ bos_token }}" + CHATML
        elif template is None:
            self.source = "the tokenizer's"
        try:
            self._text_for(None)
        except ValueError as error:
            raise BadInput(f"{error}: give one with --chat-template") from None

    def describe(self) -> str:
        """The template that was used, and how the assistant's turns are found, for a plan."""
        if not self._proved:
            return "none: texts are taken as they are"
        if self._marks(None):
            return f"{self.source}; the assistant's turns are where it says generation"
        return f"{self.source}; the assistant's turns are found by rendering turn after turn"

    def beside(self) -> dict[str, str]:
        """The template that was used, for whoever serves the adapter, under its usual name."""
        return {"chat_template.jinja": self._text_for(None)} if self._proved else {}

    def whole(self, conversation: Conversation) -> list[int]:
        """The tokens of a conversation; none for one without messages.

        Raises ValueError where the template refuses it, or drops a turn, parts or the tools.
        """
        return self._rendered(conversation, False)[0]

    def turns(self, conversation: Conversation, last: bool) -> tuple[list[int], list[Span]]:
        """The tokens, and the spans that the assistant says after what is given, or its last turn.

        White space after the token that ends a turn is the template's and in no span. Raises
        ValueError as `whole`, and where a turn cannot be told from the rest.
        """
        marked = self._marks(conversation.tools)
        ids, marks = self._rendered(conversation, marked)
        said = [
            number
            for number, message in enumerate(conversation.messages)
            if message["role"] == "assistant" and number >= conversation.given
        ]
        if not said:
            return ids, []
        if last:
            said = said[-1:]
        if not marked:
            return ids, [self._span(conversation, number, ids) for number in said]
        start = 0
        if said[0] > 0 and (last or conversation.given > 0):
            start = len(self._shared(conversation, said[0], ids)[0])
        spans = _runs(marks, start)
        if not spans:
            raise ValueError(
                "the chat template's {% generation %} marks nothing of the assistant's turns"
            )
        return ids, spans

    def _rendered(self, conversation: Conversation, marked: bool) -> tuple[list[int], list[int]]:
        """The tokens, and ones where the template says that the assistant speaks; every turn is
        there.
        """
        if not conversation.messages:
            return [], []
        found = self._apply(conversation.messages, conversation.tools, marks=marked)
        self._require_every_turn(conversation)
        return found["input_ids"], found.get("assistant_masks", [])

    def _span(self, conversation: Conversation, number: int, ids: list[int]) -> Span:
        """Where turn `number` lies in `ids`, proved."""
        if number == 0:
            raise ValueError(
                "its first message is the assistant's, and the chat template has no "
                "{% generation %} that says where it begins: begin with another message, or give "
                "--loss-on all"
            )
        asked = self._tokens(conversation.messages[:number], conversation.tools, prompt=True)
        if ids[: len(asked)] != asked:
            raise ValueError(_differs(number))
        return len(asked), self._end(conversation, number, ids, len(asked))

    def _end(self, conversation: Conversation, number: int, ids: list[int], start: int) -> int:
        """Where turn `number` ends in `ids`."""
        if number + 1 == len(conversation.messages):
            return self._without_space(ids, start, len(ids))
        shared, rest = self._shared(conversation, number + 1, ids)
        end = self._without_space(ids, start, len(shared))
        if not rest or (end > start and ids[end - 1] in self._special):
            return end
        if ids[len(shared)] not in self._special:
            raise ValueError(_differs(number + 1))
        return len(shared) + 1  # another token than at the end of a conversation closes it

    def _shared(
        self, conversation: Conversation, count: int, ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """What the first `count` messages and `ids` begin with alike, and the rest of the former.

        The rest may be what closes a conversation, special tokens and white space: gpt-oss ends its
        last turn by another token, Phi-3 puts one after it.
        """
        before = self._tokens(conversation.messages[:count], conversation.tools)
        same = _common(before, ids)
        if not all(token in self._special or self._is_space(token) for token in before[same:]):
            raise ValueError(_differs(count))
        return before[:same], before[same:]

    def _without_space(self, ids: list[int], start: int, end: int) -> int:
        """The end of a turn, less white space where it follows a special token."""
        last = end
        while last > start and self._is_space(ids[last - 1]):
            last -= 1
        closed = last > start and ids[last - 1] in self._special
        return last if closed else end

    def _is_space(self, token: int) -> bool:
        return self.tokenizer.decode(token).isspace()

    def _require_every_turn(self, conversation: Conversation) -> None:
        """Raises ValueError for a shape of conversation of which the template drops something: told
        by rendering it with other words in the turns' places.
        """
        messages, tools = conversation.messages, conversation.tools
        shape = (tools is None, *map(_shape, messages))
        if shape in self._proved:
            return
        if tools is not None and self._text(messages, tools) == self._text(messages, None):
            raise ValueError(
                "it has tools, and the chat template takes none: give one that does with "
                "--chat-template, or leave the column out"
            )
        probes = [_probe(message, f"turn{n}probe") for n, message in enumerate(messages)]
        text = self._text(probes, tools)
        for n, message in enumerate(messages):
            word = f"turn{n}probe"
            if word not in text:
                raise ValueError(
                    f"the chat template drops message {n + 1} ({message['role']}): leave it out, "
                    "or give another template with --chat-template"
                )
            if f"'text': '{word}'" in text or f'"text": "{word}"' in text:
                raise ValueError(_parts(n + 1))
        self._proved.add(shape)

    def _text_for(self, tools: list[dict] | None) -> str:
        """The template itself; a tokenizer may have another one for tools."""
        if self.template is not None:
            return self.template
        return self.tokenizer.get_chat_template(tools=tools)

    def _marks(self, tools: list[dict] | None) -> bool:
        return _MARKS.search(self._text_for(tools)) is not None

    def _tokens(
        self, messages: list[dict], tools: list[dict] | None, prompt: bool = False
    ) -> list[int]:
        return self._apply(messages, tools, prompt=prompt)["input_ids"]

    def _text(self, messages: list[dict], tools: list[dict] | None) -> str:
        return self._apply(messages, tools, tokenize=False)

    def _apply(
        self,
        messages: list[dict],
        tools: list[dict] | None,
        marks: bool = False,
        prompt: bool = False,
        tokenize: bool = True,
    ):
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=_dated(self._text_for(tools)),
                tokenize=tokenize,
                return_dict=tokenize,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
            )
        except Exception as error:  # whatever a template does with a conversation
            text = " ".join(str(error).split())[:200]
            for number, message in enumerate(messages, 1):
                if isinstance(error, TypeError) and isinstance(message.get("content"), list):
                    raise ValueError(_parts(number)) from None
            raise ValueError(f"the chat template refuses it: {text}") from None


def _dated(template: str) -> str:
    """The template with one date for good: a run that is resumed on another day, or on several
    machines, has the same examples.
    """
    return _TODAY.sub(lambda found: repr(_DATE.strftime(found[2])), template)


def _differs(count: int) -> str:
    return (
        f"the tokens of its first {count} messages alone are not those that the whole begins with, "
        "so its turns cannot be told apart: give a template with {% generation %} by "
        "--chat-template, --loss-on last where only earlier turns are the trouble, or --loss-on all"
    )


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _parts(number: int) -> str:
    return (
        f"message {number} has its content in parts, which the chat template does not take: give "
        "one text"
    )


def _shape(message: dict) -> tuple:
    """What a template may look at in a message, but for the words."""
    in_parts, calls = isinstance(message.get("content"), list), message.get("tool_calls")
    return message["role"], "content" in message, in_parts, bool(calls)


def _probe(message: dict, word: str) -> dict:
    """The message with other words."""
    probe = copy.deepcopy(message)
    if probe.get("tool_calls"):
        for call in probe["tool_calls"]:
            call.get("function", call)["name"] = word
    elif isinstance(probe.get("content"), list):
        probe["content"] = [{"type": "text", "text": word}]
    elif "content" in probe:
        probe["content"] = word
    return probe


def _runs(mask: list[int], start: int) -> list[Span]:
    """The spans of ones in a mask, from `start` on."""
    spans, begun = [], None
    for place, marked in enumerate([*mask, 0]):
        if marked and place >= start and begun is None:
            begun = place
        elif not marked and begun is not None:
            spans.append((begun, place))
            begun = None
    return spans
