from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from badam.optim.window import Ranges, Scattered, run_length
from badam.optim.window_entries import cell_rows, cell_size, scattered_entries, window_ranges, window_size

numels = st.integers(1, 400)


@st.composite
def windows(draw: st.DrawFn) -> tuple[int, int]:
    numel = draw(numels)
    return numel, draw(st.integers(1, numel))


@given(numels, st.floats(1e-6, 1.0))
def test_a_window_has_the_nearest_number_of_entries_and_at_least_one(numel: int, ratio: float) -> None:
    size = window_size(numel, ratio)
    assert 1 <= size <= numel
    assert size == 1 or abs(size - numel * ratio) <= 0.5


@given(windows(), st.integers(0, 10**6))
def test_ranges_hold_the_window_in_order(window: tuple[int, int], visit: int) -> None:
    numel, size = window
    positions = [p for first, end in window_ranges(numel, size, visit) for p in range(first, end)]
    assert positions == [(visit * size + i) % numel for i in range(size)]


@given(windows(), st.integers(0, 40))
def test_after_any_number_of_visits_no_position_was_trained_more_than_once_more_than_another(
    window: tuple[int, int], visits: int
) -> None:
    numel, size = window
    counts = Counter(range(numel))
    for visit in range(visits):
        counts.update(p for first, end in window_ranges(numel, size, visit) for p in range(first, end))
    assert max(counts.values()) - min(counts.values()) <= 1


@given(windows(), st.integers(0, 2**31 - 1))
def test_scattering_is_a_permutation(window: tuple[int, int], key: int) -> None:
    numel, size = window
    cell = cell_size(numel, size)
    entries = torch.cat([scattered_entries(numel, cell, row, key) for row in cell_rows(numel, cell, 0, numel)])
    assert sorted(entries.tolist()) == list(range(numel))


@given(windows(), st.data())
def test_rows_may_be_cut_anywhere(window: tuple[int, int], data: st.DataObject) -> None:
    numel, size = window
    cut = data.draw(st.integers(0, numel))
    cell = cell_size(numel, size)

    def entries(first: int, end: int) -> list[int]:
        return [
            e for row in cell_rows(numel, cell, first, end) for e in scattered_entries(numel, cell, row, 7).tolist()
        ]

    assert entries(0, cut) + entries(cut, numel) == entries(0, numel)


def places(numel: int, size: int, run: int, keep: bool) -> list[Any]:
    scattered = size < numel
    return [
        Scattered(numel, size, visit, run=run, key=99, keep=keep) if scattered else Ranges(numel, size, visit)
        for visit in range(2 * math.ceil(numel / size))
    ]


@settings(deadline=None)
@given(windows(), st.sampled_from([1, 2, 4]), st.booleans())
def test_scattered_windows_train_every_entry_equally_often(window: tuple[int, int], run: int, keep: bool) -> None:
    numel, size = window[0] * run, window[1] * run
    counts = torch.zeros(numel)
    for place in places(numel, size, run, keep):
        trained = torch.zeros(numel)
        place.add_to(ones := torch.zeros(size), torch.arange(numel, dtype=torch.float32))
        assert len(set(ones.tolist())) == size
        place.write(trained, torch.ones(size))
        counts += trained
        assert counts.max() - counts.min() <= 1


@given(windows(), st.integers(0, 5), st.booleans(), st.booleans())
def test_what_is_written_to_a_place_is_read_from_it(
    window: tuple[int, int], visit: int, scatter: bool, keep: bool
) -> None:
    numel, size = window
    place = Scattered(numel, size, visit, run=1, key=3, keep=keep) if scatter else Ranges(numel, size, visit)
    flat = torch.arange(numel, dtype=torch.float32)
    values = torch.empty(size)
    place.read_into(values, flat)
    assert len(set(values.tolist())) == size
    place.write(flat, values + 1000)
    changed = torch.empty(size)
    place.read_into(changed, flat)
    assert torch.equal(changed, values + 1000)
    assert int((flat >= 1000).sum()) == size
    views = place.views(flat, values)
    assert (views is None) == scatter
    if views is not None:
        assert torch.equal(torch.cat(views[0]), changed)
        assert torch.equal(torch.cat(views[1]), values)


def test_kept_and_computed_indices_are_the_same() -> None:
    flat = torch.arange(4096, dtype=torch.float32)
    for visit in range(12):
        found = []
        for keep in (True, False):
            place = Scattered(4096, 400, visit, run=4, key=5, keep=keep)
            for _ in range(2):
                place.read_into(values := torch.empty(400), flat)
                found.append(values)
        assert all(torch.equal(values, found[0]) for values in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_runs_are_written_wherever_the_parameter_begins(dtype: torch.dtype, offset: int) -> None:
    flat = torch.zeros(4096 + offset, dtype=dtype)[offset:]
    values = torch.arange(1.0, 401.0) / 256
    place = Scattered(4096, 400, 2, run=4, key=5, keep=True)
    place.write(flat, values)
    place.read_into(found := torch.empty(400), flat)
    assert torch.equal(found, values.to(dtype).float())
    assert int((flat != 0).sum()) == 400


def test_a_scattered_window_spreads_over_the_whole_parameter() -> None:
    numel, size = 100_000, 5_000
    place = Scattered(numel, size, 3, run=1, key=11, keep=True)
    place.read_into(entries := torch.empty(size), torch.arange(numel, dtype=torch.float32))
    quarters = torch.histc(entries, bins=4, min=0, max=numel)
    assert quarters.min() > 0.24 * size
    gaps = entries.sort().values.diff()
    assert gaps.unique().numel() > 30  # a regular grid would have one
    assert (gaps == 1).float().mean() < 0.05


def test_permutations_differ_between_keys() -> None:
    def entries(key: int) -> Tensor:
        return scattered_entries(10_000, 20, (0, 0, 500), key)

    same = (entries(1) == entries(2)).float().mean()
    assert same < 0.15  # one in twenty by chance


@pytest.mark.parametrize(
    ("numel", "size", "longest", "expected"),
    [
        (2**20, 2**16, 16, 16),
        (2**20, 2**16, 1, 1),
        (2**20 + 8, 2**16, 16, 8),
        (2**20 + 1, 2**16, 16, 1),
        (64, 16, 16, 1),
    ],
)
def test_runs_divide_the_parameter_and_stay_many(numel: int, size: int, longest: int, expected: int) -> None:
    assert run_length(numel, size, longest) == expected
