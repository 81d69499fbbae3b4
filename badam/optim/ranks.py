"""The processes that train one model together: what they must agree on, and how they find out.

Every process computes the block order, K and the random numbers by itself, from the same seed. Nothing is communicated
for that, but it is checked: when an optimizer is built, when a state is loaded, at every switch and, by two numbers
sent along with the finiteness of the gradients, in every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from badam.errors import InputError, RanksDisagree
from badam.tensors.dtensor import is_sharded
from badam.tensors.functional import is_fake, non_finite_flags

PATIENCE = timedelta(seconds=60)
"""How long a process waits for the others at a check before it raises an error."""


class ProcessRanks:
    """Several processes. Building one is collective: all of them do it, at the same place.

    Args:
        device: where the numbers of a step live.
        members: their global ranks; all of the default process group if None.
        averages: gradients are this optimizer's to average, because nothing else does.
    """

    def __init__(self, device: torch.device, members: Sequence[int] | None = None, *, averages: bool = False) -> None:
        self.averages = averages
        self._device = device
        all_ranks = list(range(dist.get_world_size()))
        members = all_ranks if members is None else sorted(members)
        self._size = len(members)
        partial = members != all_ranks
        self._group = dist.new_group(members, use_local_synchronization=True) if partial else None
        self._patience = PATIENCE
        # Checks have a group of their own, on the host: they wait for no kernel, meet no other collective by mistake,
        # and end with a message where training's own group would wait for half an hour.
        self._checks = dist.new_group(members, self._patience, "gloo", use_local_synchronization=partial)

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Compare ``facts`` over all processes.

        Raises:
            RanksDisagree: on every process, with the first fact that differs and who holds which value.
        """
        here = {name: repr(value) for name, value in facts.items()}
        facts_by_rank: list[dict[str, str]] = [{} for _ in range(self._size)]
        try:
            dist.all_gather_object(facts_by_rank, here, group=self._checks)
        except RuntimeError as error:
            raise RanksDisagree(
                f"Rank {dist.get_rank()} waited at the check of {', '.join(facts)}, which not all of the {self._size} "
                f"ranks reached within {self._patience.total_seconds():.0f} s.",
                advice="Look for the rank that stopped, or that switched blocks by itself.",
            ) from error
        for name in {name: None for there in facts_by_rank for name in there}:
            values: dict[str, list[int]] = {}
            for rank, there in enumerate(facts_by_rank):
                values.setdefault(there.get(name, "nothing"), []).append(rank)
            if len(values) > 1:
                raise RanksDisagree(_difference(name, values), advice="Start all ranks with the same options and data.")

    def all_finite(self, sums: Sequence[Tensor], position: int) -> bool:
        """Whether ``sums`` are finite on every process, all of which stand at ``position``.

        Raises:
            RanksDisagree: if they do not, with the first and the last position.
        """
        numbers = torch.tensor([0, position, -position], dtype=torch.float64, device=self._device)
        for flag in non_finite_flags(sums):
            numbers[:1].add_(flag.to(self._device))
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group)
        if is_fake(numbers):
            return True
        wrong, most, least = numbers.tolist()
        if most != -least:
            raise RanksDisagree(
                f"The ranks are not at the same step: the first is at {int(most)}, the last at {int(-least)}, rank "
                f"{dist.get_rank()} at {position}.",
                advice="Call step() equally often on every rank.",
            )
        return not wrong

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Each flag, or-ed over the processes."""
        numbers = torch.tensor(flags, dtype=torch.int32, device=self._device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(number) for number in numbers.tolist()]

    def average_(self, gradients: Sequence[Tensor]) -> None:
        """Replace each gradient by its mean over the processes, in place."""
        if not gradients:
            return
        # One message per type and device: a norm's gradient alone would cost as much time as a matrix.
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for gradient in gradients:
            kinds.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for alike in kinds.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in alike])
            dist.all_reduce(flat, group=self._group)
            flat.div_(self._size)
            for gradient, mean in zip(alike, flat.split([gradient.numel() for gradient in alike]), strict=True):
                gradient.copy_(mean.view_as(gradient))


def ranks_of(parameters: Sequence[Tensor], *, average_gradients: bool = False) -> ProcessRanks | None:
    """The processes that train ``parameters`` together; None for one alone. Collective if there are several.

    Args:
        parameters: of the model; if FSDP2 has sharded them, it also averages their gradients.
        average_gradients: every process holds a whole copy, and gradients are to be averaged here.

    Raises:
        InputError: if sharded gradients, or those of a single process, are to be averaged.
    """
    sharded = next(filter(is_sharded, parameters), None)
    if sharded is not None:
        if average_gradients:
            raise InputError(
                "The parameters are sharded, so FSDP2 averages their gradients already.",
                advice="Leave average_gradients off.",
            )
        mesh = sharded.device_mesh
        return ProcessRanks(torch.device(mesh.device_type), mesh.mesh.flatten().tolist())
    if not average_gradients:
        return None
    if not dist.is_initialized():
        raise InputError(
            "average_gradients needs an initialized process group.",
            advice="Call torch.distributed.init_process_group() first.",
        )
    return ProcessRanks(parameters[0].device, averages=True)


def _difference(name: str, values: Mapping[str, list[int]]) -> str:
    sides = (f"{value[:120]} on rank{'s' * (len(ranks) > 1)} {_listed(ranks)}" for value, ranks in values.items())
    return f"The ranks do not agree on {name}: {'; '.join(list(sides)[:4])}."


def _listed(ranks: Sequence[int], most: int = 8) -> str:
    listed = ", ".join(map(str, ranks[:most]))
    return listed if len(ranks) <= most else f"{listed} and {len(ranks) - most} more"
