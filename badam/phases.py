"""Which phase the training step is in, announced by the code that runs it.

The step, the checkpointing wrapper and the optimizers call :func:`enter` and :func:`within`; whoever wants to know
(the rehearsal, the recorder) subscribes. Without subscribers both cost one attribute read. One process trains one
model at a time, so the phase is a module-level state and not an argument of every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from badam.vocabulary import Phase

Listener = Callable[[Phase, Phase], None]
"""Called with (phase that ends, phase that begins)."""

_listeners: list[Listener] = []
_current = Phase.SETUP


def current() -> Phase:
    """The phase that the running step is in."""
    return _current


def enter(phase: Phase) -> None:
    """Declare that ``phase`` begins now and the previous one has ended."""
    global _current
    previous, _current = _current, phase
    if previous is not phase:
        for listener in _listeners:
            listener(previous, phase)


@contextmanager
def within(phase: Phase) -> Iterator[None]:
    """Enter ``phase`` for the length of a ``with`` block, then return to the phase that it interrupted."""
    interrupted = _current
    enter(phase)
    try:
        yield
    finally:
        enter(interrupted)


@contextmanager
def unannounced() -> Iterator[None]:
    """Announce no phase within the ``with`` block, and restore the phase afterwards."""
    global _current
    interrupted, listeners = _current, _listeners[:]
    _listeners.clear()
    try:
        yield
    finally:
        _listeners[:] = listeners
        _current = interrupted


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call ``listener`` at every change of phase within the ``with`` block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
