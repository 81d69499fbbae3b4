"""Every language model of transformers, tiny: planned and measured on the CPU. Writes docs/causal-models.md.

python -m benchmarks.causal_models [MODEL_TYPE ...]
"""

from __future__ import annotations

import multiprocessing
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "causal-models.md"
SECONDS = 180
BATCH, LENGTH, STEPS = 2, 64, 2
EQUAL_BYTES = 200
"""Up to so many: 8 for each Python number that multiplies a tensor, which autograd keeps in memory of its own."""
CLOSE = 0.005

HEAD = """# Every language model of transformers

Written by `python -m benchmarks.causal_models` with torch {torch} and transformers {transformers}. Of each of
the {total} entries that `AutoModelForCausalLM` knows, the default configuration is made tiny (four layers of 64
channels where its fields allow that, no dropout), planned for BAdam by layer in bf16 with {batch}×{length} tokens, and
trained for two steps on random data. The peak is that of the CPU allocator's own events.

| | entries |
|---|---|
| predicted to the byte, or with at most {equal} B of scalars missing | {exact} |
| within {close} % | {near} |
| further off | {far} |
| no plan, for the reason below; some tiny configurations contradict themselves | {refused} |
| planned, but training it fails | {failed} |

"""


@dataclass(frozen=True)
class Outcome:
    """What became of one model; bytes where it was planned and measured."""

    model_type: str
    kind: str
    words: str = ""
    predicted_bytes: int = 0
    measured_bytes: int = 0

    @property
    def off(self) -> int:
        """Predicted less measured, in bytes."""
        return self.predicted_bytes - self.measured_bytes


def examine(model_type: str) -> Outcome:
    """Plan one model and, if there is a plan, train it for two steps in this process."""
    import torch
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from badam.errors import BadamError, in_one_line
    from badam.plan import Target
    from badam.training.build import choose_attention
    from badam_planner.rehearsal.evaluator import Evaluator
    from badam_planner.rehearsal.model_tree import inspect_model
    from badam_planner.search.model_spec import explaining, specify
    from badam_planner.search.planner import Request, staged_plan
    from badam_planner.search.settings import MemorySetting
    from benchmarks.tiny_configs import tiny

    torch.set_num_threads(1)
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        default = AutoConfig.for_model(model_type).to_dict()
        config = tiny(model_type, default, names if isinstance(names, str) else names[0])
        spec = specify(model_type, "config", config, task="causal-lm")
        with explaining(model_type):
            attention = choose_attention(spec)
            evaluator = Evaluator(inspect_model(spec, attention))
            target = Target(gpu="cpu", total_bytes=2**40, usable_bytes=2**40)
            request = Request(spec=spec, target=target, batch_size=BATCH, seq_len=LENGTH, attention=attention)
            plan = staged_plan(request, "layer", MemorySetting("none", "full"), evaluator.tree)
            found = evaluator.worst_block(plan)
    except BadamError as error:
        return Outcome(model_type, "refused", error.message)
    except Exception as error:  # transformers refuses some configurations of its own with any error there is
        return Outcome(model_type, "refused", in_one_line(error))
    try:
        measured = _measured_bytes(plan, found.worst_block)
    except Exception as error:  # what a model's own code raises
        return Outcome(model_type, "failed", in_one_line(error))
    return Outcome(model_type, "measured", "", found.worst.peak_allocated_bytes, measured)


def _measured_bytes(plan: Any, block: int) -> int:
    """The peak of two steps with one block active, as the CPU allocator reports it."""
    import torch

    from badam import phases
    from badam.plan import Schedule
    from badam.profiling.memory.cpu import CpuMemory
    from badam.profiling.memory.states import ModelStates
    from badam.training.build import build_model, build_optimizer, prepare_checkpointing, prepare_model
    from badam.training.methods import method_of
    from badam.training.step import train_step
    from badam.training.tasks import blank_batch

    torch.manual_seed(0)
    method, memory = method_of(plan.method), CpuMemory()
    memory.start()
    before = memory.live_bytes
    model = build_model(plan.model, plan.training)
    prepare_model(model, plan)
    visit = plan.model_copy(update={"schedule": Schedule(switch_mode="ascending", switch_every=STEPS)})
    optimizer = build_optimizer(model, visit, start_block=block)
    prepare_checkpointing(model, optimizer, visit)
    memory.attach(ModelStates(model, optimizer))
    peaks = []
    with phases.listening(lambda _previous, phase: memory.phase_begins(phase)):
        for _ in range(STEPS):
            train_step(
                plan,
                method,
                model,
                optimizer,
                lambda: (_filled(blank_batch(plan, model.config)), torch.tensor(BATCH * LENGTH)),
                micro_batches=1,
            )
            peaks.append(memory.end_step(pause=False).peak_bytes)
    memory.stop()
    return max(peaks) - before


def _filled(batch: dict[str, Any]) -> dict[str, Any]:
    """``batch`` with random tokens."""
    for tensor in batch.values():
        tensor.random_(0, 96)
    return batch


def in_a_process(model_type: str) -> Outcome:
    """Examine one model in a fork of this process, whose memory nothing else shares and whose imports are done."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            return pool.apply_async(examine, (model_type,)).get(SECONDS)
        except multiprocessing.TimeoutError:
            return Outcome(model_type, "failed", f"gave no answer within {SECONDS} seconds")


def page(outcomes: list[Outcome]) -> str:
    """The document."""
    measured = [one for one in outcomes if one.kind == "measured"]
    exact = [one for one in measured if -EQUAL_BYTES <= one.off <= 0]
    near = [one for one in measured if one not in exact and abs(one.off) <= CLOSE * one.measured_bytes]
    far = [one for one in measured if one not in exact and one not in near]
    others = {kind: [one for one in outcomes if one.kind == kind] for kind in ("refused", "failed")}
    head = HEAD.format(
        torch=version("torch").split("+")[0], transformers=version("transformers"), total=len(outcomes), batch=BATCH,
        length=LENGTH, equal=EQUAL_BYTES, exact=len(exact), close=100 * CLOSE, near=len(near), far=len(far),
        refused=len(others["refused"]), failed=len(others["failed"]),
    )  # fmt: skip
    parts = [head]
    if near or far:
        parts.append("## Not to the byte\n\n| model | predicted | measured | difference |\n|---|---|---|---|\n")
        for one in sorted([*near, *far], key=lambda one: -abs(one.off) / one.measured_bytes):
            share = 100 * one.off / one.measured_bytes
            sizes = f"{one.predicted_bytes:,} | {one.measured_bytes:,} | {one.off:+,} B, {share:+.2f} %"
            parts.append(f"| {one.model_type} | {sizes} |\n")
        parts.append("\n")
    for kind, title in (("refused", "No plan"), ("failed", "Planned, but training fails")):
        if others[kind]:
            rows = "".join(f"| {one.model_type} | {one.words.replace('|', '/')[:300]} |\n" for one in others[kind])
            parts.append(f"## {title}\n\n| model | reason |\n|---|---|\n{rows}\n")
    names = ", ".join(one.model_type for one in exact)
    return "".join([*parts, f"## Predicted to the byte\n\n{names}\n"])


def main() -> None:
    """Examine all models, or those that are named, and write the page if it was all."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    outcomes = []
    for model_type in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        outcomes.append(in_a_process(model_type))
        print(outcomes[-1], file=sys.stderr, flush=True)
    text = page(outcomes)
    if not sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
