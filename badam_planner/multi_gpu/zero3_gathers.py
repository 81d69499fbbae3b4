"""Which matrices DeepSpeed's ZeRO-3 has gathered when: a rehearsal of its bookkeeping. Pure, no torch.

DeepSpeed (0.19, runtime/zero/partitioned_param_coordinator.py) gathers what a module needs when its forward or backward
begins, and in advance what the modules after it will need, in the order that it learned in an earlier micro-batch. The
advance is bounded by the entries of a message and by those that are gathered at all. A module that is left lets go of
its matrices, except those that the advance has met again meanwhile: from the end of forward these stay for backward.
Frozen matrices that a checkpointed layer gathers for its recomputation go together, with the module whose backward set
it off, and each is gathered once more when its own backward comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from badam.blocks.names import ParameterInfo
from badam_planner.multi_gpu.module_uses import Use
from badam_planner.multi_gpu.slots import Slot
from badam_planner.recording.recording import TensorRole

_BEFORE = -1
"""The use of a parameter that nothing has looked ahead to yet."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Entries that are on the GPU from one tick to another: a message, or a whole matrix."""

    role: TensorRole
    parameter: str  # "" of a message
    numel: int
    born: int
    died: int | None  # None: until the micro-batch has ended


@dataclass(frozen=True, slots=True)
class Rules:
    """What DeepSpeed was told, see badam.distributed.deepspeed.engine.

    Args:
        parameters: of each module, its own ones, in model order.
        trained: names of those that have gradients.
        kept: names of those that stay gathered.
        shards: GPUs among which each parameter is dealt out.
        ahead_numel: of a message that is gathered in advance; its last matrix may exceed it.
        live_numel: gathered at a time, beyond which nothing is gathered in advance.
    """

    parameters: Mapping[str, tuple[ParameterInfo, ...]]
    trained: frozenset[str]
    kept: frozenset[str]
    shards: int
    ahead_numel: int
    live_numel: int


@dataclass(eq=False, slots=True)
class _Message:
    """Parameters that were asked for together."""

    members: tuple[ParameterInfo, ...]
    sent: int
    awaited: set[str] = field(default_factory=set)
    arrived: int | None = None


class Gathers:
    """Follows one micro-batch whose order is known.

    Args:
        uses: in order of time.
        rules: of the engine.
    """

    def __init__(self, uses: Sequence[Use], rules: Rules) -> None:
        self.rules = rules
        self.found: list[Gathered] = []
        self.messages: list[tuple[ParameterInfo, ...]] = []
        self._coming = deque(_order(uses, rules))
        self._looked_ahead: dict[str, int] = {}
        self._arriving: dict[str, _Message] = {}
        self._there: dict[str, tuple[ParameterInfo, int, int]] = {}  # the matrix, its entries with padding, since when
        self._users: dict[str, set[str]] = {}
        self._for_recomputation: dict[str, list[ParameterInfo]] = {}
        self._in_backward: list[str] = []
        self._live = 0
        self._step = 0
        for use in uses:
            if use.fetches:
                self._fetch(use)
            else:
                self._leave(use)
        self._end()

    def _own(self, module: str) -> tuple[ParameterInfo, ...]:
        return self.rules.parameters.get(module, ())

    def _fetch(self, use: Use) -> None:
        if not use.is_forward and use.module not in self._in_backward:
            self._in_backward.append(use.module)
        needed = self._own(use.module)
        self._gather([info for info in needed if not self._is_known(info)], use.tick + Slot.ASKED_FOR)
        for info in needed:
            users = self._users.setdefault(info.name, set())
            users.add(use.module)
            if use.recomputes and self._in_backward and info.name not in self.rules.trained:
                owner = self._in_backward[-1]
                users.add(owner)
                self._for_recomputation.setdefault(owner, []).append(info)
            self._await(info, use.tick)
        met = [info for info in needed if self._looked_ahead.get(info.name, _BEFORE) < self._step]
        for _ in range(min(len(met), len(self._coming))):
            info, step = self._coming.popleft()
            self._looked_ahead[info.name] = step
        self._gather(self._in_advance(), use.tick + Slot.FIRST)
        self._step += 1

    def _in_advance(self) -> list[ParameterInfo]:
        room = min(self.rules.live_numel - self._live, self.rules.ahead_numel)
        wanted: dict[str, ParameterInfo] = {}
        numel = 0
        while self._coming and numel < room:
            info, step = self._coming.popleft()
            self._looked_ahead[info.name] = max(self._looked_ahead.get(info.name, _BEFORE), step)
            if not self._is_known(info) and info.name not in wanted:
                wanted[info.name] = info
                numel += info.numel
        return list(wanted.values())

    def _is_known(self, info: ParameterInfo) -> bool:
        return info.name in self.rules.kept or info.name in self._there or info.name in self._arriving

    def _gather(self, members: Sequence[ParameterInfo], tick: int) -> None:
        if not members:
            return
        message = _Message(tuple(members), tick, {info.name for info in members})
        self.messages.append(message.members)
        self._arriving.update(dict.fromkeys(message.awaited, message))
        self._live += sum(info.numel for info in members)

    def _await(self, info: ParameterInfo, tick: int) -> None:
        """Cut the matrices out of the message that ``info`` comes with; it goes when all of them were asked for."""
        message = self._arriving.pop(info.name, None)
        if message is None:
            return
        alone = len(message.members) == 1  # then the message is the matrix
        if message.arrived is None:
            message.arrived = tick
            for member in message.members:
                numel = self._padded(member) if alone else member.numel
                self._there[member.name] = (member, numel, message.sent if alone else tick + Slot.CUT_OUT)
        message.awaited.discard(info.name)
        if not message.awaited and not alone:
            self._note_message(message.members, message.sent, tick)

    def _leave(self, use: Use) -> None:
        members = [
            info
            for info in self._own(use.module)
            if info.name not in self.rules.kept and self._looked_ahead.get(info.name, _BEFORE) <= self._step
        ]
        if not use.is_forward:
            members += self._for_recomputation.pop(use.module, [])
            if use.module in self._in_backward:
                self._in_backward.remove(use.module)
        for info in (*self._own(use.module), *members):
            self._users.get(info.name, set()).discard(use.module)
        for info in members:
            if info.name in self._there and info.name not in self._arriving and not self._users.get(info.name):
                self._release(info.name, use.tick)

    def _release(self, name: str, tick: int | None) -> None:
        info, numel, born = self._there.pop(name)
        self._live -= info.numel
        self.found.append(Gathered(TensorRole.GATHERED, name, numel, born, tick))

    def _end(self) -> None:
        for name in list(self._there):
            self._release(name, None)
        for message in {id(message): message for message in self._arriving.values()}.values():
            self._note_message(message.members, message.sent, None)

    def _note_message(self, members: Iterable[ParameterInfo], born: int, died: int | None) -> None:
        numel = sum(self._padded(info) for info in members)
        self.found.append(Gathered(TensorRole.GATHERED_MATRICES, "", numel, born, died))

    def _padded(self, info: ParameterInfo) -> int:
        return self.rules.shards * -(-info.numel // self.rules.shards)


def _order(uses: Iterable[Use], rules: Rules) -> list[tuple[ParameterInfo, int]]:
    """The parameters in the order of their uses, each with the number of the use."""
    fetches = [use for use in uses if use.fetches]
    return [(info, step) for step, use in enumerate(fetches) for info in rules.parameters.get(use.module, ())]
