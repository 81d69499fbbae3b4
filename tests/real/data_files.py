"""Small data files in the formats that people use, and what each must end in.

Every file asks for sums; its layout is one that the tools around training write or read: OpenAI's fine-tuning files,
LLaMA-Factory's alpaca and ShareGPT with system, history and tools, axolotl's and ms-swift's marks of turns that are not
learned, vLLM's and the Hub's reasoning, spreadsheets, PowerShell's UTF-16.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow
import pyarrow.parquet

Rows = list[dict[str, Any]]
SUMS = [(41, 21), (9, 51), (93, 5), (59, 29), (30, 82), (26, 97)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A file and its outcome.

    ``learned`` is what is learned of its first record, ``notes`` what is said of it (parts of sentences), ``says`` the
    sentence with which it is refused, in the place of all that. ``{path}`` in it is the file.
    """

    name: str
    content: bytes
    options: dict[str, Any] = field(default_factory=dict)
    template: str | None = "thinks_last"
    records: int = len(SUMS)
    learned: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    says: str | None = None


def _rows(make: Callable[[int, int], dict[str, Any]]) -> Rows:
    return [make(one, other) for one, other in SUMS]


def _lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(rows: Rows) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def ask(one: int, other: int) -> str:
    return f"Add {one} and {other}."


def _user(one: int, other: int) -> dict[str, Any]:
    return {"role": "user", "content": ask(one, other)}


def _said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _chat(one: int, other: int, **more: Any) -> dict[str, Any]:
    return {"messages": [_user(one, other), _said(str(one + other))], **more}


def _call(one: int, other: int, *, as_text: bool = False) -> dict[str, Any]:
    arguments: Any = {"a": one, "b": other}
    arguments = json.dumps(arguments) if as_text else arguments
    return {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": arguments}}


def _function(name: str = "add") -> dict[str, Any]:
    number = {"type": "integer"}
    return {"name": name, "parameters": {"type": "object", "properties": {"a": number, "b": number}}}


EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
STOP = "<|im_end|>"
ANSWER = f"{EMPTY_THOUGHT}62{STOP}"
CALLED = '\n<tool_call>\n{"name": "add", "arguments": {"a": 41, "b": 21}}\n</tool_call>'
NESTED = _rows(lambda a, b: {"prompt": ask(a, b), "completion": str(a + b)})

CASES = [
    Case(
        name="pairs.jsonl",
        content=_lines(_rows(lambda a, b: {"prompt": ask(a, b), "completion": str(a + b)})),
        learned=(f"{EMPTY_THOUGHT}62{STOP}\n",),
    ),
    Case(
        name="pairs-with-other-names.jsonl",
        content=_lines(_rows(lambda a, b: {"question": ask(a, b), "answer": str(a + b), "source": "sums"})),
        options={"columns": {"prompt": "question", "completion": "answer"}},
        learned=(f"{EMPTY_THOUGHT}62{STOP}\n",),
        notes=("columns that are not used: source (6 records)",),
    ),
    Case(
        name="pairs-of-messages.jsonl",
        content=_lines(_rows(lambda a, b: {"prompt": [_user(a, b)], "completion": [_said(str(a + b))]})),
        learned=(f"{EMPTY_THOUGHT}62{STOP}\n",),
    ),
    Case(
        name="pairs-for-a-base-model.jsonl",
        content=_lines(_rows(lambda a, b: {"prompt": f"{a} + {b} = ", "completion": str(a + b)})),
        template=None,
        learned=("62<|end|>",),
    ),
    Case(
        name="alpaca.json",
        content=json.dumps(
            _rows(lambda a, b: {"instruction": "Add.", "input": f"{a} and {b}", "output": str(a + b), "text": "whole"})
        ).encode(),
        learned=(f"{EMPTY_THOUGHT}62{STOP}\n",),
        notes=("columns that are not used: text (6 records)",),
    ),
    Case(
        name="alpaca-with-system-and-history.jsonl",
        content=_lines(
            _rows(
                lambda a, b: {
                    "instruction": "And triple it.",
                    "input": "",
                    "output": str(3 * (a + b)),
                    "system": "You are a calculator.",
                    "history": [[ask(a, b), str(a + b)]],
                }
            )
        ),
        learned=(f"{EMPTY_THOUGHT}186{STOP}\n",),
    ),
    Case(
        name="alpaca-with-history-all-of-it-learned.jsonl",
        content=_lines(
            _rows(
                lambda a, b: {
                    "instruction": "And triple it.",
                    "output": str(3 * (a + b)),
                    "history": [[ask(a, b), str(a + b)]],
                }
            )
        ),
        options={"loss_on": "assistant"},
        learned=(f"62{STOP}", f"{EMPTY_THOUGHT}186{STOP}"),
    ),
    Case(
        name="sharegpt.json",
        content=json.dumps(
            _rows(
                lambda a, b: {
                    "id": f"{a}",
                    "conversations": [
                        {"from": "human", "value": ask(a, b)},
                        {"from": "gpt", "value": str(a + b)},
                    ],
                }
            ),
            indent=1,
        ).encode(),
        learned=(ANSWER,),
        notes=("columns that are not used: id (6 records)",),
    ),
    Case(
        name="sharegpt-with-system-and-tools.jsonl",
        content=_lines(
            _rows(
                lambda a, b: {
                    "conversations": [
                        {"from": "human", "value": ask(a, b)},
                        {"from": "function_call", "value": json.dumps(_call(a, b)["function"])},
                        {"from": "observation", "value": str(a + b)},
                        {"from": "gpt", "value": f"It is {a + b}."},
                    ],
                    "system": "You are a calculator.",
                    "tools": json.dumps([_function()]),
                }
            )
        ),
        learned=(f"{CALLED}{STOP}", f"{EMPTY_THOUGHT}It is 62.{STOP}"),
    ),
    Case(
        name="sharegpt-that-the-assistant-begins.jsonl",
        content=_lines(
            _rows(
                lambda a, b: {
                    "conversations": [
                        {"from": "gpt", "value": "How can I help?"},
                        {"from": "human", "value": ask(a, b)},
                        {"from": "gpt", "value": str(a + b)},
                    ]
                }
            )
        ),
        learned=(f"How can I help?{STOP}", ANSWER),
    ),
    Case(
        name="the-assistant-begins-where-it-may-not.jsonl",
        content=_lines(
            _rows(
                lambda a, b: {
                    "conversations": [
                        {"from": "gpt", "value": "How can I help?"},
                        {"from": "human", "value": ask(a, b)},
                        {"from": "gpt", "value": str(a + b)},
                    ]
                }
            )
        ),
        template="instructions",
        learned=("62 <|end|>",),
        notes=("what the assistant says before the first question (6 records)",),
    ),
    Case(
        name="messages-with-a-system-role-that-is-refused.jsonl",
        content=_lines(
            _rows(lambda a, b: {"messages": [{"role": "system", "content": "Terse."}, *_chat(a, b)["messages"]]})
        ),
        template="no_system",
        says="{path}, line 1: the chat template refuses this record: System role not supported.",
    ),
    Case(
        name="messages-some-of-which-are-refused.jsonl",
        content=_lines(
            [
                {"messages": [_user(1, 2), *_chat(1, 2)["messages"]]},
                *_rows(_chat),
                {"messages": [{"role": "robot", "content": "beep"}]},
                {"prompt": "no messages"},
            ]
        )
        + b"{not json\n",
        template="instructions",
        options={"on_bad_row": "skip"},
        learned=("62 <|end|>",),
        notes=(
            "3 records were left out with --on-bad-row skip; the first: {path}, line 8: message 1 in messages has",
            "1 record was left out with --on-bad-row skip; the first: {path}, line 1: the chat template refuses",
        ),
    ),
    Case(
        name="messages-with-tool-calls.jsonl",
        content=_lines(
            _rows(
                lambda a, b: {
                    "messages": [
                        _user(a, b),
                        _said(None, tool_calls=[_call(a, b, as_text=True)]),
                        {"role": "tool", "tool_call_id": "call_1", "content": str(a + b)},
                        _said(f"It is {a + b}."),
                    ],
                    "tools": [{"type": "function", "function": _function()}],
                    "parallel_tool_calls": False,
                }
            )
        ),
        learned=(f"{CALLED}{STOP}", f"{EMPTY_THOUGHT}It is 62.{STOP}"),
        notes=(
            "columns that are not used: parallel_tool_calls (6 records)",
            "tool_call_id of tool messages (6 records)",
        ),
    ),
    Case(
        name="messages-that-end-with-a-tool-call.jsonl",
        content=_lines(_rows(lambda a, b: {"messages": [_user(a, b), _said("", tool_calls=[_call(a, b)])]})),
        learned=(f"{EMPTY_THOUGHT}{CALLED}{STOP}",),
    ),
    Case(
        name="tool-calls-that-the-template-does-not-write.jsonl",
        content=_lines(_rows(lambda a, b: {"messages": [_user(a, b), _said("", tool_calls=[_call(a, b)])]})),
        template="plain",
        says="has tokens to learn from",
    ),
    Case(
        name="messages-with-function-calls-of-the-old-kind.jsonl",
        content=_lines(
            _rows(
                lambda a, b: {
                    "messages": [
                        _user(a, b),
                        _said(None, function_call=_call(a, b, as_text=True)["function"]),
                        {"role": "function", "name": "add", "content": str(a + b)},
                        _said(f"It is {a + b}."),
                    ],
                    "functions": [_function()],
                }
            )
        ),
        learned=(f"{CALLED}{STOP}", f"{EMPTY_THOUGHT}It is 62.{STOP}"),
        notes=("name of tool messages (6 records)",),
    ),
    Case(
        name="messages-with-reasoning.jsonl",
        content=_lines(
            _rows(lambda a, b: {"messages": [_user(a, b), _said(str(a + b), reasoning_content=f"{a} plus {b}")]})
        ),
        learned=(f"<think>\n41 plus 21\n</think>\n\n62{STOP}",),
    ),
    Case(
        name="messages-with-thinking-in-parts.jsonl",
        content=_lines(
            _rows(
                lambda a, b: {
                    "messages": [
                        _user(a, b),
                        _said(
                            [{"type": "thinking", "thinking": f"{a} plus {b}"}, {"type": "text", "text": f"{a + b}"}]
                        ),
                    ]
                }
            )
        ),
        learned=(f"<think>\n41 plus 21\n</think>\n\n62{STOP}",),
    ),
    Case(
        name="reasoning-that-the-template-does-not-write.jsonl",
        content=_lines(_rows(lambda a, b: {"messages": [_user(a, b), _said(str(a + b), reasoning_content="so")]})),
        template="plain",
        learned=(f"62{STOP}",),
        notes=("not written by the chat template, so not learned from: reasoning_content of assistant messages (6 ",),
    ),
    Case(
        name="messages-with-weights.jsonl",
        content=_lines(
            _rows(
                lambda a, b: {
                    "messages": [
                        _user(a, b),
                        _said("I do not know.", weight=0),
                        {"role": "user", "content": "Try."},
                        _said(str(a + b), weight=1),
                    ]
                }
            )
        ),
        learned=(ANSWER,),
    ),
    Case(
        name="messages-with-turns-that-are-not-trained.jsonl",
        content=_lines(
            _rows(
                lambda a, b: {
                    "messages": [
                        _user(a, b),
                        _said("No.", train=False),
                        {"role": "user", "content": "Try."},
                        _said(str(a + b)),
                    ]
                }
            )
        ),
        template="marked",
        learned=(f"62{STOP}",),
    ),
    Case(
        name="messages-with-names.jsonl",
        content=_lines(_rows(lambda a, b: {"messages": [{**_user(a, b), "name": "Ada"}, _said(str(a + b))]})),
        template=None,
        learned=("62<|end|>",),
    ),
    Case(
        name="messages-in-parts.jsonl",
        content=_lines(
            _rows(
                lambda a, b: {
                    "messages": [
                        {
                            "role": "user",
                            "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": f"{a} {b}"}],
                        },
                        _said([{"type": "text", "text": str(a + b)}]),
                    ]
                }
            )
        ),
        learned=(ANSWER,),
    ),
    Case(
        name="messages-with-pictures.jsonl",
        content=_lines(
            [
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]},
                        _said("62"),
                    ]
                }
            ]
        ),
        says="{path}, line 1: message 1 in messages has a part .*image_url.*; badam-train trains on text",
    ),
    Case(
        name="nested.json",
        content=json.dumps({"train": NESTED, "test": NESTED[:2]}, indent=1).encode(),
        says=r"{path} is one object; its lists of records: train \(6\), test \(2\). Name the list: --records train",
    ),
    Case(
        name="nested-in-one-line.json",
        content=json.dumps({"version": "1.0", "data": NESTED}).encode(),
        says=r"is one object; its lists of records: data \(6\). Name the list: --records data",
    ),
    Case(
        name="nested-and-named.json",
        content=json.dumps({"about": {"rows": 6}, "splits": {"train": NESTED}}, indent=1).encode(),
        options={"records": "splits.train"},
        learned=(f"{EMPTY_THOUGHT}62{STOP}\n",),
    ),
    Case(
        name="with-a-mark.json",
        content=b"\xef\xbb\xbf" + json.dumps(NESTED).encode(),
        learned=(f"{EMPTY_THOUGHT}62{STOP}\n",),
    ),
    Case(
        name="utf-16.jsonl",
        content=_lines(NESTED).decode().encode("utf-16"),
        learned=(f"{EMPTY_THOUGHT}62{STOP}\n",),
    ),
    Case(
        name="utf-16-without-a-mark.jsonl",
        content=_lines(NESTED).decode().encode("utf-16-le"),
        says="{path} has zero bytes, as UTF-16 text without a mark .* iconv -f utf-16le",
    ),
    Case(
        name="latin-1.jsonl",
        content='{"text": "café"}\n'.encode("latin-1"),
        says="{path} is not UTF-8 text: byte 13 is 0xe9",
    ),
    Case(
        name="not-a-number.json",
        content=json.dumps([{**row, "score": float("nan")} for row in NESTED]).encode(),
        learned=(f"{EMPTY_THOUGHT}62{STOP}\n",),
        notes=("columns that are not used: score (6 records)",),
    ),
    Case(
        name="half-a-character.jsonl",
        content=b'{"prompt": "Add.", "completion": "\\ud83d"}\n',
        says="{path}, line 1: the record has text that is no Unicode",
    ),
    Case(
        name="spreadsheet.csv",
        content=("prompt,completion\r\n" + "".join(f'"Add {a}, {b}",{a + b}\r\n' for a, b in SUMS)).encode(),
        learned=(f"{EMPTY_THOUGHT}62{STOP}\n",),
    ),
    Case(
        name="spreadsheet-with-semicolons.csv",
        content=("\ufeffprompt;completion\n" + "".join(f"Add {a}, {b};{a + b}\n" for a, b in SUMS)).encode(),
        learned=(f"{EMPTY_THOUGHT}62{STOP}\n",),
    ),
    Case(
        name="chat.parquet",
        content=_parquet(
            _rows(
                lambda a, b: {
                    "messages": [
                        _user(a, b),
                        _said("", tool_calls=[_call(a, b)]),
                        {"role": "tool", "content": str(a + b)},
                        _said(f"It is {a + b}."),
                    ]
                }
            )
        ),
        learned=(f"{CALLED}{STOP}", f"{EMPTY_THOUGHT}It is 62.{STOP}"),
    ),
    Case(
        name="stories.txt",
        content="\n\n".join(f"Once there were {a} apples\nand {b} pears." for a, b in SUMS).encode(),
        learned=("Once there were 41 apples\nand 21 pears.<|end|>",),
    ),
    Case(
        name="stories-of-which-the-answer-is-wanted.jsonl",
        content=_lines([{"text": "Once."}]),
        options={"loss_on": "completion"},
        says="--loss-on completion needs conversations or prompts; {path}, line 1 is plain text",
    ),
    Case(
        name="preferences.jsonl",
        content=_lines(_rows(lambda a, b: {"prompt": ask(a, b), "chosen": str(a + b), "rejected": "0"})),
        says="{path}, line 1 has the columns chosen, prompt, rejected; none of the known formats fits.*--column",
    ),
]
