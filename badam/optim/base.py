"""What the block optimizer and the ratio optimizer share: both wrap a base optimizer and train in visits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch.distributed
from torch.optim import Optimizer


class VisitingOptimizer(Optimizer):
    """An optimizer that trains one part of a model for K steps, a *visit*, and then moves on to another part.

    Args:
        groups: parameter groups, shared with ``base_optimizer`` if there is one.
        defaults: options of groups that do not set their own.
        base_optimizer: whose update rule runs in a visit; None if the subclass has a rule of its own.
        messages: where to announce visits.
    """

    # Class attributes, because subclasses read them before torch's constructor has run.
    global_step: int = 0
    visit: int = 0
    steps_in_visit: int = 0
    non_finite_steps: int = 0
    _is_built: bool = False

    def __init__(
        self,
        groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        *,
        base_optimizer: Optimizer | None,
        messages: Messages,
    ) -> None:
        self._base_optimizer = base_optimizer
        self._messages = messages
        self._switch_hooks: list[Callable[[Any], None]] = []
        super().__init__(groups, defaults)
        self._is_built = True
        self._share_with_base()

    @property
    def base_optimizer(self) -> Optimizer | None:
        """The optimizer that runs within a visit, if it is not this one's own rule."""
        return self._base_optimizer

    @property
    def verbose(self) -> int:
        """0 prints nothing, 1 announces visits and skipped steps, 2 also lists what is trained."""
        return self._messages.verbose

    @property
    def log_fn(self) -> Callable[[str], Any] | None:
        """Called with each message; None where they are printed."""
        return self._messages.log_fn

    def register_switch_hook(self, hook: Callable[[Self], None]) -> Callable[[], None]:
        """Call ``hook(self)`` now and after every switch; returns a function that removes the hook."""
        self._switch_hooks.append(hook)
        hook(self)
        return lambda: self._switch_hooks.remove(hook)

    def train(self) -> None:
        """Passed on to a base optimizer that has this method, as schedule-free ones do."""
        getattr(self._base_optimizer, "train", lambda: None)()

    def eval(self) -> None:
        """Passed on to a base optimizer that has this method, as schedule-free ones do."""
        getattr(self._base_optimizer, "eval", lambda: None)()

    def _share_with_base(self) -> None:
        """Use the base optimizer's groups, state and defaults; again whenever it has replaced them by loading."""
        if self._base_optimizer is not None:
            self.param_groups = self._base_optimizer.param_groups
            self.state = self._base_optimizer.state
            self.defaults = self._base_optimizer.defaults

    def _call_switch_hooks(self) -> None:
        for hook in list(self._switch_hooks):
            hook(self)


class Messages:
    """Passes messages to the caller's function, or prints them on rank 0; says nothing at verbosity 0.

    Args:
        verbose: from which level on to speak.
        log_fn: called with each message.
    """

    def __init__(self, verbose: int, log_fn: Callable[[str], Any] | None) -> None:
        self.verbose = verbose
        self.log_fn = log_fn

    def say(self, message: str, *, verbose: int | None = None, level: int = 1) -> None:
        """Say ``message`` if the verbosity (``verbose`` if given) is at least ``level``."""
        if (self.verbose if verbose is None else verbose) < level:
            return
        if self.log_fn is not None:
            self.log_fn(message)
        elif not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print(message)


def rounding_seed_of(seed: int, visit: int) -> int:
    """The seed of stochastic rounding at the end of ``visit``.

    It differs from visit to visit and depends on saved numbers only, so that a resumed run rounds alike.
    """
    return (seed * 0x9E3779B97F4A7C15 + visit * 0xD1B54A32D192ED03 + 1) % 2**63


def plain_options(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The options of each group as far as they are plain: learning rate, decay and the like."""
    plain = (bool, int, float, str, tuple, type(None))
    return [
        {key: value for key, value in group.items() if key != "params" and isinstance(value, plain)} for group in groups
    ]


def innermost_optimizer(optimizer: Any) -> Any:
    """The optimizer that a host was given, out of the wrappers that accelerate and DeepSpeed put around it."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def hides_gradients(optimizer: Any) -> bool:
    """Whether only ``optimizer`` itself can clip its gradients, because ``parameter.grad`` does not hold them."""
    return bool(getattr(optimizer, "hides_gradients", False))
