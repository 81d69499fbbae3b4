"""From a case to the plan that it runs, and to what is predicted of it."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from badam.plan import BlockPlan, MethodOptions, Plan, Target
from badam.training.build import choose_attention
from badam.training.methods import method_of
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.model_tree import ModelTree, inspect_model
from badam_planner.search.model_spec import describe_model
from badam_planner.search.planner import Request, staged_plan, with_prediction
from badam_planner.search.settings import MemorySetting, strategies
from benchmarks.gpu.cases import Case


def case_plan(case: Case, target: Target, command: str) -> tuple[Plan, ModelTree, int]:
    """The plan that a case runs, without prediction; the module tree; and the number of blocks of the whole partition.

    The plan's partition holds only the blocks that are visited: what is measured and what is predicted are the same
    blocks, and none is predicted for nothing.

    Raises:
        InputError: if the model is unknown, or cannot be cut or run as asked.
    """
    spec = describe_model(case.model)
    attention = choose_attention(spec)
    tree = inspect_model(spec, attention)
    request = Request(
        spec=spec,
        target=target,
        method=case.method,
        batch_size=case.batch_size,
        seq_len=case.seq_len,
        grad_accum=case.grad_accum,
        attention=attention,
        switch_every=case.switch_every,
        switch_mode="ascending",
        options=MethodOptions(update_ratio=case.update_ratio),
        command=command,
    )
    (cut,) = strategies(case.method, case.cut)
    plan = staged_plan(request, cut, MemorySetting(case.checkpointing, case.loss), tree)
    plan = with_checkpoint_list(plan, tree) if case.checkpointing == "list" else plan
    whole = plan.partition.blocks
    chosen = range(len(whole)) if case.blocks == "all" else ends(whole, tree)
    visited = plan.partition.model_copy(update={"blocks": tuple(whole[index] for index in chosen)})
    return plan.model_copy(update={"partition": visited}), tree, len(whole)


def with_checkpoint_list(plan: Plan, tree: ModelTree) -> Plan:
    """The plan with every second layer checkpointed, whatever block is active."""
    listed = [block.model_copy(update={"checkpointed_layers": tree.layers[::2]}) for block in plan.partition.blocks]
    return plan.model_copy(update={"partition": plan.partition.model_copy(update={"blocks": tuple(listed)})})


def ends(blocks: Sequence[BlockPlan], tree: ModelTree) -> list[int]:
    """Indices of the lowest, the middle and the highest block of each kind, in model order.

    Blocks are of one kind if they hold the same parameters of equal layers.
    """
    of_kind: dict[Hashable, list[int]] = {}
    for index, block in enumerate(blocks):
        layers = tuple(tree.layer_kinds.get(tree.layer_of(prefix)) for prefix in block.prefixes)
        kind = tuple(re.sub(r"\d+", "#", prefix) for prefix in block.prefixes), layers
        of_kind.setdefault(kind, []).append(index)
    return sorted({each[place] for each in of_kind.values() for place in (0, len(each) // 2, -1)})


def predicted(plan: Plan, tree: ModelTree) -> Plan:
    """The plan with what the predictor says of each of its blocks."""
    evaluator = Evaluator(tree)
    return with_prediction(plan, evaluator.every_block(plan, evaluator.worst_block(plan)))


def with_formula(plan: Plan, blocks: int) -> Plan:
    """The plan with the closed form for all ``blocks`` of the partition, of which it may hold a few."""
    if plan.prediction is None or len(plan.partition.blocks) == blocks:
        return plan
    largest = max(block.parameters for block in plan.partition.blocks)
    formula = {"formula_bytes": method_of(plan.method).state_bytes(plan.model.parameters, largest, blocks)}
    return plan.model_copy(update={"prediction": plan.prediction.model_copy(update=formula)})
