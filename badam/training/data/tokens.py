"""Records as tokens, with labels where there is something to learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy

from badam.errors import DataError, InputError
from badam.training.data.bad_rows import BadRows
from badam.training.data.chat import ChatTemplate, Conversation, TemplateRefusal, Turn, Unmarked
from badam.training.data.messages import MASKED
from badam.training.losses import IGNORE_INDEX
from badam.vocabulary import LossOn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

BATCH_ROWS = 256
"""Records that are tokenized at a time, on all threads of the tokenizer."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of a record, and which characters of it are learned."""

    text: str
    learned: Sequence[Span]
    place: str
    special: bool  # whether the tokenizer adds its own tokens at the beginning and the end


class Labeller:
    """Makes ``input_ids`` and ``labels`` of records.

    Args:
        tokenizer: of the model, with a chat template if there are conversations.
        loss_on: what is learned: what the ``assistant`` says in any turn, the ``completion`` (in conversations its
            last turn), or ``all``. None is the completion where there is a prompt, else what the assistant says
            as far as that can be told.
        rows: of the model's embedding: no token may have an id beyond.
        bad: what happens to records that the chat template or the model does not take.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, loss_on: LossOn | None, rows: int, bad: BadRows) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._rows = rows
        self._bad = bad
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self._compared = 0
        self._unmarked: list[str] = []
        self.empty = 0
        """Records with nothing to learn."""

    def __call__(self, records: Iterable[tuple[Mapping[str, Any], str]]) -> Iterator[dict[str, list[int]]]:
        """Tokens and labels of records, which come with the place that errors name.

        Raises:
            DataError: for a record that cannot be trained on, if such are refused.
            InputError: if the data has nothing of what is to be learned.
        """
        pieces = (piece for record, place in records if (piece := self._piece(record, place)) is not None)
        while batch := list(islice(pieces, BATCH_ROWS)):
            for special, alike in groupby(batch, key=lambda piece: piece.special):
                yield from self._tokenized(list(alike), special)

    @property
    def notes(self) -> list[str]:
        """What the user should know of the records so far."""
        notes = []
        template = self._template
        if self._compared:
            notes.append(
                "the chat template does not mark what the assistant says; it was found by comparing what the template "
                f"writes ({self._compared:,} records)"
            )
        if self._unmarked:
            notes.append(
                "warning: what the assistant says cannot be told from the rest, so the loss is over all of it "
                f"({len(self._unmarked):,} records; {self._unmarked[0]}); --loss-on assistant refuses these"
            )
        if template is not None and template.left_out:
            counts = ", ".join(f"{what} ({count:,} records)" for what, count in template.left_out.most_common())
            notes.append(f"not written by the chat template, so not learned from: {counts}")
        if template is not None and template.other_beginnings:
            (lacking, count), *_ = template.other_beginnings.most_common(1)
            notes.append(
                f"when the model is asked, the chat template begins its answer with {lacking!r}; the text of {count:,} "
                "turns here has no such beginning"
            )
        if template is not None and template.unstopped:
            notes.append(
                "warning: the chat template does not end what the assistant says with a token that stops it, so the "
                "model may not learn to stop"
            )
        return notes

    # From a record to its text

    def _piece(self, record: Mapping[str, Any], place: str) -> Piece | None:
        try:
            if "messages" in record or not isinstance(record.get("prompt", ""), str):
                return self._conversation(record, place)
            return self._plain(record, place)
        except TemplateRefusal as error:
            given = (
                "Give what is missing as chat_template_kwargs of the record"
                if "undefined" in str(error)
                else ("Mend the record")
            )
            self._bad.meet(
                DataError(
                    f"{place}: the chat template refuses this record: {_as_sentence(error)}",
                    advice=f"{given}, or leave such records out with --on-bad-row skip.",
                )
            )
        except Unmarked as error:
            self._bad.meet(
                DataError(
                    f"{place}: what the assistant says cannot be told from the rest: {error}.",
                    advice="Learn everything with --loss-on all, or leave such records out with --on-bad-row skip.",
                )
            )
        return None

    def _plain(self, record: Mapping[str, Any], place: str) -> Piece:
        end = str(self._tokenizer.eos_token or "")
        if "text" in record:
            if self._loss_on in ("assistant", "completion"):
                raise InputError(
                    f"--loss-on {self._loss_on} needs conversations or prompts; {place} is plain text.",
                    advice="Leave --loss-on out.",
                )
            text = _ended(record["text"], end)
            return Piece(text, [(0, len(text))], place, special=True)
        if self._loss_on == "assistant":
            raise InputError(
                f"--loss-on assistant needs conversations; {place} is a prompt with its completion.",
                advice="Give --loss-on completion.",
            )
        begin = 0 if self._loss_on == "all" else len(record["prompt"])
        text = record["prompt"] + _ended(record["completion"], end)
        return Piece(text, [(begin, len(text))], place, special=True)

    def _conversation(self, record: Mapping[str, Any], place: str) -> Piece:
        template = self._template
        assert template is not None, "a tokenizer without a chat template was given one for conversations"
        messages = record["messages"] if "messages" in record else [*record["prompt"], *record["completion"]]
        given = Conversation(messages, record.get("tools"), record.get("chat_template_kwargs", {}))
        conversation = template.adapted(given)
        template.count_left_out(conversation)
        masked = any(message.get(MASKED) == 0 for message in conversation.messages)
        prompt = 0
        if "prompt" in record and self._loss_on in (None, "completion"):
            prompt = len(record["prompt"]) - (len(messages) - len(conversation.messages))
        if prompt and not masked:
            text = template.text(conversation)
            return Piece(text, [(template.begin_of_completion(conversation, prompt, text), len(text))], place, False)
        if self._loss_on == "all" and not masked:
            text = template.text(conversation)
            return Piece(text, [(0, len(text))], place, special=False)
        text = template.text(conversation, marking=True)
        try:
            turns = template.turns(conversation, text)
        except Unmarked as error:
            if self._loss_on is not None or masked:
                raise
            self._unmarked.append(f"{place}: {error}")
            return Piece(text, [(0, len(text))], place, special=False)
        self._compared += not template.marks(conversation)
        completion = [turn for turn in turns if turn.message >= prompt]
        return Piece(text, self._learned(completion, conversation, len(text)), place, special=False)

    def _learned(self, turns: Sequence[Turn], conversation: Conversation, length: int) -> list[Span]:
        """The spans of the turns that are learned; with ``all`` everything but those that are not."""
        masked = {index for index, message in enumerate(conversation.messages) if message.get(MASKED) == 0}
        if self._loss_on != "all":
            last = turns[-1].message if turns and self._loss_on == "completion" else None
            chosen = [turn for turn in turns if last in (None, turn.message)]
            return [(turn.start, turn.end) for turn in chosen if turn.message not in masked]
        edges = [0, *(edge for turn in turns if turn.message in masked for edge in (turn.start, turn.end)), length]
        return list(zip(edges[::2], edges[1::2], strict=True))

    # From text to tokens

    def _tokenized(self, pieces: Sequence[Piece], special: bool) -> Iterator[dict[str, list[int]]]:
        if not pieces:
            return
        for piece, ids, learned in zip(pieces, *self._encoded(pieces, special), strict=True):
            if max(ids, default=0) >= self._rows:
                self._bad.meet(self._beyond(piece, max(ids)))
                continue
            labels = numpy.where(learned, ids, IGNORE_INDEX)
            if (labels[1:] == IGNORE_INDEX).all():  # nothing predicts the first token
                self.empty += 1
                continue
            yield {"input_ids": ids, "labels": labels.tolist()}

    def _encoded(self, pieces: Sequence[Piece], special: bool) -> tuple[list[list[int]], list[Any]]:
        """Token ids of each text, and which of its tokens are learned."""
        texts = [piece.text for piece in pieces]
        if not self._tokenizer.is_fast:
            ids = [self._tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
            return ids, [self._learned_tokens(piece, len(row), row) for piece, row in zip(pieces, ids, strict=True)]
        encoded = self._tokenizer(
            texts, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        offsets = encoded["offset_mapping"]
        return encoded["input_ids"], [_inside(row, piece) for row, piece in zip(offsets, pieces, strict=True)]

    def _learned_tokens(self, piece: Piece, length: int, ids: Sequence[int]) -> Any:
        """As :func:`_inside` for a tokenizer that does not tell offsets: by tokens that texts have in common."""
        learned = numpy.zeros(length, dtype=bool)
        for start, end in piece.learned:
            learned[self._tokens_until(piece, start, ids) : self._tokens_until(piece, end, ids)] = True
        return learned

    def _tokens_until(self, piece: Piece, end: int, ids: Sequence[int]) -> int:
        if end in (0, len(piece.text)):
            return len(ids) if end else 0
        head = self._tokenizer(piece.text[:end], add_special_tokens=piece.special)["input_ids"]
        pairs = enumerate(zip(head, ids, strict=False))
        return next((index for index, (one, other) in pairs if one != other), min(len(head), len(ids)))

    def _beyond(self, piece: Piece, token: int) -> DataError:
        name = self._tokenizer.convert_ids_to_tokens(token)
        return DataError(
            f"{piece.place}: the token {name!r} has the id {token}, the model's vocabulary ends with {self._rows - 1}.",
            advice="Use the tokenizer that the model was made with, or leave such records out with --on-bad-row skip.",
        )


def _inside(offsets: Sequence[Span], piece: Piece) -> Any:
    """Which tokens hold a learned character.

    Args:
        offsets: the characters of each token, from and to.
        piece: the text and what of it is learned.

    Returns:
        A numpy array of bool. Tokens that a tokenizer gives no characters (white space, in some) count where they
        stand; what it adds at the end belongs to what goes to the end.
    """
    start, end = numpy.asarray(offsets, dtype=numpy.int64).reshape(-1, 2).T
    learned = numpy.zeros(len(start), dtype=bool)
    for begin, stop in piece.learned:
        within = (start < stop) & (end > begin) & (start < end)
        within |= (start == end) & (begin < start) & (start <= stop)
        if stop == len(piece.text) and within.any():
            within[within.argmax() :] = True
        if begin == 0 and stop == len(piece.text):
            within[:] = True
        learned |= within
    return learned


def _as_sentence(error: Exception) -> str:
    text = str(error)
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _ended(text: str, end: str) -> str:
    return text if not end or text.endswith(end) else text + end
