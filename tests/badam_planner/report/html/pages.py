"""Pages for the tests of the HTML report, and a small reader of what a page says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from badam.profiling.modules.record import ModuleTimelines, StepModules
from badam.units import GIB, MIB
from badam.vocabulary import Category, Phase
from badam_planner.accuracy.compare import compare
from badam_planner.accuracy.comparison import Comparison
from badam_planner.report.html.model import CurvePoint, PhaseSpan, Sample, StepTimeline, TrainingCurve
from badam_planner.report.html.page import Page
from badam_planner.report.html.pages import comparison_page, plan_page
from badam_planner.search.result import SearchResult, SizeCell, SizeMap
from tests.badam_planner import factories

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'&amp;{{x}}"


def step_timeline(name: str = "model.layers.0.mlp") -> StepTimeline:
    """Four events in two phases; the peak is 14 GiB in the second."""
    heights = ((Phase.FORWARD, 1), (Phase.FORWARD, 2), (Phase.BACKWARD, 4), (Phase.BACKWARD, 1))
    samples = tuple(
        Sample(tick, phase, {Category.PARAMETER: 10 * GIB, Category.ACTIVATION: extra * GIB}, name, f"{name}: mm", MIB)
        for tick, (phase, extra) in enumerate(heights)
    )
    spans = (PhaseSpan(Phase.FORWARD, 0, 1, 12 * GIB, name), PhaseSpan(Phase.BACKWARD, 2, 3, 14 * GIB, name))
    return StepTimeline(f"One step of {name}", samples, spans, 22 * GIB)


def curve(name: str = "run", block: str = "layer") -> TrainingCurve:
    return TrainingCurve(name, tuple(CurvePoint(step, 5 - step / 4, f"{block} {step // 3}") for step in range(12)))


def modules(name: str = "model.layers.0") -> ModuleTimelines:
    """A forward of 6 ms with one module from 1 to 4 ms, and a backward to 10 ms; the peak, 14 GiB, is in the module."""
    step = StepModules(
        step=4,
        block=name,
        microseconds=(0, 1000, 4000, 6000, 10_000),
        live_bytes=(10 * GIB, 11 * GIB, 12 * GIB, 12 * GIB, 10 * GIB),
        peak_bytes=(10 * GIB, 11 * GIB, 14 * GIB, 12 * GIB, 13 * GIB),
        module=(1, 0, 0),
        phase=(0, 0, 1),
        begin=(1, 0, 3),
        end=(2, 3, 4),
    )
    return ModuleTimelines(plan_digest="", names=("", name), phases=(Phase.FORWARD, Phase.BACKWARD), steps=(step,))


def comparison(name: str = "acme/tiny-7b", **changes: Any) -> Comparison:
    plan = factories.plan(model=factories.model(name))
    return compare(plan, factories.measured_run(plan, **changes))


def several_methods(**changes: object) -> SearchResult:
    """badam fits twice, lora fits with less, adam needs 100 GiB of 23; qlora could not be planned."""
    result = factories.search_result(
        factories.candidate(recommended=True),
        factories.candidate(strategy="matrix", peak_device_bytes=22 * GIB),
        factories.candidate(
            method="adam", strategy="full", fits=False, peak_reserved_bytes=99 * GIB, peak_device_bytes=100 * GIB
        ),
        factories.candidate(method="lora", strategy="full", peak_reserved_bytes=20 * GIB, peak_device_bytes=21 * GIB),
    )
    return SearchResult(**{**{name: getattr(result, name) for name in result.__slots__}, **changes})


def sizes() -> SizeMap:
    """Two batches by two lengths: all fit but the largest, and one only with checkpointing."""
    return SizeMap(
        23 * GIB,
        1,
        512,
        (
            SizeCell(1, 512, "none", "full", 12 * GIB),
            SizeCell(1, 1024, "none", "full", 20 * GIB),
            SizeCell(2, 512, "all", "chunked", 15 * GIB),
            SizeCell(2, 1024, "", "", None),
        ),
    )


def full_plan_page() -> Page:
    return plan_page(factories.plan(), result=several_methods(), timeline=step_timeline(), sizes=sizes())


def full_comparison_page(name: str = "acme/tiny-7b") -> Page:
    return comparison_page(
        comparison(name), timeline=step_timeline(name), curve=curve(name, name), modules=modules(name)
    )


@dataclass
class Seen(HTMLParser):
    """The elements of a page: (tag, attributes) in order, and the text of its scripts."""

    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    scripts: list[tuple[dict[str, str], str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._script: dict[str, str] | None = None

    @classmethod
    def of(cls, text: str) -> Seen:
        seen = cls()
        seen.feed(text)
        return seen

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        self._script = attributes if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts.append((self._script, data))
        else:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def figures(self) -> list[dict[str, Any]]:
        (text,) = (text for attributes, text in self.scripts if attributes.get("id") == "figures")
        figures: list[dict[str, Any]] = json.loads(text)
        return figures
