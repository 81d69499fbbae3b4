"""How much of full training's backward a block costs, counted in operations of matrix products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from badam.plan import Plan
from badam.vocabulary import Phase
from badam_planner.recording.recording import Flops
from badam_planner.rehearsal.model_tree import ModelTree
from badam_planner.rehearsal.roles import trained_prefixes


def backward_relative(
    plan: Plan, tree: ModelTree, flops: Mapping[int, Flops], representatives: Sequence[int]
) -> tuple[float, ...]:
    """Matrix-product operations of backward with each block active, over those with everything active.

    Formula: the rehearsal of the lowest block of a block's shape less the layers between the two, each as it passes
    gradients through there. Training everything adds to every layer the products that make its weights'
    gradients: as many as forward has with these weights. Recomputation counts.
    Units: none. Source: 2 m n k operations per product, ``torch.utils.flop_counter``.
    Not counted: operations that are bound by memory and not by arithmetic.

    Args:
        plan: the partition.
        tree: the layers.
        flops: those of rehearsals at full depth, by index of the active block.
        representatives: for each block of the plan the index of the one that was rehearsed in its place.
    """
    if [block.parameters for block in plan.partition.blocks] == [sum(info.numel for info in tree.parameters)]:
        return (1.0,)  # the one block is everything
    tallies = {index: _backward_flops(each, tree) for index, each in flops.items()}
    positions = [_lowest_layer(trained_prefixes(plan, block), tree) for block in plan.partition.blocks]
    reference = min(flops, key=lambda index: positions[index])
    # By block that was rehearsed: a decoder's layers have more to do where the encoder below them is trained.
    through = {index: _passing_through(tallies[index], positions[index], tree) for index in flops}
    outside = tallies[reference].get("", 0)
    everything = outside + sum(through[reference]) + _weight_gradient_flops(flops[reference], tree)
    relative = []
    for index, stand_in in enumerate(representatives):
        between = sum(through[stand_in][positions[stand_in] + 1 : positions[index] + 1])
        relative.append((sum(tallies[stand_in].values()) - between) / everything)
    return tuple(relative)


def backward_of_all(flops: Flops) -> float:
    """Matrix-product operations of backward, over those of training every weight.

    Formula: (backward + recomputation) / (2 (forward + loss) + recomputation), since the gradient of a product is two
    products of its size. Units: none. Not counted: the third product in the backward of fused attention.
    """
    tally: dict[Phase, int] = {}
    for (phase, _), count in flops.items():
        tally[phase] = tally.get(phase, 0) + count
    again = tally.get(Phase.RECOMPUTE, 0)
    ahead = tally.get(Phase.FORWARD, 0) + tally.get(Phase.LOSS, 0)
    return (tally.get(Phase.BACKWARD, 0) + again) / (2 * ahead + again) if ahead else 0.0


def _backward_flops(flops: Flops, tree: ModelTree) -> dict[str, int]:
    """Operations of backward and recomputation by layer; those outside of every layer under ""."""
    tally: dict[str, int] = {}
    for (phase, module), count in flops.items():
        if phase in (Phase.BACKWARD, Phase.RECOMPUTE):
            layer = tree.layer_of(module)
            tally[layer] = tally.get(layer, 0) + count
    return tally


def _passing_through(tally: dict[str, int], lowest: int, tree: ModelTree) -> list[int]:
    """Operations of each layer that only passes gradients through; layers at or below ``lowest`` as their equals."""
    by_kind = {tree.layer_kinds[layer]: tally.get(layer, 0) for layer in tree.layers[lowest + 1 :]}
    return [
        tally.get(layer, 0) if position > lowest else by_kind.get(tree.layer_kinds[layer], tally.get(layer, 0))
        for position, layer in enumerate(tree.layers)
    ]


def _weight_gradient_flops(flops: Flops, tree: ModelTree) -> int:
    """Operations that make the gradients of all weights: those of forward in the modules that own weights."""
    owners = {info.name.rpartition(".")[0] for info in tree.parameters}
    forward = (Phase.FORWARD, Phase.LOSS)
    return sum(count for (phase, module), count in flops.items() if phase in forward and module in owners)


def _lowest_layer(prefixes: Sequence[str], tree: ModelTree) -> int:
    """Position of the lowest layer that backward reaches: the lowest trained one, or beyond the last for a head."""
    if tree.embeds_among(prefixes):
        return -1
    inside = {tree.layer_of(path) for path in prefixes}
    return next((position for position, layer in enumerate(tree.layers) if layer in inside), len(tree.layers))
