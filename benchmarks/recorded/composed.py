"""Rehearsals composed to full depth, as digests of all that they say of memory.

The cases are drawn from those of the test that compares composed rehearsals with rehearsals at full depth: blocks of
every kind, both losses, with and without checkpointing, accumulation and the embedding, on a CPU and on a card.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from badam.blocks.partition import partition_parameters
from badam.plan import BlockPlan, ModelSpec, OptimizerSpec, Partition, Plan, Provenance, Target, Training, config_digest
from badam.vocabulary import Attention, Checkpointing, Loss, Method, Strategy
from badam_planner.recording.recording import NEVER, Recording
from badam_planner.recording.timeline import Timeline
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.model_tree import ModelTree, inspect_model
from benchmarks.cpu.cases import ARCHITECTURES
from benchmarks.recorded.forks import Case
from benchmarks.recorded.plain import digest

BY_BLOCK, FUSED = 300, 60
"""Cases of badam, and of lomo and adalomo, which update while backward runs."""

BERT = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    **{name: ARCHITECTURES[name] for name in ("llama", "gpt2", "gemma2", "qwen3_moe")}, "bert": BERT,
}  # fmt: skip
TARGETS = {
    "cpu": Target(gpu="cpu", total_bytes=2**40, usable_bytes=2**40),
    "card": Target(
        gpu="card", total_bytes=2**40, usable_bytes=2**40, context_bytes=2**28, workspace_bytes=8_519_680
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drawn:
    """A case; ``block`` is the place of the active one, as a share of all."""

    model: str
    depth: int
    method: Method
    partition: Strategy
    checkpointing: Checkpointing
    loss: Loss
    batch_size: int
    seq_len: int
    grad_accum: int
    include_embedding: bool
    target: str
    block: float

    @property
    def name(self) -> str:
        """Says the whole case."""
        return (
            f"{self.model} of {self.depth} layers on a {self.target}, {self.method} by {self.partition}"
            f"{' with the embedding' * self.include_embedding}, checkpointing {self.checkpointing}, {self.loss} loss, "
            f"{self.grad_accum}×{self.batch_size}×{self.seq_len}, block at {self.block:.3f}"
        )


def cases() -> dict[str, Case]:
    """All cases, by their names."""
    random = Random(20250101)
    drawn = [_drawn(random, "badam") for _ in range(BY_BLOCK)]
    drawn += [_drawn(random, random.choice(("lomo", "adalomo"))) for _ in range(FUSED)]
    return {f"{number}: {case.name}": partial(compose, case) for number, case in enumerate(drawn)}


def _drawn(random: Random, method: Method) -> Drawn:
    model, by_block = random.choice(sorted(MODELS)), method == "badam"
    return Drawn(
        model=model,
        depth=random.randint(2, 12),
        method=method,
        partition=random.choice(("layer", "attn-mlp", "matrix")) if by_block else "full",
        checkpointing=random.choice(("all", "none")),
        loss=random.choice(("full", "chunked")) if model != "bert" else "full",
        batch_size=random.randint(1, 3),
        seq_len=random.randint(2, 40),
        grad_accum=random.randint(1, 2) if by_block else 1,  # an update within backward is one for each batch
        include_embedding=by_block and random.random() < 0.5,
        target=random.choice(sorted(TARGETS)),
        block=random.random(),
    )


def compose(case: Drawn) -> dict[str, Any]:
    """Digests of the composed rehearsal of a block, one for each kind of fact, so that a difference has a name."""
    tree, plan = planned(case)
    block = int(case.block * len(plan.partition.blocks))
    evaluator = Evaluator(tree)
    recording = evaluator.recording(plan, block)
    timeline = Timeline(recording, tree.head_module, on_gpu=plan.target.gpu != "cpu")
    allocations = recording.allocations
    work = {
        f"{phase.value} {module}": [recording.flops.get((phase, module)), str(recording.traffic.get((phase, module)))]
        for phase, module in recording.flops.keys() | recording.traffic.keys()
    }
    by_outline = evaluator.peaks(plan, block).by_phase
    return {
        "block": plan.partition.blocks[block].name,
        "allocations": len(allocations),
        "bytes": digest(timeline.sizes),
        "order": digest(_order(recording)),
        "categories": digest([category.value for category in timeline.categories]),
        "names": digest([(one.module, one.operation, one.shape, one.dtype, one.describe()) for one in allocations]),
        "work": digest(work),
        "peaks": {phase.value: [peak.nbytes, peak.module] for phase, peak in timeline.peak_by_phase().items()},
        "peaks as on the device": {phase.value: nbytes for phase, nbytes in by_outline.items()},
    }


def planned(case: Drawn) -> tuple[ModelTree, Plan]:
    """The plan of a case, made without the search, and the model that it is for."""
    config = dict(MODELS[case.model])
    config[next(name for name in ("num_hidden_layers", "n_layer") if name in config)] = case.depth
    spec = ModelSpec(
        id=case.model,
        source="config",
        config=config,
        config_digest=config_digest(config),
        task="sequence-classification" if case.model == "bert" else "causal-lm",
        parameters=1,
    )
    attention: Attention = "eager" if case.model == "gemma2" else "sdpa"  # which gemma2 lacks in transformers
    tree = inspect_model(spec, attention)
    layers = tree.layers if case.checkpointing == "all" else ()
    blocks = tuple(block.model_copy(update={"checkpointed_layers": layers}) for block in _blocks(case, tree))
    plan = Plan(
        model=spec,
        target=TARGETS[case.target],
        method=case.method,
        partition=Partition(strategy=case.partition, blocks=blocks),
        training=Training(
            batch_size=case.batch_size,
            seq_len=case.seq_len,
            grad_accum=case.grad_accum,
            checkpointing=case.checkpointing,
            loss=case.loss,
            attention=attention,
            optimizer=OptimizerSpec(max_grad_norm=1.0 if case.method == "badam" else 0.0),  # no joint norm to clip
        ),
        provenance=Provenance(versions={}, command="", date=""),
    )
    return tree, plan


def _blocks(case: Drawn, tree: ModelTree) -> list[BlockPlan]:
    if case.partition == "full":
        tops = dict.fromkeys(info.name.split(".", 1)[0] for info in tree.parameters)
        return [BlockPlan(name="all", prefixes=tuple(tops), parameters=1)]
    cut = partition_parameters(tree.parameters, case.partition, include_embedding=case.include_embedding)
    return [BlockPlan(name=block.name, prefixes=block.prefixes, parameters=block.parameters) for block in cut]


def _order(recording: Recording) -> list[tuple[str, str]]:
    """What happened, in order: births and deaths by the number of the allocation, phases and layers by name.

    Ticks themselves are left out: only their order says something.
    """
    found = [(one.born, "birth", str(number)) for number, one in enumerate(recording.allocations)]
    found += [(one.died, "death", str(number)) for number, one in enumerate(recording.allocations) if one.died != NEVER]
    found += [(tick, "phase", phase.value) for tick, phase in recording.phase_starts]
    found += [(mark.tick, mark.kind, mark.layer) for mark in recording.layer_marks]
    return [(what, which) for _, what, which in sorted(found, key=lambda event: event[0])]
