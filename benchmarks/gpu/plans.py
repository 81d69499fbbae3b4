"""From a case to the plan that it runs, and to what is predicted of it."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from badam.plan import BlockPlan, Method, Partition, Plan, Schedule, Target
from badam.training.assemble import choose_attention
from badam_planner.planning import Request, _with_prediction, formula_bytes, staged_plan
from badam_planner.probe.evaluate import Evaluator, ModelTree, inspect_model
from badam_planner.probe.model_source import describe_model
from badam_planner.search import Cut as SearchedCut
from badam_planner.search import Setting
from benchmarks.gpu.cases import Case

METHODS: dict[str, Method] = {"full": "adam", "ratio": "badam-ratio"}


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
    # Everything at once is staged as for Adam, also where the ratio optimizer then trains a share of it.
    cut: SearchedCut = "full" if case.cut == "ratio" else case.cut
    request = Request(
        spec=spec,
        target=target,
        method="adam" if cut == "full" else "badam",
        batch_size=case.batch_size,
        seq_len=case.seq_len,
        grad_accum=case.grad_accum,
        attention=attention,
        switch_every=case.switch_every,
        switch_mode="ascending",
        command=command,
    )
    plan = staged_plan(request, cut, Setting(case.checkpointing, case.loss), tree)
    plan = with_checkpoint_list(plan, tree) if case.checkpointing == "list" else plan
    chosen = range(len(plan.partition.blocks)) if case.blocks == "all" else ends(plan.partition.blocks, tree)
    blocks = tuple(plan.partition.blocks[index] for index in chosen)
    strategy = "ratio" if case.cut == "ratio" else plan.partition.strategy
    changed = {
        "method": METHODS.get(case.cut, "badam"),
        "partition": Partition(strategy=strategy, blocks=blocks),
        "schedule": Schedule(switch_mode="ascending", switch_every=case.switch_every),
    }
    return plan.model_copy(update=changed), tree, len(plan.partition.blocks)


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
    """The plan with what the predictor says of each of its blocks; without, for a method that it does not know."""
    if plan.method == "badam-ratio":
        return plan
    evaluator = Evaluator(tree)
    return _with_prediction(plan, evaluator.every_block(plan, evaluator.worst_block(plan)))


def with_formula(plan: Plan, blocks: int) -> Plan:
    """The plan with the closed form for all ``blocks`` of the partition, of which it may hold a few."""
    if plan.prediction is None:
        return plan
    formula = {"formula_bytes": formula_bytes(plan.model.parameters, blocks)}
    return plan.model_copy(update={"prediction": plan.prediction.model_copy(update=formula)})
