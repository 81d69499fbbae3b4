"""Conversations in the shapes that people write them, as the messages that chat templates take. No torch.

A message has a ``role``, a ``content`` that is text, and what else it came with (``name``, ``reasoning_content``,
``tool_calls`` …), which templates may use. :data:`MASKED` marks one that is not learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "ipython",
}
"""Names of speakers in chat and ShareGPT records, and the role each is."""

MASKED = "weight"
"""Key of a message whose value 0 leaves it out of the loss; no template sees it."""

_MASKS = ("weight", "train", "training", "loss")
_THOUGHTS = ("thinking", "reasoning")
_NAMES = {"from", "value", "role", "content", "function_call", *_MASKS}


def messages_of(turns: Any, column: str) -> list[Message]:
    """The messages of a conversation.

    Args:
        turns: objects with ``role`` and ``content``, or ``from`` and ``value``; or the same as JSON text.
        column: that they stand in, for errors.

    Raises:
        ValueError: saying which message is wrong, and how.
    """
    turns = _parsed(turns)
    if not isinstance(turns, list):
        raise ValueError(f"{column} is {short(turns)}, not a list of messages")
    messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"message {number} in {column}"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{where} is {short(turn)}, not an object")
        messages.append(_message(turn, where))
    return messages


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """Descriptions of functions, each within ``{"type": "function", "function": …}``; None if there are none.

    Args:
        value: a list of them, wrapped or not, or the same as JSON text.

    Raises:
        ValueError: if it is something else.
    """
    tools = _parsed(value)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools is {short(value)}, not a list of functions")
    return [
        {"type": "function", "function": dict(tool)} if "name" in tool and "function" not in tool else dict(tool)
        for tool in tools
    ]


def says_something(message: Message) -> bool:
    """Whether there is anything to learn from a message."""
    return bool(message["content"].strip()) or says_more(message)


def says_more(message: Message) -> bool:
    """Whether a message has thoughts or tool calls, besides its content or in its place."""
    return any(message.get(key) for key in ("tool_calls", "reasoning_content", *_THOUGHTS))


def short(value: Any) -> str:
    """A value as part of a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _message(turn: Mapping[str, Any], where: str) -> Message:
    speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    speaker = str(speaker).lower()
    role = ROLES.get(speaker)
    if role is None:
        known = ", ".join(ROLES)
        raise ValueError(f"{where} has the role {short(turn.get('role', turn.get('from')))}; known: {known}")
    message: Message = {"role": role, "content": ""}
    message |= {key: value for key, value in turn.items() if key not in _NAMES and value is not None}
    if speaker == "function_call":
        message["tool_calls"] = _parsed(content)
        content = ""
    elif turn.get("function_call"):
        message["tool_calls"] = [turn["function_call"]]
    if "tool_calls" in message:
        calls = _tool_calls(message.pop("tool_calls"), where)
        message |= {"tool_calls": calls} if calls else {}
    if isinstance(content, list):
        content = _joined(content, message, where)
    if content is None and says_more(message):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{where} has the content {short(content)}, not text")
    message["content"] = content
    if _masked(turn, where):
        message[MASKED] = 0
    return message


def _joined(parts: list[Any], message: Message, where: str) -> str:
    """The text of content in parts; thoughts among them become the message's ``reasoning_content``."""
    texts, thoughts = [], []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind in _THOUGHTS:
            thoughts.append(part.get(kind, part.get("text")))
        elif kind == "text":
            texts.append(part.get("text"))
        else:
            raise ValueError(f"{where} has a part {short(part)}; badam-train trains on text")
    if not all(isinstance(text, str) for text in (*texts, *thoughts)):
        raise ValueError(f"{where} has a part without text")
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    return "".join(texts)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = _parsed(value)
    if isinstance(calls, Mapping):
        calls = [calls]
    if calls is None:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"{where} has the tool calls {short(value)}, not a list of calls")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} has the tool call {short(call)}, which names no function")
    arguments = _parsed(function.get("arguments", {}))
    named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    besides = {key: value for key, value in call.items() if key not in ("function", "name", "arguments", "type")}
    return {**besides, "type": "function", "function": named}


def _masked(turn: Mapping[str, Any], where: str) -> bool:
    """Whether a turn says that it is not to be learned."""
    masked = False
    for key in _MASKS:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):  # also False and True
            raise ValueError(f"{where} has the {key} {short(value)}; known: 0 and 1, or false and true")
        masked |= not value
    return masked


def _parsed(value: Any) -> Any:
    """What JSON text stands for; any other value, and text that is no JSON, as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return None if isinstance(value, str) and not value.strip() else value
