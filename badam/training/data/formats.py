"""The record formats that training data comes in, and what each becomes. No torch.

A record of a language model has ``prompt`` and ``completion`` (both text, or both messages where the tokenizer has a
chat template), ``messages`` or ``text``; with messages also ``tools`` and ``chat_template_kwargs`` if there are some.
A classification has ``text``, possibly ``pair``, and ``label`` as text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from badam.errors import DataError
from badam.training.data.messages import MASKED, Message, messages_of, says_something, short, tools_of

Kind = Literal["prompt-completion", "messages", "text", "classes"]
Row = Mapping[str, Any]
SftRow = dict[str, Any]


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
    return _conversation(row, "messages")


def _from_sharegpt(row: Row, _chat: bool) -> SftRow | None:
    return _conversation(row, "conversations")


def _from_prompt_completion(row: Row, chat: bool) -> SftRow | None:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        asked, said = _turns(prompt, "prompt", "user"), _turns(completion, "completion", "assistant")
        return _answered([*_system(row, asked), *asked], said, row)
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    if chat:
        return _asked(row, prompt, completion)
    return {"prompt": prompt, "completion": completion} if completion.strip() else None


def _from_alpaca(row: Row, chat: bool) -> SftRow | None:
    instruction, context = _text(row, "instruction"), _text(row, "input", default="")
    output = _text(row, "output")
    if chat:
        return _asked(row, "\n\n".join(part for part in (instruction, context) if part), output)
    if not output.strip():
        return None
    parts = [("System", _text(row, "system", default=""))]
    for question, answer in _history(row):
        parts += [("Instruction", question), ("Response", answer)]
    parts += [("Instruction", instruction), ("Input", context)]
    headed = [f"### {title}:\n{body}" for title, body in parts if body]
    return {"prompt": "\n\n".join([*headed, "### Response:\n"]), "completion": output}


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
        raise ValueError(f"label is {short(value)}, not the number or name of a class")
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


def _asked(row: Row, question: str, answer: str) -> SftRow | None:
    """A question and its answer as messages, after what was said before."""
    asked: list[Message] = []
    for earlier, reply in _history(row):
        asked += [{"role": "user", "content": earlier}, {"role": "assistant", "content": reply}]
    asked.append({"role": "user", "content": question})
    return _answered([*_system(row, asked), *asked], [{"role": "assistant", "content": answer}], row)


def _answered(prompt: list[Message], completion: list[Message], row: Row) -> SftRow | None:
    if not _learns(completion):
        return None
    return {"prompt": prompt, "completion": completion, **_for_the_template(row)}


def _conversation(row: Row, column: str) -> SftRow | None:
    messages = messages_of(row[column], column)
    messages = [*_system(row, messages), *messages]
    return {"messages": messages, **_for_the_template(row)} if _learns(messages) else None


def _learns(messages: list[Message]) -> bool:
    return any(
        message["role"] == "assistant" and message.get(MASKED) != 0 and says_something(message) for message in messages
    )


def _turns(value: Any, column: str, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else messages_of(value, column)


def _system(row: Row, messages: list[Message]) -> list[Message]:
    """The system message that stands in a column of its own."""
    text = _text(row, "system", default="") or _text(row, "system_prompt", default="")
    if not text:
        return []
    if messages and messages[0]["role"] == "system":
        raise ValueError("there is a system message in a column of its own and another one among the messages")
    return [{"role": "system", "content": text}]


def _history(row: Row) -> list[tuple[str, str]]:
    """Questions and answers that came before."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in history
    ):
        raise ValueError(f"history is {short(history)}, not a list of pairs of question and answer")
    return [(question, answer) for question, answer in history]


def _for_the_template(row: Row) -> SftRow:
    """What templates take besides messages."""
    found: SftRow = {}
    if tools := tools_of(row.get("tools") or row.get("functions")):
        found["tools"] = tools
    if arguments := row.get("chat_template_kwargs"):
        if not isinstance(arguments, Mapping):
            raise ValueError(f"chat_template_kwargs is {short(arguments)}, not an object")
        found["chat_template_kwargs"] = dict(arguments)
    return found


def _text(row: Row, column: str, *, default: str | None = None) -> str:
    value = row.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"{column} is {short(value)}, not text")
    return value
