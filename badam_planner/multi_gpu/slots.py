"""The order of what engines do between two ticks of a rehearsal, by name. Pure.

A recording is spread out by ``SPREAD`` before what an engine does is put into it (badam_planner.multi_gpu.per_rank), so
that there is room around each of its ticks. A slot is the distance from such a tick: ``tick + Slot.WHOLE``.
"""

from __future__ import annotations

from enum import IntEnum

SPREAD = 16
"""Ticks between two ticks of the rehearsal: room for what sharding adds there."""


class Slot(IntEnum):
    """Distances from the beginning of a unit, a module, a phase or a micro-batch, from the earliest to the latest."""

    ROOT_RELEASED = -10  # before backward's end: the root is no longer whole
    REDUCED = -9  # the unit before has its gradients reduced; see ReductionSlot
    MODULE_BEGINS = -8  # before the first tensor that is made in it
    RELEASED = -7  # forward: the unit before is no longer whole
    GATHERED_INTO = -6  # forward: the buffer that the unit is gathered into
    WHOLE = -4  # forward: its whole parameters, cut out of the buffer
    BUFFER_RELEASED = -3  # forward: the buffer of the unit before
    WHOLE_IN_BACKWARD = -3
    BUFFER_RELEASED_IN_BACKWARD = -2  # the unit's own, since it was asked for ahead
    ASKED_FOR = -2  # ZeRO-3: matrices that nothing asked for ahead
    CUT_OUT = -1  # ZeRO-3: of the message that brought several
    NEXT_ASKED_FOR = -1  # backward: the unit after this one, ahead
    LAST = -1  # before backward's end
    FIRST = 1  # after the beginning of a phase, or of what it follows
    SECOND = 2
    MODULE_LEFT = 2  # after the last tensor that was made in it
    ROOT_BEGINS = 7  # after a micro-batch's beginning, so that no gather reaches back beyond it
    MODEL_BEGINS = 8  # ZeRO-3: the module that holds all others
    UNMARKED_BEGINS = 10  # likewise, units without a mark of their own: the embedding
    UNMARKED_FOLLOWS = 3  # from one of these to the next


class ReductionSlot(IntEnum):
    """Distances from when a unit's gradients begin to be reduced."""

    INPUT = 1  # the buffer that they are sent from
    GRADIENTS_RELEASED = 2
    PART = 3  # this GPU's part in fp32
    HALF = 4  # the same in the model's type, in passing
    FP32_OF_HALF = 5  # the fp32 gradient that is made of it
    DONE = 6  # a part that was added to that of an earlier micro-batch, or the half, is gone
    SUM_RELEASED = 7  # what earlier micro-batches added up to


class MessageSlot(IntEnum):
    """Distances from when a message's buffer is there: gloo's copy of it."""

    SUMMED_FROM = 1
    GATHERED = 1
    SUMMED = 3
