"""Which module ran when, in forward, recomputation and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from badam import phases
from badam.checkpointing import checkpoint_layers
from badam.profiling.modules.watch import ModuleWatch, SpanIndices
from badam.vocabulary import Phase
from tests.conftest import ModelFactory

LAYERS = 3


class Boundaries:
    """Counts them, and remembers what a test wants to place between them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def watched(model: nn.Module, inputs: Tensor, boundaries: Boundaries | None = None) -> list[SpanIndices]:
    """The spans of one step without an update."""
    watch = ModuleWatch(model, boundaries or Boundaries())
    with phases.listening(watch.phase_begins):
        phases.enter(Phase.FORWARD)
        watch.begin()
        output = model(inputs)
        loss = (output if isinstance(output, Tensor) else output.logits).float().sum()
        phases.enter(Phase.BACKWARD)
        loss.backward()
        phases.enter(Phase.STEP)
        spans = watch.end()
    phases.enter(Phase.SETUP)
    watch.remove()
    return spans


def named(spans: list[SpanIndices], phase: Phase) -> list[str]:
    ordered = sorted(spans, key=lambda span: (span.begin, -span.end, span.module))
    return [span.module for span in ordered if span.phase is phase]


def tokens() -> Tensor:
    return torch.arange(16).reshape(2, 8)


def test_every_module_is_seen_once_in_forward_and_once_in_backward(tiny_llama: ModelFactory) -> None:
    model = tiny_llama()
    spans = watched(model, tokens())
    forward, backward = named(spans, Phase.FORWARD), named(spans, Phase.BACKWARD)
    layers = [f"model.layers.{index}" for index in range(LAYERS)]
    assert [name for name in forward if name in layers] == layers
    assert [name for name in backward if name in layers] == layers[::-1]
    assert len(set(forward)) == len(forward)
    assert len(set(backward)) == len(backward)
    expected = {name for name, module in model.named_modules() if type(module).forward is not nn.Module.forward}
    assert set(forward) == expected  # "" is the phase
    assert set(backward) == expected - {"model.rotary_emb"}  # which has nothing to differentiate


def test_spans_lie_inside_one_another_or_apart(tiny_llama: ModelFactory) -> None:
    model = tiny_llama()
    checkpoint_layers(model, [f"model.layers.{index}" for index in range(LAYERS)])
    boundaries = Boundaries()
    spans = watched(model, tokens(), boundaries)
    open_until: list[int] = []
    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        while open_until and open_until[-1] <= span.begin:
            open_until.pop()
        assert not open_until or span.end <= open_until[-1]
        open_until.append(span.end)
    assert min(span.begin for span in spans) == 0
    assert max(span.end for span in spans) == boundaries.count - 1


def test_backward_is_seen_down_to_the_active_block_only(tiny_llama: ModelFactory) -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    model.get_submodule("model.layers.1").requires_grad_(True)
    names = named(watched(model, tokens()), Phase.BACKWARD)
    assert "model.layers.2" in names
    assert "model.layers.1.self_attn.q_proj" in names
    assert not any(name.startswith(("model.layers.0", "model.embed")) for name in names)


def test_a_recomputation_stands_in_the_backward_of_its_layer(tiny_llama: ModelFactory) -> None:
    model = tiny_llama()
    checkpoint_layers(model, ["model.layers.0", "model.layers.2"])
    spans = watched(model, tokens())
    recomputed = [span for span in spans if span.phase is Phase.RECOMPUTE]
    assert {span.module for span in recomputed if span.module.count(".") == 2} == {"model.layers.0", "model.layers.2"}
    for span in recomputed:
        (layer,) = (
            one for one in spans if one.phase is Phase.BACKWARD and one.module == ".".join(span.module.split(".")[:3])
        )
        assert layer.begin <= span.begin
        assert span.end <= layer.end
    parts = [span.module for span in spans if span.phase is Phase.BACKWARD]
    assert "model.layers.2.self_attn.v_proj" in parts


@pytest.mark.parametrize("reentrant", [False, True])
def test_watching_changes_no_gradient(tiny_llama: ModelFactory, reentrant: bool) -> None:
    gradients = []
    for watching in (False, True):
        model = tiny_llama(dtype=torch.float32)
        checkpoint_layers(model, ["model.layers.1"], use_reentrant=reentrant)
        if watching:
            watched(model, tokens())
        else:
            model(tokens()).logits.float().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_what_happens_between_two_modules_belongs_to_neither() -> None:
    boundaries = Boundaries()
    seen: list[int] = []

    class Between(torch.autograd.Function):
        @staticmethod
        def forward(_context: Any, value: Tensor) -> Tensor:
            return value * 1

        @staticmethod
        def backward(_context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(boundaries.count - 1)  # the last boundary before
            return gradient

    class Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, value: Tensor) -> Tensor:
            result: Tensor = self.out(Between.apply(self.into(value)))
            return result

    spans = watched(nn.Sequential(Core()), torch.ones(2, 4), boundaries)
    around = [span.module for span in spans if span.phase is Phase.BACKWARD and span.begin <= seen[0] < span.end]
    assert sorted(around) == ["", "0"]


def test_an_error_in_a_step_does_not_disturb_the_next() -> None:
    class Sometimes(nn.Module):
        fails = True

        def forward(self, value: Tensor) -> Tensor:
            if self.fails:
                raise ValueError("no")
            return value * 2

    model = nn.Sequential(nn.Linear(4, 4), Sometimes())
    watch = ModuleWatch(model, Boundaries())
    phases.enter(Phase.FORWARD)
    watch.begin()
    with pytest.raises(ValueError, match="no"):
        model(torch.ones(1, 4))
    Sometimes.fails = False
    watch.begin()
    model(torch.ones(1, 4))
    assert named(watch.end(), Phase.FORWARD) == ["", "0", "1"]
    phases.enter(Phase.SETUP)
    watch.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
