"""Conversations as text, through a chat template, and which part of the text the assistant says.

A template marks what the assistant says (``{% generation %}``), or TRL knows one like it that does, or renderings are
compared: of the conversation with another text in the place of what a turn says, of what comes before the turn, and of
the conversation that ends with it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from badam.errors import InputError
from badam.training.data.messages import MASKED, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_IN = "\ue000\uf8ff\ue000"
"""Put in the place of a text to see where a template writes it; private characters that no data has."""


class TemplateRefusal(ValueError):
    """A chat template does not take a conversation; the message is the template's own."""


class Unmarked(ValueError):
    """Where the assistant's turns begin and end cannot be told."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template is given."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def until(self, end: int) -> Conversation:
        """Its first ``end`` messages."""
        return replace(self, messages=self.messages[:end])

    def with_message(self, index: int, message: Message) -> Conversation:
        """The same with another message at ``index``."""
        return replace(self, messages=[*self.messages[:index], message, *self.messages[index + 1 :]])


@dataclass(frozen=True, slots=True)
class Turn:
    """What the assistant says in one message, or a part of it: characters ``start`` to ``end`` of the text."""

    message: int
    start: int
    end: int


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: with a template, or several by name.

    Raises:
        InputError: if the template is not valid.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._stops = (special | {tokenizer.eos_token or ""}) - {""}
        self._marking: dict[str, str | None] = {}
        self._in_parts = False
        self._in_parts = self._takes_only_parts()
        self.left_out: Counter[str] = Counter()
        """What of records the template has not written, and in how many of them."""
        self.unstopped = 0
        """Turns of the assistant that end without a special token."""
        self.other_beginnings: Counter[str] = Counter()
        """What an answer that is asked for begins with and the text of the record does not, and in how many turns."""

    def adapted(self, conversation: Conversation) -> Conversation:
        """The conversation in the shape that this template takes.

        Templates differ in whether they take arguments of tool calls as an object or as JSON text, whether they know a
        developer, and whether the assistant may speak first; where it may not, what it says first is left out.

        Raises:
            TemplateRefusal: with the template's message on the conversation as it was.
        """
        if "developer" not in self._source(conversation):
            messages = [_as_system(message) for message in conversation.messages]
            conversation = replace(conversation, messages=messages)
        calls = [call for message in conversation.messages for call in message.get("tool_calls", ())]
        refusal = None
        for candidate in (conversation, _with_text_arguments(conversation)) if calls else (conversation,):
            try:
                text = self.text(candidate)
            except TemplateRefusal as error:
                refusal = refusal or error
            else:
                if candidate is not conversation or not any(_written_by_python(call, text) for call in calls):
                    return candidate
        if refusal is None:
            return conversation
        if (rest := _without_opening(conversation)) is None:
            raise refusal
        try:
            found = self.adapted(rest)
        except TemplateRefusal:
            raise refusal from None
        self.left_out["what the assistant says before the first question"] += 1
        return found

    def text(self, conversation: Conversation, *, marking: bool = False) -> str:
        """The whole conversation.

        Args:
            conversation: see :meth:`adapted`.
            marking: use the template that marks what the assistant says, if there is one.

        Raises:
            TemplateRefusal: with the template's message.
        """
        source = self._source(conversation)
        return self._render(conversation, (self._marking_source(source) or source) if marking else source)

    def prompt(self, conversation: Conversation) -> str:
        """The conversation with the beginning of an answer of the assistant.

        Raises:
            TemplateRefusal: with the template's message.
        """
        return self._render(conversation, self._source(conversation), add_generation_prompt=True)

    def marks(self, conversation: Conversation) -> bool:
        """Whether the template marks what the assistant says, or TRL knows one in its place that does."""
        return self._marking_source(self._source(conversation)) is not None

    def turns(self, conversation: Conversation, text: str) -> list[Turn]:
        """What the assistant says, in order; messages in which it says nothing are left out.

        Args:
            conversation: see :meth:`adapted`.
            text: of it, see :meth:`text` with ``marking``.

        Raises:
            Unmarked: if it cannot be told.
            TemplateRefusal: with the template's message.
        """
        marking = self._marking_source(self._source(conversation))
        if marking is not None:
            turns = self._marked_turns(conversation, marking)
        else:
            compared = [self._compared_turn(conversation, text, index) for index in _assistants(conversation)]
            turns = [turn for turn in compared if turn is not None]
            if any(turn.end > later.start for turn, later in pairwise(turns)):
                raise Unmarked("the chat template writes the assistant's turns in another order")
            self.unstopped += sum(not text[turn.start : turn.end].endswith(tuple(self._stops)) for turn in turns)
        said = {turn.message for turn in turns if self._says_something(text[turn.start : turn.end])}
        return [turn for turn in turns if turn.message in said]

    def begin_of_completion(self, conversation: Conversation, prompt: int, text: str) -> int:
        """The character at which everything after the first ``prompt`` messages begins.

        Raises:
            TemplateRefusal: with the template's message.
        """
        before = self.prompt(conversation.until(prompt))
        other = conversation
        for index in range(prompt, len(conversation.messages)):
            other = other.with_message(index, _standing_in(conversation.messages[index]))
        begin = _alike(before, self._try(other) or text)
        if not text.startswith(before[:begin]):
            begin = _alike(before, text)
        self._note_beginning(before[begin:])
        return begin

    def count_left_out(self, conversation: Conversation) -> None:
        """Count, once for this record, what the template does not write: what can be taken away, and nothing changes.

        Args:
            conversation: see :meth:`adapted`.
        """
        text, found = self.text(conversation), set()
        for index, message in enumerate(conversation.messages):
            role, content = message["role"], message["content"].strip()
            if content and content not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text:
                replaced = self._try(conversation.with_message(index, {**message, "content": _STAND_IN}))
                found.add(
                    ("part of " if replaced and _STAND_IN in replaced else "") + f"the content of {role} messages"
                )
            for key in message.keys() - {"role", "content", "id", MASKED}:
                rest = {name: value for name, value in message.items() if name != key}
                if self._try(conversation.with_message(index, rest)) == text:
                    found.add(f"{key} of {role} messages")
        if conversation.tools and self._try(replace(conversation, tools=None)) == text:
            found.add("tools")
        for key in conversation.arguments:
            rest = {name: value for name, value in conversation.arguments.items() if name != key}
            if self._try(replace(conversation, arguments=rest)) == text:
                found.add(f"{key} of chat_template_kwargs")
        self.left_out.update(found)

    def _says_something(self, turn: str) -> bool:
        """Whether there is more to a turn than its end: one with tool calls that are not written has nothing else."""
        for stop in self._stops:
            turn = turn.replace(stop, "")
        return bool(turn.strip())

    # Where the assistant speaks

    def _marked_turns(self, conversation: Conversation, marking: str) -> list[Turn]:
        spans = self._marked_spans(conversation, marking)
        speakers = _assistants(conversation)
        if not spans:
            raise Unmarked("the marks in the chat template enclose nothing of it")
        if len(spans) == len(speakers):
            return [Turn(message, *span) for message, span in zip(speakers, spans, strict=True)]
        owners: dict[int, int] = {}
        for message in speakers:
            other = conversation.with_message(message, _standing_in(conversation.messages[message]))
            text, changed = self._render(other, marking), self._marked_spans(other, marking)
            if len(changed) == len(spans):
                owners |= {number: message for number, span in enumerate(changed) if _STAND_IN in text[slice(*span)]}
        if not owners:
            raise Unmarked("the marks in the chat template enclose none of the assistant's words")
        # A mark without words, such as one around the token that ends everything, belongs to the words before it.
        first, last = min(owners), owners[min(owners)]
        turns = []
        for number, span in enumerate(spans):
            last = owners.get(number, last)
            turns.append(Turn(last if number >= first else owners[first], *span))
        return turns

    def _marked_spans(self, conversation: Conversation, marking: str) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = self._refusing(
            lambda: render_jinja_template(
                conversations=[self._messages(conversation)],
                tools=conversation.tools,
                chat_template=marking,
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **conversation.arguments},
            )
        )
        return [(start, end) for start, end in spans[0] if start < end]

    def _compared_turn(self, conversation: Conversation, text: str, index: int) -> Turn | None:
        message = conversation.messages[index]
        other = conversation.with_message(index, _standing_in(message))
        changed, ending = self.text(other), self.text(other.until(index + 1))
        if _STAND_IN not in changed:
            return None
        before, after = changed[: changed.index(_STAND_IN)], _after(changed)
        if not text.startswith(before) or not text.endswith(after) or len(before) + len(after) > len(text):
            raise Unmarked("the chat template writes more than a turn differently by what the assistant says in it")
        end = len(text) - len(after) + self._closing(after, _after(ending))
        return Turn(index, self._begin(conversation.until(index), before), end)

    def _closing(self, after: str, ending: str) -> int:
        """How many characters after the words of a turn end it.

        Args:
            after: all that follows the words.
            ending: what follows them where nothing comes after the turn.
        """
        alike = _alike(after, ending)
        stops = [(after.index(stop), len(stop)) for stop in self._stops if stop in after[: alike + len(stop)]]
        begun = [(begin, length) for begin, length in stops if begin < alike]
        return sum(min(begun)) if begun else alike

    def _begin(self, earlier: Conversation, before: str) -> int:
        """The character at which a turn begins: after what opens it, or with its text where nothing is known of that.

        Args:
            earlier: the messages before the turn.
            before: the text before what the turn says.
        """
        if not earlier.messages:
            return len(before)
        base = self._try(earlier)
        try:
            prompt = self.prompt(earlier)
        except TemplateRefusal:
            return len(before)
        if base is None or prompt == base or not before.startswith(base):
            return len(before)
        begin = _alike(prompt, before)
        self._note_beginning(prompt[begin:])
        return begin

    def _note_beginning(self, lacking: str) -> None:
        if lacking.strip():
            self.other_beginnings[lacking] += 1

    # The template

    def _source(self, conversation: Conversation) -> str:
        return str(self._tokenizer.get_chat_template(None, conversation.tools))

    def _marking_source(self, source: str) -> str | None:
        """A template like ``source`` that marks what the assistant says."""
        if source not in self._marking:
            self._marking[source] = self._find_marking(source)
        return self._marking[source]

    def _find_marking(self, source: str) -> str | None:
        from jinja2 import TemplateError
        from trl.chat_template_utils import (
            get_training_chat_template,
            has_generation_markers,
            is_chat_template_stop_token_trained,
        )

        if has_generation_markers(source):
            marking = source
        elif source != self._tokenizer.get_chat_template(None, None):
            return None
        else:
            try:
                marking = get_training_chat_template(self._tokenizer)
            except (ValueError, TypeError, TemplateError):  # TRL knows none, or probes with what this one refuses
                return None
        self.unstopped += not is_chat_template_stop_token_trained(self._tokenizer, chat_template=marking)
        return marking

    def _takes_only_parts(self) -> bool:
        """Whether content has to be a list of parts, as some templates of models that see have it."""
        probe = Conversation([{"role": "user", "content": _STAND_IN}])
        if _STAND_IN in (self._try(probe) or _STAND_IN):
            return False
        self._in_parts = True
        return _STAND_IN in (self._try(probe) or "")

    def _messages(self, conversation: Conversation) -> list[Message]:
        messages = [
            {key: value for key, value in message.items() if key != MASKED} for message in conversation.messages
        ]
        if self._in_parts:
            return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        return messages

    def _try(self, conversation: Conversation) -> str | None:
        try:
            return self.text(conversation)
        except TemplateRefusal:
            return None

    def _render(self, conversation: Conversation, source: str, **options: Any) -> str:
        return str(
            self._refusing(
                lambda: self._tokenizer.apply_chat_template(
                    self._messages(conversation),
                    tools=conversation.tools,
                    chat_template=source,
                    tokenize=False,
                    **{**options, **conversation.arguments},
                )
            )
        )

    def _refusing(self, render: Callable[[], Any]) -> Any:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return render()
        except TemplateSyntaxError as error:
            raise InputError(
                f"The chat template of the tokenizer is not valid: {error.message} in its line {error.lineno}.",
                advice="Mend chat_template in its directory.",
            ) from error
        except ImportError:
            raise
        except Exception as error:  # a template is a program: it fails as it likes
            text = " ".join(str(error).split())
            raise TemplateRefusal(
                text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"
            ) from error


def _assistants(conversation: Conversation) -> list[int]:
    return [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]


def _standing_in(message: Message) -> Message:
    """A message with the stand-in for every text that its speaker has said; of tool calls, for the name.

    What follows the last stand-in of a turn still belongs to it, up to where it ends.
    """
    other = {key: _stand_in_for(key, value) for key, value in message.items()}
    if calls := message.get("tool_calls"):
        other["tool_calls"] = [{**call, "function": {**call["function"], "name": _STAND_IN}} for call in calls]
    return other


def _stand_in_for(key: str, value: Any) -> Any:
    return _STAND_IN if isinstance(value, str) and value.strip() and key not in ("role", "name") else value


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (here, there) in pairs if here != there), min(len(one), len(other)))


def _after(text: str) -> str:
    """What follows the last stand-in."""
    return text.rpartition(_STAND_IN)[2]


def _as_system(message: Message) -> Message:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _with_text_arguments(conversation: Conversation) -> Conversation:
    return replace(conversation, messages=[_arguments_as_text(message) for message in conversation.messages])


def _arguments_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _json_text(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _written_by_python(call: dict[str, Any], text: str) -> bool:
    """Whether the arguments of a tool call stand in the text as Python would print them, which is no JSON."""
    arguments = call["function"]["arguments"]
    return bool(arguments) and isinstance(arguments, dict) and repr(arguments) in text


def _without_opening(conversation: Conversation) -> Conversation | None:
    """The conversation without what the assistant says before anyone else does."""
    begin = next((index for index, message in enumerate(conversation.messages) if message["role"] != "system"), 0)
    later = begin
    while later < len(conversation.messages) and conversation.messages[later]["role"] == "assistant":
        later += 1
    if later == begin:
        return None
    return replace(conversation, messages=[*conversation.messages[:begin], *conversation.messages[later:]])
