"""The values of a JSON array one by one: a file of any size takes no more memory than its largest value. No torch."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 2**20
_SPACES = frozenset(" \t\n\r")
_AFTER_VALUES = _SPACES | frozenset(",]")


class BrokenJson(ValueError):
    """Text that is no JSON array: what is wrong, and where, both counted from 1."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.message, self.line, self.column = message, line, column


class BrokenText(ValueError):
    """A byte that does not belong into UTF-8 text, and its position in the file."""

    def __init__(self, position: int, byte: int) -> None:
        super().__init__(f"byte {position} is 0x{byte:02x}")
        self.position, self.byte = position, byte


def array_values(path: Path, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Any]:
    """The values of the array that is all that ``path`` holds.

    Args:
        path: of a UTF-8 file.
        chunk_bytes: read at a time; a value that is longer doubles it.

    Raises:
        BrokenJson: if it does not hold one JSON array; values before the fault have been given by then.
        BrokenText: if it is not UTF-8.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        text = _Window(file, chunk_bytes)
        text.expect("[")
        if text.accept("]"):
            return text.expect_end()
        while True:
            yield text.value()
            if text.accept("]"):
                return text.expect_end()
            text.expect(",")


class _Window:
    """The part of a file that is being parsed; what lies before the position is forgotten when more is read."""

    def __init__(self, file: BinaryIO, chunk_bytes: int) -> None:
        self._file = file
        self._chunk_bytes = chunk_bytes
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder()
        self._text, self._position = "", 0
        self._read_bytes, self._ended = 0, False
        self._line, self._column = 1, 1  # of the beginning of the text

    def value(self) -> Any:
        """The next value, whatever it is."""
        self._skip_space()
        while True:
            try:
                found, end = self._json.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self._broken(error.msg, error.pos) from None
            else:
                # A number could go on: 1 as 12, 1.5 or 1e+5.
                if self._ended or self._text[end : end + 1] in _AFTER_VALUES:
                    self._position = end
                    return found
            self._read()

    def accept(self, character: str) -> bool:
        """Whether ``character`` comes next; then it is passed over."""
        self._skip_space()
        if not self._text.startswith(character, self._position):
            return False
        self._position += 1
        return True

    def expect(self, character: str) -> None:
        """Pass over ``character``."""
        if not self.accept(character):
            message = f"Expecting {character!r} delimiter" if character == "," else f"Expecting {character!r}"
            raise self._broken(message, self._position)

    def expect_end(self) -> None:
        """Make sure that nothing follows."""
        self._skip_space()
        if self._position < len(self._text):
            raise self._broken("Extra data", self._position)

    def _skip_space(self) -> None:
        while True:
            while self._text[self._position : self._position + 1] in _SPACES:
                self._position += 1
            if self._position < len(self._text) or self._ended:
                return
            self._read()

    def _read(self) -> None:
        self._line, self._column = self._place(self._position)
        self._text, self._position = self._text[self._position :], 0
        # Doubling what is there keeps the work in proportion to the file where a value does not end.
        content = self._file.read(max(self._chunk_bytes, len(self._text)))
        self._ended = not content
        try:
            self._text += self._decode(content, self._ended)
        except UnicodeDecodeError as error:  # its bytes may begin with the last ones of what was read before
            position = self._read_bytes + len(content) - len(error.object) + error.start
            raise BrokenText(position, error.object[error.start]) from None
        self._read_bytes += len(content)

    def _place(self, position: int) -> tuple[int, int]:
        """Line and column in the file of a position in the text."""
        before = self._text[:position]
        if lines := before.count("\n"):
            return self._line + lines, position - before.rindex("\n")
        return self._line, self._column + position

    def _broken(self, message: str, position: int) -> BrokenJson:
        return BrokenJson(message, *self._place(position))
