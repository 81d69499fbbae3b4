"""The record formats that training data comes in, and what each becomes for TRL's trainer. No torch.

TRL knows three: ``prompt`` and ``completion`` (text, or chat messages where the tokenizer has a chat template),
``messages`` and ``text``. The loss is taken over completions and, in ``messages``, over what the assistant says.
A classification has ``text``, possibly ``pair``, and ``label`` as text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from badam.errors import DataError

Kind = Literal["prompt-completion", "messages", "text", "classes"]
Row = Mapping[str, Any]
SftRow = dict[str, Any]

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Names of speakers in ShareGPT and chat records, and the role each is."""


@dataclass(frozen=True, slots=True)
class Format:
    """One record format: the columns that it is recognized by, and how a row becomes a TRL row.

    ``convert`` takes a row and whether prompts are chat messages; it returns None for a row with nothing to learn
    from, and raises ``ValueError`` saying what is wrong with the row.
    """

    name: str
    needed: tuple[str, ...]
    kind: Kind
    convert: Callable[[Row, bool], SftRow | None]
    optional: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return self.needed + self.optional


def detect(columns: Collection[str], *, source: str, classes: bool = False) -> Format:
    """The format of data with these columns, for a language model or for a classification.

    Raises:
        DataError: if no format can be read from them; names the columns found and those that would do.
    """
    formats = CLASS_FORMATS if classes else FORMATS
    for known in formats:
        if set(known.needed) <= set(columns):
            return known
    choices = "; ".join(f"{' + '.join(known.needed)} ({known.name})" for known in formats)
    raise DataError(
        f"{source} has the columns {', '.join(sorted(columns)) or '(none)'}; none of the known formats fits.",
        advice=f"These would do: {choices}. Name others with --column, such as --column completion=answer.",
    )


def _from_messages(row: Row, _chat: bool) -> SftRow | None:
    return _conversation(row["messages"], "messages")


def _from_sharegpt(row: Row, _chat: bool) -> SftRow | None:
    return _conversation(row["conversations"], "conversations")


def _from_prompt_completion(row: Row, chat: bool) -> SftRow | None:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return {"prompt": _messages(prompt, "prompt"), "completion": _messages(completion, "completion")}
    return _pair(_text(row, "prompt"), _text(row, "completion"), chat)


def _from_alpaca(row: Row, chat: bool) -> SftRow | None:
    instruction, context = _text(row, "instruction"), _text(row, "input", default="")
    if chat:
        return _pair("\n\n".join(part for part in (instruction, context) if part), _text(row, "output"), chat)
    parts = [("Instruction", instruction), ("Input", context), ("Response", "")]
    prompt = "\n\n".join(f"### {title}:\n{body}" for title, body in parts if body or title == "Response")
    return _pair(prompt, _text(row, "output"), chat)


def _from_text(row: Row, _chat: bool) -> SftRow | None:
    text = _text(row, "text")
    return {"text": text} if text.strip() else None


FORMATS = (
    Format("chat messages", ("messages",), "messages", _from_messages),
    Format("ShareGPT", ("conversations",), "messages", _from_sharegpt),
    Format("prompt/completion", ("prompt", "completion"), "prompt-completion", _from_prompt_completion),
    Format("alpaca", ("instruction", "output"), "prompt-completion", _from_alpaca, optional=("input",)),
    Format("plain text", ("text",), "text", _from_text),
)


def _classes(name: str, text: str, pair: str | None = None, *needed: str, optional: tuple[str, ...] = ()) -> Format:
    """A format of a classification: templates of its text and of the text that it is to be seen with."""
    columns = (*needed, "label")

    def convert(row: Row, _chat: bool) -> SftRow | None:
        values = {column: _text(row, column, default="") if column in optional else _text(row, column)
                  for column in (*needed, *optional)}  # fmt: skip
        label = _label(row["label"])
        if label is None:
            return None
        texts = {"text": text, "pair": pair}
        return {key: shape.format(**values).strip() for key, shape in texts.items() if shape} | {"label": label}

    return Format(name, columns, "classes", convert, optional)


def _label(value: Any) -> str | None:
    """A class as text; None for -1, which stands for an example that nobody has labelled."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return None if value == -1 else str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"label is {_short(value)}, not the number or name of a class")
    return value


CLASS_FORMATS = (
    _classes("MultiRC", "{paragraph}", "{question} {answer}", "paragraph", "question", "answer"),
    _classes("COPA", "{premise} {question}?", "{choice1} / {choice2}", "premise", "choice1", "choice2", "question"),
    _classes("WSC", "{text}", "{span2_text}: {span1_text}", "text", "span1_text", "span2_text"),
    _classes("WiC", "{word}: {sentence1}", "{sentence2}", "word", "sentence1", "sentence2"),
    _classes("BoolQ", "{question}", "{passage}", "question", "passage"),
    _classes("premise and hypothesis", "{premise}", "{hypothesis}", "premise", "hypothesis"),
    _classes("two sentences", "{sentence1}", "{sentence2}", "sentence1", "sentence2"),
    _classes("question and sentence", "{question}", "{sentence}", "question", "sentence"),
    _classes("two texts", "{text}", "{pair}", "text", "pair"),
    _classes("sentence", "{sentence}", None, "sentence"),
    _classes("text", "{text}", None, "text"),
)
"""The schemas of SuperGLUE and GLUE, each made into one text or two."""


def _pair(prompt: str, completion: str, chat: bool) -> SftRow | None:
    if not completion.strip():
        return None
    if not chat:
        return {"prompt": prompt, "completion": completion}
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def _conversation(turns: Any, column: str) -> SftRow | None:
    messages = _messages(turns, column)
    return {"messages": messages} if any(message["role"] == "assistant" for message in messages) else None


def _messages(turns: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(turns, list):
        raise ValueError(f"{column} is {_short(turns)}, not a list of messages")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"message {number} in {column} is {_short(turn)}, not an object")
        speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = ROLES.get(str(speaker).lower())
        if role is None:
            raise ValueError(f"message {number} in {column} has the role {_short(speaker)}; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {number} in {column} has the content {_short(content)}, not text")
        messages.append({"role": role, "content": content})
    return messages


def _text(row: Row, column: str, *, default: str | None = None) -> str:
    value = row.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"{column} is {_short(value)}, not text")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
