from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from badam.errors import StateError
from badam.optim.ratio import BlockOptimizerRatio


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def loss(self, seed: int) -> Tensor:
        batch = torch.randn(4, self.first.in_features, generator=torch.Generator().manual_seed(seed))
        output: Tensor = self.second(torch.tanh(self.first(batch.to(self.first.weight.dtype))))
        return output.float().square().mean()


def net(width: int = 16) -> Net:
    torch.manual_seed(0)
    return Net(width).to(torch.bfloat16)


def build(model: nn.Module, **options: Any) -> BlockOptimizerRatio:
    settings: dict[str, Any] = {"update_ratio": 0.2, "switch_every": 4, "preserve_threshold": 4, "lr": 1e-2}
    groups = [{"params": [p for p in model.parameters() if p.dim() == dim]} for dim in (1, 2)]
    return BlockOptimizerRatio(groups, model.named_parameters(), **{**settings, "verbose": 0, **options})


def train(model: Net, optimizer: BlockOptimizerRatio, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = model.loss(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


OPTIONS: list[dict[str, Any]] = [
    {},
    {"mask_mode": "scatter"},
    {"mask_mode": "scatter", "keep_mask": False, "scatter_run": 1},
    {"gradient_release": True},
    {"base_optimizer": torch.optim.AdamW},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("stop", [0, 2, 4, 5, 8])
def test_training_continues_bit_identically(options: dict[str, Any], stop: int) -> None:
    model = net()
    optimizer = build(model, **options)
    train(model, optimizer, range(stop))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(model, optimizer, range(stop, stop + 10))

    resumed = net()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    other = build(resumed, **{**options, "seed": 5, "lr": 123.0, "switch_every": 1})
    other.load_state_dict(saved["optimizer"])  # before the model's weights: some hosts do it in this order
    resumed.load_state_dict(saved["model"])
    assert train(resumed, other, range(stop, stop + 10)) == expected
    for found, wanted in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert (other.global_step, other.visit, other.steps_in_visit) == (
        optimizer.global_step,
        optimizer.visit,
        optimizer.steps_in_visit,
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_a_round_trip_changes_nothing_even_before_the_first_step(options: dict[str, Any]) -> None:
    model, twin = net(), net()
    optimizer, other = build(model, **options), build(twin, **options)
    for step in range(6):
        optimizer.load_state_dict(optimizer.state_dict())
        assert train(model, optimizer, range(step, step + 1)) == train(twin, other, range(step, step + 1))


def test_a_loaded_optimizer_shares_no_memory_with_the_saved_state() -> None:
    model = net()
    optimizer = build(model, switch_every=0)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    resumed = copy.deepcopy(model)
    other = build(resumed, switch_every=0)
    other.load_state_dict(state)
    train(resumed, other, range(2, 4))
    for index, entry in kept["state"].items():
        assert torch.equal(entry["exp_avg"], state["state"][index]["exp_avg"])
    for name, master in kept["badam_ratio"]["masters"].items():
        assert torch.equal(master, state["badam_ratio"]["masters"][name])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: build(net(), update_ratio=0.4),
            "first.bias trains 3 of 16 entries in runs of 1 there, 6 of 16 in runs of 1 here",
        ),
        (lambda: build(net(20)), "of 16 entries in runs of 1 there, 4 of 20"),
        (lambda: build(net(), mask_mode="scatter"), "mask_mode 'adjacent'; this optimizer has 'scatter'"),
        (lambda: build(net(), base_optimizer=torch.optim.SGD), "rule 'AdamW'; this optimizer has 'SGD'"),
        (lambda: BlockOptimizerRatio([net().first.weight], [("other", nn.Parameter(torch.ones(1)))]), "there, 1 here"),
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(other: Any, message: str) -> None:
    model = net()
    optimizer = build(model)
    train(model, optimizer, range(3))
    target = other()
    with pytest.raises(StateError, match=message):
        target.load_state_dict(optimizer.state_dict())
    assert target.global_step == 0
    assert not target.state


def test_a_state_that_was_cut_is_refused() -> None:
    optimizer = build(net())
    state = optimizer.state_dict()
    del state["badam_ratio"]["visit"]
    with pytest.raises(StateError, match="lacks 'visit'; it was not saved completely"):
        optimizer.load_state_dict(state)
    state["badam_ratio"]["format"] = 99
    with pytest.raises(StateError, match="has format 99; this version reads 2"):
        optimizer.load_state_dict(state)


def test_another_grouping_is_refused() -> None:
    model = net()
    names = dict(model.named_parameters())
    order = ["first.bias", "second.bias", "first.weight", "second.weight"]
    optimizer = build(model)
    one = BlockOptimizerRatio([names[n] for n in order], names.items(), 0.2, 0, preserve_threshold=4)
    with pytest.raises(StateError, match=r"groups of \[2, 2\] parameters; here they have \[4\]"):
        one.load_state_dict(optimizer.state_dict())


def test_the_state_of_a_plain_optimizer_is_refused() -> None:
    model = net()
    plain = torch.optim.AdamW(model.parameters())
    model.loss(0).backward()
    plain.step()
    with pytest.raises(StateError, match="not written by BlockOptimizerRatio"):
        build(net()).load_state_dict(plain.state_dict())


def state_of_1_4(sizes: tuple[int, ...] = (2, 2)) -> dict[str, Any]:
    """As badam 1.4 writes it: bf16 moments of the masked entries, and no word of where they are."""
    moments = {"exp_avg": torch.zeros(51, dtype=torch.bfloat16), "exp_avg_sq": torch.zeros(51, dtype=torch.bfloat16)}
    options = {"lr": 3e-4, "betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.1}
    groups, first = [], 0
    for size in sizes:
        groups.append({**options, "params": list(range(first, first + size))})
        first += size
    return {"state": {0: {"step": 7, **moments}, 1: {}}, "param_groups": groups}


def test_of_a_1_4_state_the_options_are_taken_and_the_rest_is_named() -> None:
    optimizer = build(net())
    with pytest.warns(UserWarning, match="does not hold the step, the windows' positions or fp32 masters"):
        optimizer.load_state_dict(state_of_1_4())
    assert [(group["lr"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (3e-4, (0.8, 0.9), 0.1)
    ] * 2
    assert optimizer.global_step == 0
    with pytest.raises(StateError, match=r"groups of \[4\] parameters; here they have \[2, 2\]"):
        optimizer.load_state_dict(state_of_1_4((4,)))
