"""A run's requests beside the predicted ones: what differs at the peak, and where the order differs. Pure."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from badam.vocabulary import Phase
from benchmarks.null_cuda.history import Request, Simulation
from benchmarks.null_cuda.product import Predicted, PredictedEvent

PARTS = {
    Phase.FORWARD: "forward",
    Phase.LOSS: "forward",
    Phase.BACKWARD: "backward",
    Phase.RECOMPUTE: "backward",
    Phase.STEP: "update",
    Phase.SWITCH: "switch",
}
"""Parts of an optimizer step that are compared one by one."""


def differences_at_peak(measured: Simulation, predicted: Predicted, top: int) -> Iterator[str]:
    """Sizes of which not as many are alive at the measured peak as at the predicted one, with who made them."""
    surplus: Counter[int] = Counter()
    who: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for request, _ in measured.at_peak:
        surplus[request.rounded] += 1
        who[request.rounded][f"measured:  {request.phase} {request.operator}"] += 1
    for nbytes, _, what in predicted.at_peak:
        surplus[nbytes] -= 1
        who[nbytes][f"predicted: {what}"] += 1
    rest = [
        sum(block - request.rounded for request, block in measured.at_peak),
        sum(block - nbytes for nbytes, block, _ in predicted.at_peak),
    ]
    yield f"ends of blocks that are not split off: measured {rest[0]:,}, predicted {rest[1]:,}"
    for nbytes, count in sorted(surplus.items(), key=lambda item: -abs(item[0] * item[1]))[:top]:
        if count:
            yield f"{count:+d} × {nbytes:,} = {count * nbytes:+,}"
            for text, times in who[nbytes].most_common(6):
                yield f"    {times} × {text}"


def unpredicted_sizes(requests: Sequence[Request], predicted: Predicted, least: int, top: int) -> Iterator[str]:
    """Requests of sizes that the prediction has none of, largest first."""
    known = {abs(event.nbytes) for event in predicted.events}
    found: Counter[tuple[int, str, str]] = Counter()
    for request in requests:
        if request.action == "take" and request.nbytes >= least and request.rounded not in known:
            found[request.nbytes, str(request.phase), request.operator] += 1
    for (nbytes, phase, name), times in sorted(found.items(), key=lambda item: -item[0][0])[:top]:
        yield f"{nbytes:,} B, {times} ×, {phase}: {name}"


@dataclass(frozen=True, slots=True)
class Step:
    """The requests of one optimizer step of the run, or the last one of a rehearsal, as signed bytes with a text."""

    parts: dict[str, list[tuple[int, str]]]


def measured_step(requests: Sequence[Request], step: int) -> Step:
    """One optimizer step of a run, by part."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for request in requests:
        if request.step == step and request.action != "empty cache" and request.phase in PARTS:
            sign = 1 if request.action == "take" else -1
            entry = sign * request.rounded, f"{request.phase} {request.operator}"
            parts.setdefault(PARTS[request.phase], []).append(entry)
    return Step(parts)


def predicted_step(events: Sequence[PredictedEvent]) -> Step:
    """The last optimizer step of a rehearsal, by part: what comes after the last part of the same name began."""
    parts: dict[str, list[tuple[int, str]]] = {}
    before = ""
    for event in events:
        part = PARTS.get(event.phase, "")
        if part and part != before:
            parts[part] = []
        if part:
            parts[part].append((event.nbytes, f"{event.phase} {event.what}"))
        before = part
    return Step(parts)


def differences_in_order(measured: Step, predicted: Step, least: int, top: int) -> Iterator[str]:
    """By part of the step: how many events of ``least`` bytes and more come in the same order, and what does not."""
    for part in ("forward", "backward", "update", "switch"):
        real, ours = (
            [event for event in step.parts.get(part, []) if abs(event[0]) >= least] for step in (measured, predicted)
        )
        if not real and not ours:
            continue
        matcher = difflib.SequenceMatcher(None, [size for size, _ in real], [size for size, _ in ours], autojunk=False)
        blocks = [code for code in matcher.get_opcodes() if code[0] != "equal"]
        same = len(real) - sum(end - start for _, start, end, _, _ in blocks)
        yield f"{part}: {same} of {len(real)} measured events are predicted in this order, of {len(ours)} predicted"
        for _, start, end, first, last in blocks[:top]:
            yield f"  at measured event {start}, predicted event {first}"
            yield from (f"    measured  {size:+,} {text}" for size, text in real[start:end][:top])
            yield from (f"    predicted {size:+,} {text}" for size, text in ours[first:last][:top])
        if len(blocks) > top:
            yield f"  and {len(blocks) - top} more"
