"""The documentation's page about the CPU, from records. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from badam.vocabulary import Phase
from benchmarks.cpu.cases import HIDDEN, LAYERS, LENGTHS, VOCABULARY, Case
from benchmarks.cpu.record import Outcome

BAR = 0.005

HEAD = """# Accuracy on CPU

Written by `python -m benchmarks.cpu_accuracy` from the records in `benchmarks/records/cpu`: {architectures}
architectures ({layers} layers, hidden size {hidden}, vocabulary {vocabulary}), every method but qlora,
activation checkpointing on and off, {short} and {long} tokens, batch {batch}, bf16. Each case is planned by
`badam-plan`, trained by `badam-train` until every block was visited and whatever the method keeps was made, and
compared by `badam-report`. The peak is measured by the CPU allocator's own events, which know nothing of the
prediction. The error is predicted less measured, as a share of the measured bytes.

{machine}; {versions}; {dates}.

"""

CAUSES = """
## What is left

The same step without the trainer around it is predicted to the byte; tests hold that for blocks by layer, by attention
and MLP and by matrix, for both losses, and for classification. A run adds:

* **128 B**: the two code tables, of 16 fp32 numbers each, that bitsandbytes makes when PEFT imports it.
* **20 to 100 B**: scalars that Hugging Face's loop holds while a step runs: the running loss, the losses since the last
  log, the norm of the gradient, the number of label tokens.

None of these matters for a model that anyone needs a plan for. Three more are larger, below the peak:

* Kernels of the CPU take scratch memory inside an operator, which never becomes a tensor: packed matrices, blocks of
  attention, and, where an operator mixes bf16 with fp32 as LoRA's sum of a layer and its adapter does, a copy in the
  common type. Only the peak within a phase that has nothing larger shows it. It is not modelled and says nothing about
  a card, whose kernels' own scratch is listed in [memory-model.md](memory-model.md).
* lisa: the plan's figures by phase are those of the draw of layers whose peak is highest; other draws may have more in
  another phase.
* Between steps (the phase *setup*, left out below) the rehearsal makes the first update with bare gradients.

The peak within a phase explains an error and is not judged. {phases}
"""

NOT_HERE = """
## Not in the table

* T5, Whisper and ViT: held by the tests of the rehearsal; badam-train has no data formats for them.
* Encoders for classification (BERT, RoBERTa, DeBERTa-v3, ModernBERT): held by the tests of the rehearsal, without the
  commands.
* qlora: held within 0.2 % by the tests of the rehearsal, without the commands.
"""


def page(outcomes: Sequence[Outcome], cases: Sequence[Case]) -> str:
    """The whole page; what has not been measured, or was refused, is said."""
    known = {one.name: one for one in outcomes}
    here = [known[case.name] for case in cases if case.name in known]
    measured = [one for one in here if one.allocated is not None]
    if not measured:
        return "# Accuracy on CPU\n\nNothing has been measured yet: `python -m benchmarks.cpu_accuracy`.\n"
    return "".join(
        (
            _head(measured),
            _verdict(measured, len(cases)),
            "\n## By architecture\n\n",
            _table("architecture", measured, lambda one: one.architecture),
            "\n## By method\n\n",
            _table("method", measured, lambda one: one.method),
            "\n## The largest errors\n\n",
            _largest(measured),
            CAUSES.format(phases=_phases(measured)),
            NOT_HERE,
            *(f"* {one.name}: {_sentence(one.refusal)}\n" for one in here if one.refusal),
        )
    )


def _head(measured: Sequence[Outcome]) -> str:
    versions = measured[-1].versions
    dates = sorted({one.date[:10] for one in measured})
    return HEAD.format(
        architectures=len({one.architecture for one in measured}),
        layers=LAYERS, hidden=HIDDEN, vocabulary=VOCABULARY, short=LENGTHS[0], long=LENGTHS[1],
        batch=measured[0].batch_size,
        machine=" and ".join(sorted({one.machine for one in measured})) + ", one thread",
        versions=", ".join(f"{name} {version.split('+')[0]}" for name, version in versions.items()),
        dates=dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
    )  # fmt: skip


def _verdict(measured: Sequence[Outcome], asked: int) -> str:
    worst = max(measured, key=lambda one: abs(one.worst_error))
    within = sum(abs(one.worst_error) <= BAR for one in measured)
    median = statistics.median(one.peak_error for one in measured)
    return (
        f"**{within} of {len(measured)} measured cases have every judged peak (of the run and of each block) within "
        f"{BAR:.1%}.** The largest error is {worst.worst_error:+.4%} ({worst.name}, {worst.worst_name}); the median "
        f"error of the run's peak is {median:.4%}. {asked - len(measured)} of {asked} cases have no measurement"
        f"{'.' if asked == len(measured) else ': not run yet, or refused, see below.'}\n"
    )


def _table(title: str, measured: Sequence[Outcome], key: Callable[[Outcome], str]) -> str:
    lines = [
        f"| {title} | cases | median error | worst error | worst in bytes | in case |\n|---|---|---|---|---|---|\n"
    ]
    for name in dict.fromkeys(map(key, measured)):
        own = [one for one in measured if key(one) == name]
        worst = max(own, key=lambda one: abs(one.worst_error))
        median = statistics.median(one.peak_error for one in own)
        lines.append(
            f"| {name} | {len(own)} | {median:.4%} | {worst.worst_error:+.4%} | {_bytes(worst)} | {worst.name} |\n"
        )
    return "".join(lines)


def _largest(measured: Sequence[Outcome], count: int = 12) -> str:
    ordered = sorted(measured, key=lambda one: -abs(one.worst_error))[:count]
    rows = (f"| {one.name} | {one.worst_name} | {one.worst_error:+.4%} | {_bytes(one)} |\n" for one in ordered)
    return "| case | peak | error | of the run's peak, in bytes |\n|---|---|---|---|\n" + "".join(rows)


def _bytes(outcome: Outcome) -> str:
    error = outcome.allocated.error_bytes if outcome.allocated else None
    return "-" if error is None else f"{error:+,} of {outcome.allocated.measured:,}" if outcome.allocated else "-"


def _phases(measured: Sequence[Outcome]) -> str:
    """The largest error of the peak within each phase."""
    found: dict[Phase, tuple[float, str]] = {}
    for one, phase, error in _phase_errors(measured):
        if phase not in found or abs(error) > abs(found[phase][0]):
            found[phase] = error, one.name
    words = ", ".join(f"{phase.value} {found[phase][0]:+.2%} ({found[phase][1]})" for phase in Phase if phase in found)
    return f"Their largest errors: {words}."


def _phase_errors(measured: Iterable[Outcome]) -> Iterable[tuple[Outcome, Phase, float]]:
    for one in measured:
        for phase, sides in one.phases.items():
            if phase is not Phase.SETUP and sides.error is not None:
                yield one, phase, sides.error


def _sentence(refusal: str) -> str:
    return " ".join(refusal.replace("error: ", "").split())
