"""The base optimizer, working on masters in the place of the user's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from badam.optim.active_parameter import ActiveParameter, write_nearest
from badam.tensors.functional import clip_gradients_

Options = dict[str, Any]


class MasterGroups:
    """Runs a base optimizer on the masters of the active parameters, group by group.

    The groups stay the user's objects with the user's parameters in them; ``params`` holds the masters only during a
    call of the base optimizer. So learning rates, schedulers and options are always the current ones.
    """

    def __init__(self, base_optimizer: Optimizer) -> None:
        self.base_optimizer = base_optimizer
        # Some optimizers fill their state when built, as torch's Adagrad did before 2.12: none for masters.
        self._fills_when_built = bool(base_optimizer.state)
        self._found: dict[tuple[int, str], Any] = {}  # what a base step has overwritten in a group, as it was before

    def clip(self, gradients: Sequence[Tensor], max_norm: float, norm_type: float) -> Tensor:
        """Scale the gradients of the next step to a joint norm of at most ``max_norm``; returns the norm before."""
        return clip_gradients_(gradients, max_norm, norm_type)

    def unclip(self) -> None:
        """Forget what :meth:`clip` has left to the next step, because there will be none on these gradients."""

    def step(self, members: Sequence[ActiveParameter]) -> None:
        """One base step from the gradients of ``members``; they are released, the weights written."""
        if not members:
            return
        for member in members:
            member.ready_master().grad = member.gradient
        groups = self.base_optimizer.param_groups
        before = [dict(group) for group in groups]
        with self._holding_masters(members):
            # Groups without an active parameter are left out: not every optimizer accepts an empty one.
            self.base_optimizer.param_groups = [group for group in groups if group["params"]]
            try:
                if self._fills_when_built:
                    self._fill()
                self.base_optimizer.step()
            finally:
                self.base_optimizer.param_groups = groups
        self._remember_changes(before)
        write_nearest(members)
        for member in members:
            member.ready_master().grad = None
            member.drop_gradient()

    def _fill(self) -> None:
        """Give masters that have no state the one that the base optimizer's constructor makes."""
        state = self.base_optimizer.state
        new = [
            master for group in self.base_optimizer.param_groups for master in group["params"] if master not in state
        ]
        if new:
            kind = type(self.base_optimizer)
            known = inspect.signature(kind).parameters
            made = kind(new, **{name: value for name, value in self.base_optimizer.defaults.items() if name in known})
            state.update(made.state)

    def forget(self) -> None:
        """Release all state, and undo what steps have written into the groups (counters, running estimates)."""
        self.base_optimizer.state.clear()
        for (index, key), value in self._found.items():
            if value is _ABSENT:
                del self.base_optimizer.param_groups[index][key]
            else:
                self.base_optimizer.param_groups[index][key] = value
        self._found.clear()

    def pack(self, members: Iterable[ActiveParameter]) -> tuple[dict[int, Any], list[Options]]:
        """State by position in the user's groups, and the groups with positions for parameters, as torch saves them."""
        members = self.in_group_order(member for member in members if member.master is not None)
        with self._holding_masters(members):
            saved = self.base_optimizer.state_dict()
        positions = self.positions()
        groups, taken = [], 0
        for group, options in zip(self.base_optimizer.param_groups, saved["param_groups"], strict=True):
            groups.append({**options, "params": list(range(taken, taken + len(group["params"])))})
            taken += len(group["params"])
        return {positions[id(members[index].parameter)]: entry for index, entry in saved["state"].items()}, groups

    def unpack(self, members: Iterable[ActiveParameter], state: dict[int, Any], groups: Sequence[Options]) -> None:
        """Load what :meth:`pack` gave, through the base optimizer's own ``load_state_dict``."""
        positions = self.positions()
        members = self.in_group_order(member for member in members if positions[id(member.parameter)] in state)
        with self._holding_masters(members):
            index = {id(member.master): position for position, member in enumerate(members)}
            options = [
                {**saved, "params": [index[id(master)] for master in group["params"]]}
                for group, saved in zip(self.base_optimizer.param_groups, groups, strict=True)
            ]
            states = {
                position: _unshared(state[positions[id(member.parameter)]]) for position, member in enumerate(members)
            }
            self.base_optimizer.load_state_dict({"state": states, "param_groups": options})

    def pack_changes(self) -> list[list[Any]]:
        """What steps have overwritten in the groups: rows of (group, option, whether it was there, its value)."""
        return [
            [index, key, value is not _ABSENT, None if value is _ABSENT else value]
            for (index, key), value in self._found.items()
        ]

    def unpack_changes(self, changes: Sequence[Sequence[Any]]) -> None:
        """Load what :meth:`pack_changes` gave."""
        self._found = {(index, key): value if there else _ABSENT for index, key, there, value in changes}

    def positions(self) -> dict[int, int]:
        """Position of each parameter in the user's groups, counted through, by identity."""
        parameters = (parameter for group in self.base_optimizer.param_groups for parameter in group["params"])
        return {id(parameter): position for position, parameter in enumerate(parameters)}

    def in_group_order(self, members: Iterable[ActiveParameter]) -> list[ActiveParameter]:
        """``members`` in the order in which their parameters lie in the groups."""
        positions = self.positions()
        return sorted(members, key=lambda member: positions[id(member.parameter)])

    def _remember_changes(self, before: Sequence[Options]) -> None:
        for index, (old, new) in enumerate(zip(before, self.base_optimizer.param_groups, strict=True)):
            for key, value in new.items():
                if key != "params" and value is not old.get(key, _ABSENT):
                    self._found.setdefault((index, key), old.get(key, _ABSENT))

    @contextmanager
    def _holding_masters(self, members: Iterable[ActiveParameter]) -> Iterator[None]:
        masters: dict[int, Tensor] = {id(member.parameter): member.ready_master() for member in members}
        kept = [group["params"] for group in self.base_optimizer.param_groups]
        for group in self.base_optimizer.param_groups:
            group["params"] = [masters[id(parameter)] for parameter in group["params"] if id(parameter) in masters]
        try:
            yield
        finally:  # the groups may be new objects by now: loading a state replaces them
            for group, parameters in zip(self.base_optimizer.param_groups, kept, strict=True):
                group["params"] = parameters


_ABSENT: Any = object()


def _unshared(entry: Any) -> Any:
    """A state entry whose tensors share no memory with the saved ones, so that two optimizers can continue from it."""
    if isinstance(entry, Tensor):
        return entry.clone()
    if isinstance(entry, dict):
        return {key: _unshared(value) for key, value in entry.items()}
    if type(entry) in (list, tuple):
        return type(entry)(_unshared(value) for value in entry)
    return entry
