"""Where the tracker believes the code to be."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from badam import phases
from badam.vocabulary import Phase
from badam_planner.rehearsal.tracker import StorageTracker


def test_backward_goes_on_in_its_module_after_an_update_inside_it() -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        tracker = StorageTracker(model)
        seen: list[tuple[Phase, str]] = []

        def update(parameter: torch.Tensor) -> None:
            with phases.within(Phase.STEP):
                seen.append((phases.current(), tracker.module))
            seen.append((phases.current(), tracker.module))

        model[1].weight.register_post_accumulate_grad_hook(update)
        phases.enter(Phase.SETUP)
        with tracker.watching():
            phases.enter(Phase.FORWARD)
            loss = model(torch.ones(2, 4)).sum()
            phases.enter(Phase.BACKWARD)
            loss.backward()
            phases.enter(Phase.STEP)
            seen.append((Phase.STEP, tracker.module))
            phases.enter(Phase.SETUP)
            phases.enter(Phase.BACKWARD)
            seen.append((Phase.BACKWARD, tracker.module))
            phases.enter(Phase.SETUP)
    assert seen == [
        (Phase.STEP, ""),  # an update belongs to no module
        (Phase.BACKWARD, "1"),
        (Phase.STEP, ""),
        (Phase.BACKWARD, "loss"),  # the next backward begins with the loss again
    ]
