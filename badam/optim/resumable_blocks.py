"""Saving a block optimizer and continuing from what was saved, badam 1.4's states included."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from badam.errors import StateError
from badam.optim.saved_state import check_group_sizes
from badam.optim.state import Progress, model_digest
from badam.optim.state_of_1_4 import NOT_SAVED, read_state_of_1_4
from badam.optim.visit import BlockVisits


class ResumableBlocks(BlockVisits):
    """The part of :class:`badam.BlockOptimizer` that saves and loads."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically, in plain types and tensors.

        Laid out as torch does (``state`` and ``param_groups``, by position in the user's groups), plus ``badam``.
        """
        if self.ds_optimizer is not None:  # which has put its copies into the groups, and saves them itself
            return {**self.base_optimizer.state_dict(), "badam": self._progress().pack()}
        state, groups = self._base.pack(self._active)
        return {"state": state, "param_groups": groups, "badam": self._progress().pack()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; the model's weights are the caller's to load, before or after.

        The schedule (order, K, seed) is the saved one, like learning rates and all other options of the groups.

        A state that badam 1.4 saved is taken as far as it goes, and a warning says what was not in it.

        Raises:
            StateError: if it belongs to another model or partition; nothing is changed then.
        """
        if "badam" not in state_dict:
            self._load_state_of_1_4(state_dict)
            return
        if self.ds_optimizer is not None:
            self._load_within_deepspeed(state_dict)
            return
        saved = self.check_state(state_dict)
        self.schedule, self.global_step, self.non_finite_steps = saved.schedule, saved.step, saved.non_finite_steps
        self._restart_visit(saved.visit, saved.steps_in_visit)
        self._take_state(saved, state_dict)
        self._ranks.check_same(self._facts())
        self._announce_switch()

    def _take_state(self, saved: Progress, state_dict: dict[str, Any]) -> None:
        """The active block's masters and the base optimizer's state and options."""
        for member in self._active:
            if member.name in saved.masters:
                member.load_master(saved.masters[member.name])
        self._base.unpack(self._active, state_dict["state"], state_dict["param_groups"])
        self._base.unpack_changes(saved.group_changes)
        self._share_with_base()

    def _load_within_deepspeed(self, state_dict: dict[str, Any]) -> None:
        saved = Progress.unpack(state_dict["badam"])
        saved.check_against(self._progress())
        if (saved.visit, saved.steps_in_visit) != (self.visit, self.steps_in_visit):
            raise StateError(
                f"The state was saved {saved.steps_in_visit} steps into visit {saved.visit}; here it is "
                f"{self.steps_in_visit} steps into visit {self.visit}, and DeepSpeed reads only what is trainable now.",
                advice="Load with badam.distributed.load_zero3_checkpoint, which goes there first.",
            )
        self.base_optimizer.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._share_with_base()

    def position(self) -> dict[str, Any]:
        """The position of the run and what it belongs to, in plain types; see :meth:`go_to`."""
        kept = ("masters", "group_changes")  # tensors, or options of the base optimizer
        return {key: value for key, value in self._progress().pack().items() if key not in kept}

    def go_to(self, position: dict[str, Any]) -> None:
        """Move to where :meth:`position` was taken, without masters and moments; load those of the active block next.

        Raises:
            StateError: if it belongs to another model or partition; nothing is changed then.
        """
        saved = Progress.unpack({**position, "masters": {}, "group_changes": []})
        saved.check_against(self._progress())
        self.schedule, self.global_step, self.non_finite_steps = saved.schedule, saved.step, saved.non_finite_steps
        self._restart_visit(saved.visit, saved.steps_in_visit)
        self._announce_switch()

    def check_state(self, state_dict: dict[str, Any]) -> Progress:
        """What ``state_dict``, whose tensors are not looked at, says of the position.

        Raises:
            StateError: if it belongs to another model or partition.
        """
        saved = Progress.unpack(state_dict["badam"])
        saved.check_against(self._progress())
        check_group_sizes(state_dict["param_groups"], [len(group["params"]) for group in self.param_groups])
        return saved

    def _load_state_of_1_4(self, state_dict: dict[str, Any]) -> None:
        index, old = read_state_of_1_4(state_dict, self.blocks, self.active_modules, self._model.trainable)
        text = f"The optimizer state was written by badam 1.4, which did not save {NOT_SAVED}. "
        visits = (visit for visit in range(self.block_num) if self.schedule.block_at(visit) == index)
        visit = next(visits, None)
        if visit is None:
            warnings.warn(
                f"{text}Its moments fit no block or several, or one that is never visited, so they are not used: "
                f"training goes on with a fresh visit to {self.current_block.name}.",
                stacklevel=3,
            )
            return
        self._restart_visit(visit, old.steps)
        self.global_step = visit * max(self.switch_block_every, 0) + old.steps
        positions = self._base.positions()
        entries = {positions[id(m.parameter)]: old.entries[m.name] for m in self._active if m.name in old.entries}
        self._base.unpack(self._active, entries, self._base.pack([])[1])
        self._share_with_base()
        self._announce_switch()
        warnings.warn(
            f"{text}Its moments fit {self.current_block.name} alone and are used there, {old.steps} steps into the "
            "visit; the masters are the model's weights.",
            stacklevel=3,
        )

    def _progress(self) -> Progress:
        return Progress(
            step=self.global_step,
            visit=self.visit,
            steps_in_visit=self.steps_in_visit,
            non_finite_steps=self.non_finite_steps,
            schedule=self.schedule,
            blocks=self.block_prefix_list,
            active_modules=self.active_modules,
            parameters=len(self.named_parameters_list),
            model_digest=model_digest(self.named_parameters_list),
            masters=self.masters,
            group_changes=self._base.pack_changes(),
        )

    def _facts(self) -> dict[str, object]:
        """What all processes must agree on."""
        plain = (bool, int, float, str, tuple, type(None))
        options = [
            {key: value for key, value in group.items() if key != "params" and isinstance(value, plain)}
            for group in self.param_groups
        ]
        return {
            "the model": (len(self.named_parameters_list), model_digest(self.named_parameters_list)),
            "the blocks": (self.block_num, [block.prefixes for block in self.blocks], self.active_modules),
            "the schedule": self.schedule,
            "the position": {"step": self.global_step, "visit": self.visit, "steps in it": self.steps_in_visit},
            "the base optimizer": (type(self.base_optimizer).__name__, options),
            "the write-back": self.write_back,
        }
