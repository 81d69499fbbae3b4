"""The closed forms as the report words them."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from badam.training.methods import method_of
from badam.vocabulary import Method
from badam_planner.report.formulas import FORMULAS, formulas_in_words, letters_in_words
from badam_planner.report.terminal.plan import render_candidates
from badam_planner.search.result import SearchResult
from tests.badam_planner import factories
from tests.badam_planner.report.rendering import render


@pytest.mark.parametrize("method", get_args(Method))
def test_the_words_give_what_the_method_computes(method: Method) -> None:
    parameters, quantized = 64_000, 64 * 256 * 3
    blocks, trained = (1, parameters) if method == "adam" else (8, 500)  # it trains everything at a time
    term = re.sub(r"(\d)([MTQ])", r"\1*\2", FORMULAS[method])
    value = eval(term, {"M": parameters, "D": blocks, "T": trained, "Q": quantized})
    exactly = method_of(method).state_bytes(parameters, trained, blocks, quantized=quantized)
    assert value == (pytest.approx(exactly, rel=2e-4) if method == "qlora" else exactly)


def test_methods_of_one_form_stand_together() -> None:
    assert formulas_in_words(["badam", "lomo", "hift", "badam"]) == "2M+16M/D (badam, hift), 2M (lomo)"


def test_only_letters_that_occur_are_explained() -> None:
    assert letters_in_words(["lora", "lomo"]) == "M parameters, T entries trained at a time"
    assert letters_in_words(["qlora"]).endswith("Q entries in 4 bits")


def test_a_table_of_several_methods_names_no_form_for_all() -> None:
    result = factories.search_result(factories.candidate(), factories.candidate(method="lomo"))
    result = SearchResult(
        **{**{name: getattr(result, name) for name in result.__slots__}, "left_out": (("qlora", "No card."),)}
    )
    for width in (80, 120):
        text = " ".join(render(render_candidates(result), width).split())
        header = text.split("─")[0]
        assert "states" in header
        assert "2M" not in header
        assert "2M+16M/D (badam), 2M (lomo)" in text
        assert "left out: qlora. No card." in text
