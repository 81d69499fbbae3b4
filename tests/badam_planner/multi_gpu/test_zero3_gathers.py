"""DeepSpeed's bookkeeping of gathered matrices, followed step by step over a few modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from badam.blocks.names import ParameterInfo
from badam_planner.multi_gpu.module_uses import Use
from badam_planner.multi_gpu.slots import Slot
from badam_planner.multi_gpu.zero3_gathers import Gathered, Gathers, Rules
from badam_planner.recording.recording import TensorRole

MODULES = ("a", "b", "c")
MATRICES = {name: ParameterInfo(f"{name}.weight", (4, 4)) for name in MODULES}
RULES = Rules(
    parameters={name: (info,) for name, info in MATRICES.items()},
    trained=frozenset(["a.weight"]),
    kept=frozenset(),
    shards=2,
    ahead_numel=16,
    live_numel=48,
)
PASS = 100


def through(modules: Iterable[str], *, start: int = PASS, is_forward: bool = True) -> list[Use]:
    """One module after the other, a hundred ticks each."""
    uses = []
    for place, module in enumerate(modules):
        begin = start + PASS * place
        uses += [Use(begin, module, is_forward, fetches=True), Use(begin + 50, module, is_forward, fetches=False)]
    return uses


def whole(gathers: Gathers, name: str) -> list[Gathered]:
    return [one for one in gathers.found if one.parameter == f"{name}.weight"]


def test_the_first_module_is_gathered_when_it_is_needed_and_the_next_ahead() -> None:
    gathers = Gathers(through("abc"), RULES)
    assert [one.born for name in "abc" for one in whole(gathers, name)] == [
        PASS + Slot.ASKED_FOR,
        PASS + Slot.FIRST,  # during a
        2 * PASS + Slot.FIRST,  # during b
    ]
    assert [one.numel for one in gathers.found] == [16, 16, 16]


def test_a_matrix_goes_when_its_module_is_left() -> None:
    gathers = Gathers(through("abc"), RULES)
    assert [one.died for name in "abc" for one in whole(gathers, name)] == [150, 250, 350]


def test_nothing_is_gathered_ahead_without_room() -> None:
    gathers = Gathers(through("abc"), replace(RULES, ahead_numel=0))
    assert [one.born for one in gathers.found] == [PASS * number + Slot.ASKED_FOR for number in (1, 2, 3)]
    full = Gathers(through("abc"), replace(RULES, live_numel=16))
    assert [one.born for one in full.found] == [one.born for one in gathers.found]


def test_what_several_matrices_come_in_is_there_until_the_last_was_asked_for() -> None:
    gathers = Gathers(through("abc"), replace(RULES, ahead_numel=32))
    (message,) = [one for one in gathers.found if one.role is TensorRole.GATHERED_MATRICES]
    assert (message.numel, message.born, message.died) == (32, PASS + Slot.FIRST, 3 * PASS)
    assert [one.born for name in "bc" for one in whole(gathers, name)] == [2 * PASS + Slot.CUT_OUT] * 2
    assert gathers.messages == [(MATRICES["a"],), (MATRICES["b"], MATRICES["c"])]


def test_what_the_advance_meets_again_stays_for_backward() -> None:
    uses = [*through("abc"), *through("cba", start=4 * PASS, is_forward=False)]
    roomy = Gathers(uses, replace(RULES, ahead_numel=48, live_numel=96))
    assert [(one.born, one.died) for name in "ab" for one in whole(roomy, name)] == [
        (PASS + Slot.ASKED_FOR, 6 * PASS + 50),
        (2 * PASS + Slot.CUT_OUT, 5 * PASS + 50),
    ]
    assert len(whole(roomy, "c")) == 2, "the module that turns round is left before its backward begins"
    narrow = Gathers(uses, RULES)
    assert len(whole(narrow, "a")) == 2, "there is room for one matrix ahead, and that is the one of b"


def test_kept_parameters_are_never_gathered() -> None:
    gathers = Gathers(through("abc"), replace(RULES, kept=frozenset(["b.weight"])))
    assert whole(gathers, "b") == []
    assert len(gathers.messages) == 2


def test_messages_of_one_matrix_have_the_padding_and_cut_out_matrices_have_not() -> None:
    odd = {name: ParameterInfo(f"{name}.weight", (3, 3)) for name in MODULES}
    rules = replace(RULES, parameters={name: (info,) for name, info in odd.items()}, ahead_numel=18)
    gathers = Gathers(through("abc"), rules)
    assert [one.numel for one in whole(gathers, "a")] == [10]
    assert [one.numel for one in whole(gathers, "b")] == [9]
    assert [one.numel for one in gathers.found if one.role is TensorRole.GATHERED_MATRICES] == [20]


def test_what_nobody_lets_go_of_stays_until_the_micro_batch_is_over() -> None:
    uses = through("ab")[:-1]  # b is never left
    assert [one.died for one in whole(Gathers(uses, RULES), "b")] == [None]
