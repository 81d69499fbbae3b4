"""Backward time of each block, measured against the plan's, for an 8-layer model with activation checkpointing.

The plan says how much work backward is with each block active; the measured sum gives the scale. Blocks take turns, one
optimizer step each, so that a machine that changes its speed changes it for all, and times are processor seconds of
this process, which other work on the machine hardly lengthens.

    python -m benchmarks.backward_blocks --output benchmarks/results/backward_blocks.json

By default once for a model whose time goes into matrix products, as it does for models that people train, and once for
the demo's, which is so narrow that much of it goes elsewhere; the bar is for the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import PreTrainedModel

from badam import phases
from badam.plan import ModelSpec, Plan
from badam.profiling.machine import this_machine
from badam.training.build import build_model, build_optimizer, prepare_checkpointing, prepare_model
from badam.training.losses import forward_loss
from badam.vocabulary import Phase
from badam_planner.search.model_spec import describe_model
from badam_planner.search.planner import Request, make_plan
from badam_planner.sources.target import find_target

WITHIN_BACKWARD = (Phase.BACKWARD, Phase.RECOMPUTE)
BAR = 0.15

WIDE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_size": 768,
    "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 12,
    "max_position_embeddings": 1024, "pad_token_id": 0,
}  # fmt: skip
NARROW = "badam/demo-llama-12m"
SIZES = {"wide": (2, 256), "narrow": (4, 128)}
"""Sequences and tokens of a batch."""


class BackwardClock:
    """Processor seconds spent in backward, recomputation included; told of phases as they change."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def phase_changes(self, previous: Phase, _phase: Phase) -> None:
        now = time.process_time()
        if previous in WITHIN_BACKWARD:
            self.seconds += now - self._since
        self._since = now

    def take(self) -> float:
        """The seconds since the last call."""
        taken, self.seconds = self.seconds, 0.0
        return taken


def spec_of(which: str) -> ModelSpec:
    """The model called ``wide`` or ``narrow``."""
    if which == "narrow":
        return describe_model(NARROW)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama-8-layers.json"
        path.write_text(json.dumps(WIDE), encoding="utf-8")
        return describe_model(str(path))


def plan_for(which: str) -> Plan:
    """A plan by layers with checkpointing, one step per visit."""
    batch_size, seq_len = SIZES[which]
    request = Request(
        spec=spec_of(which),
        target=find_target("cpu"),
        partition="layer",
        checkpointing="all",
        loss="full",
        batch_size=batch_size,
        seq_len=seq_len,
        switch_every=1,
        switch_mode="ascending",
    )
    plan = make_plan(request).plan
    assert plan is not None, "a model of this size fits"
    return plan


def measure(plan: Plan, rounds: int) -> dict[str, float]:
    """Median seconds of backward by block, after a round of warming up."""
    torch.manual_seed(0)
    model = cast(PreTrainedModel, build_model(plan.model, plan.training))
    prepare_model(model, plan)
    optimizer = build_optimizer(model, plan, start_block=0)
    prepare_checkpointing(model, optimizer, plan)
    names = [block.name for block in plan.partition.blocks]
    shape = (plan.training.batch_size, plan.training.seq_len)
    tokens = torch.randint(3, int(plan.model.config["vocab_size"]), shape)
    clock = BackwardClock()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with phases.listening(clock.phase_changes):
        for step in range((rounds + 1) * len(names)):
            loss = forward_loss(model, {"input_ids": tokens, "labels": tokens.clone()}, "full")
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            phases.enter(Phase.STEP)
            taken = clock.take()
            if step >= len(names):
                seconds[names[step % len(names)]].append(taken)
            del loss
            optimizer.step()
            optimizer.zero_grad()
            phases.enter(Phase.SETUP)
    return {name: statistics.median(found) for name, found in seconds.items()}


def shares(plan: Plan, measured: dict[str, float]) -> dict[str, float]:
    """The plan's seconds by block: the measured sum, shared out by predicted work."""
    work = {block.name: block.backward_relative or 0.0 for block in plan.partition.blocks}
    scale = sum(measured.values()) / sum(work.values())
    return {name: scale * amount for name, amount in work.items()}


def compared(which: str, rounds: int) -> dict[str, Any]:
    """Measure one model and print a line per block."""
    plan = plan_for(which)
    measured = measure(plan, rounds)
    planned = shares(plan, measured)
    ratios = {name: measured[name] / planned[name] for name in measured}
    for name, ratio in ratios.items():
        times = f"measured {measured[name] * 1e3:7.1f} ms  plan {planned[name] * 1e3:7.1f} ms"
        print(f"{which:8} {name:20} {times}  {ratio:.3f}")
    batch_size, seq_len = SIZES[which]
    return {
        "model": plan.model.id, "batch_size": batch_size, "seq_len": seq_len,
        "measured_seconds": measured, "planned_seconds": planned, "ratios": ratios,
        "worst_ratio": max(ratios.values(), key=lambda ratio: abs(ratio - 1)),
    }  # fmt: skip


def main() -> None:
    """Measure both models; ends with 1 if a block of the first is beyond the bar."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="steps of each block; the median counts")
    parser.add_argument("--only", choices=SIZES)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {which: compared(which, options.rounds) for which in SIZES if options.only in (None, which)}
    for which, result in found.items():
        print(
            f"{which}: worst block {result['worst_ratio']:.3f} of the plan; the bar is {1 - BAR:.2f} to {1 + BAR:.2f}"
        )
    if options.output is not None:
        machine = this_machine(torch.device("cpu"))
        record = {
            "what": "median backward seconds of each block, recomputation included, measured and as planned",
            "rounds": options.rounds, "results": found, "machine": f"{machine.device_name}, one thread",
            "versions": {name: version(name) for name in ("badam", "torch", "transformers")},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    raise SystemExit("wide" in found and abs(found["wide"]["worst_ratio"] - 1) > BAR)


if __name__ == "__main__":
    main()
