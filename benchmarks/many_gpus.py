"""Memory and traffic of one card as the number of cards grows: predicted, no card is needed.

    python -m benchmarks.many_gpus            # writes the tables of docs/many-gpus.md to stdout

For each model one rehearsal; every number of cards is calculated from it.
"""

from __future__ import annotations

import argparse

from badam_planner.multi_gpu.links import BETWEEN_NODES, LINKS, seconds, transfer_times
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.model_tree import inspect_model
from badam_planner.search.model_spec import specify
from badam_planner.search.planner import Request, staged_plan
from badam_planner.search.settings import MemorySetting
from badam_planner.sources.model_source import find_config
from badam_planner.sources.target import find_target

MODELS = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf")
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GIB = 2**30


def table(model: str, gpu: str, batch_size: int, seq_len: int) -> str:
    """A Markdown table for one model: a row for each number of cards."""
    spec = specify(*find_config(model))
    request = Request(spec=spec, target=find_target(gpu, None), batch_size=batch_size, seq_len=seq_len)
    evaluator = Evaluator(inspect_model(spec, "sdpa"))
    plan = staged_plan(request, "layer", MemorySetting("all", "chunked"), evaluator.tree)
    nvlink, pcie = LINKS[1], LINKS[3]
    head = (
        "| GPUs | states 2M+16M/D | allocated peak | sent per step | of full training | "
        f"{nvlink.name} | {pcie.name} | {BETWEEN_NODES.name} |\n|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    lines = [f"{model}, blocks by layer, {batch_size} × {seq_len} tokens per GPU, checkpointing, chunked loss:\n", head]
    for cards in GPUS:
        target = plan.target.model_copy(update={"engine": "fsdp2", "num_gpus": cards})
        here = plan.model_copy(update={"target": target})
        peak = max(evaluator.peaks(here, block).peak_allocated_bytes for block in (0, len(plan.partition.blocks) // 2))
        traffic = evaluator.traffic(here, 0)
        assert traffic is not None, "the plan is for several cards"
        sent, full = (each.sent_bytes(cards) for each in traffic)
        states = (2 * spec.parameters + 16 * spec.parameters // len(plan.partition.blocks)) / cards
        times = " | ".join(f"{seconds(sent, link):.2f} s" for link in (nvlink, pcie, BETWEEN_NODES))
        share = f"{sent / full:.0%}" if full else "-"
        row = f"{states / GIB:.2f} GiB | {peak / GIB:.2f} GiB | {sent / GIB:.1f} GiB | {share} | {times}"
        lines.append(f"| {cards} | {row} |")
    return "\n".join(lines)


def copies_table(model: str, gpu: str, batch_size: int, seq_len: int) -> str:
    """A Markdown table: one copy over all cards beside copies that are cut over the cards of one machine each."""
    spec = specify(*find_config(model))
    request = Request(spec=spec, target=find_target(gpu, None), batch_size=batch_size, seq_len=seq_len)
    evaluator = Evaluator(inspect_model(spec, "sdpa"))
    plan = staged_plan(request, "layer", MemorySetting("all", "chunked"), evaluator.tree)
    per_node, nvlink = plan.target.gpus_per_node, 1
    title = (
        f"{model} as above: one copy over all GPUs, or one copy in each machine of {per_node}, with "
        f"{LINKS[nvlink].name} inside and {BETWEEN_NODES.name} between:\n"
    )
    head = "| GPUs | peak, one copy | sent | time | peak, copies | sent within | sent between | time |"
    lines = [title, head, f"|{'---:|' * 8}"]
    for cards in (each for each in GPUS if each >= per_node):
        row = [str(cards)]
        for size in (None, per_node):
            target = plan.target.model_copy(update={"engine": "fsdp2", "num_gpus": cards, "shard_size": size})
            here = plan.model_copy(update={"target": target})
            peak = max(
                evaluator.peaks(here, block).peak_allocated_bytes for block in (0, len(plan.partition.blocks) // 2)
            )
            traffic = evaluator.traffic(here, 0)
            assert traffic is not None, "the plan is for several cards"
            between = traffic[0].sent_between_bytes(target.replicas)
            within = traffic[0].sent_bytes(target.shards, target.replicas) - between
            _, time = transfer_times(target, within, between)[nvlink]
            sent = [f"{within / GIB:.1f} GiB"] + ([f"{between / GIB:.2f} GiB"] if size else [])
            row += [f"{peak / GIB:.2f} GiB", *sent, f"{time:.2f} s"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="a100-80gb")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=2048)
    given = parser.parse_args()
    print("\n\n".join(table(model, given.gpu, given.batch_size, given.seq_len) for model in MODELS))
    print(f"\n{copies_table(MODELS[-1], given.gpu, given.batch_size, given.seq_len)}")


if __name__ == "__main__":
    main()
