"""Activation checkpointing that knows which block is active.

A checkpointed layer keeps its inputs instead of its activations and runs forward again inside backward. With one
active block that is only worth something where gradients flow: a layer below the active block builds no graph, and a
checkpoint there would keep inputs that nothing ever reads. Here a layer is checkpointed when it is on the list *and*
something in it will be differentiated, so the list may be changed at any block switch, to any subset.

The wrapper sits on ``module.forward`` of each listed layer: hooks of the module stay outside the recomputation, no
parameter is renamed, and transformers' own ``gradient_checkpointing`` switch is not used. Those who do use it call
:func:`enable_for_transformers`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from badam import phases
from badam.errors import InputError, near_matches
from badam.vocabulary import Phase

Function = Callable[..., Any]

_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
_INPUT_GRAD_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")
_RANDOM_SETTINGS = ("drop", "jitter")  # dropout, attention_dropout, drop_prob, layerdrop, router jitter


def checkpoint_layers(
    model: nn.Module,
    layers: Collection[str],
    *,
    use_reentrant: bool = False,
    preserve_rng_state: bool | None = None,
) -> LayerCheckpointing:
    """Checkpoint the modules of ``model`` at the paths ``layers``, such as ``"model.layers.3"``.

    Gradients are bitwise those of an uncheckpointed backward. A checkpointed layer in training mode does not write a
    key-value cache, because the recomputation would write it a second time.

    Args:
        model: any module tree.
        layers: paths as in ``model.named_modules()``; may be empty.
        use_reentrant: use autograd's reentrant variant. Its ``backward`` cannot be restricted to given ``inputs``.
        preserve_rng_state: replay the forward's random numbers in the recomputation. ``None`` does so for layers that
            have dropout or the like, found by its module type or settings; ``True`` is for layers that draw random
            numbers in any other way. The saved state costs 5056 B per layer for the CPU generator.

    Raises:
        InputError: if a path names no module, or a container that is never called.
    """
    for module in model.modules():  # an earlier call, or the original of a deep copy, may have left its wrappers
        wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, CheckpointedForward):
            wrapper.uninstall()
    checkpointing = LayerCheckpointing(model, use_reentrant=use_reentrant, preserve_rng_state=preserve_rng_state)
    checkpointing.set_layers(layers)
    return checkpointing


class LayerCheckpointing:
    """Which layers of one model are checkpointed; made by :func:`checkpoint_layers`."""

    def __init__(self, model: nn.Module, *, use_reentrant: bool, preserve_rng_state: bool | None) -> None:
        self._model = model
        self._use_reentrant = use_reentrant
        self._preserve_rng_state = preserve_rng_state
        self._installed: dict[str, CheckpointedForward] = {}

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers that are checkpointed now."""
        return tuple(self._installed)

    def set_layers(self, layers: Collection[str]) -> None:
        """Checkpoint exactly ``layers`` from the next forward on; a backward under way is not disturbed.

        Raises:
            InputError: if a path names no module, or a container that is never called; nothing is changed then.
        """
        if isinstance(layers, str):
            raise InputError(f"layers is the string {layers!r}, not a list.", advice="Give a list of module paths.")
        modules = {path: self._module(path) for path in layers}
        current = {wrapper.module: wrapper for wrapper in self._installed.values()}
        for module in current.keys() - set(modules.values()):
            current.pop(module).uninstall()
        for module in modules.values():  # one module may be found at two paths
            if module not in current:
                current[module] = CheckpointedForward(module, self._use_reentrant, self._preserve_rng_state)
                current[module].install()
        self._installed = {path: current[module] for path, module in modules.items()}

    def remove(self) -> None:
        """Leave every module as it was found."""
        self.set_layers(())

    def _module(self, path: str) -> nn.Module:
        try:
            module = self._model.get_submodule(path)
        except AttributeError as error:
            similar = near_matches(path, [name for name, _ in self._model.named_modules()])
            known = f"Similar: {', '.join(similar)}." if similar else "Paths are those of model.named_modules()."
            raise InputError(f"The model has no module {path!r} to checkpoint.", advice=known) from error
        if type(module).forward is nn.Module.forward:
            raise InputError(
                f"{path!r} is a {type(module).__name__}, a container that is never called.",
                advice=f"Name the layers in it, such as {path}.0.",
            )
        return module


class CheckpointedForward:
    """Stands in for ``module.forward``. An object and not a closure, so that a deep copy follows its copied module."""

    def __init__(self, module: nn.Module, use_reentrant: bool, preserve_rng_state: bool | None) -> None:
        self.module = module
        self.active = False
        self.replaced: Function | None = module.__dict__.get("forward")  # other wrappers set it on the instance too
        self.settings: dict[str, Any] = {"use_reentrant": use_reentrant}
        if preserve_rng_state is not None:
            self.settings["preserve_rng_state"] = preserve_rng_state

    def install(self) -> None:
        """Take the place of the module's forward."""
        self.active = True
        setattr(self.module, "forward", self)  # noqa: B010 - a method in the eyes of the type checker

    def uninstall(self) -> None:
        """Give the place back; where another wrapper has covered this one meanwhile, only pass calls through."""
        self.active = False
        if self.module.__dict__.get("forward") is self:
            del self.module.forward
            if self.replaced is not None:
                setattr(self.module, "forward", self.replaced)  # noqa: B010

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._forward)

    @property
    def _forward(self) -> Function:
        return self.replaced or functools.partial(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        left_to_transformers = module.training and getattr(module, "gradient_checkpointing", False) is True
        if not self.active or left_to_transformers or not _is_differentiated(module, args, kwargs):
            return self._forward(*args, **kwargs)
        if not getattr(module, "_can_checkpoint_with_cache", False):  # transformers' mark of layers that only read it
            without = _without_cache(self._forward, args, kwargs)
            if without is not None and not module.training:  # the result may depend on what the cache holds
                return self._forward(*args, **kwargs)
            args, kwargs = without or (args, kwargs)
        return _checkpointed(checkpoint, self.settings, module, self._forward, args, kwargs)


def enable_for_transformers(model: nn.Module) -> None:
    """Make transformers' own activation checkpointing block-aware, after it was switched on.

    ``gradient_checkpointing_enable()`` makes the embedding's output require grad: backward then runs through all
    layers whatever block is active, and all checkpoints are kept. This undoes it and replaces the checkpoint function
    of each layer by one that skips layers in which nothing is differentiated. The keyword arguments that the user gave
    (reentrant or not, offloading) stay in force. Does nothing where checkpointing is off; may be called again.
    """
    for module in model.modules():
        state = module.__dict__
        disable = getattr(module, "disable_input_require_grads", None)
        if callable(disable) and (state.get("_require_grads_hooks") or state.get("_require_grads_hook")):
            disable()
        # A second enable_input_require_grads() forgets the handle of the first, and peft keeps none.
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in _INPUT_GRAD_HOOKS:
                del module._forward_hooks[key]
        function = state.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, BlockAwareCheckpoint):
            state["_gradient_checkpointing_func"] = BlockAwareCheckpoint(function)


class BlockAwareCheckpoint:
    """A checkpoint function for transformers: called with a layer's forward and its positional arguments."""

    def __init__(self, function: Function) -> None:
        # LLaMA-Factory wraps transformers' function in one that looks at the module of the bound method it is given.
        # What it adds, inputs that require grad, is undone here anyway: go to the function inside.
        function = inspect.unwrap(function, stop=_is_checkpoint)
        self.checkpoint = function
        self.settings: dict[str, Any] = {"use_reentrant": True}  # torch's default
        if isinstance(function, functools.partial):
            self.checkpoint = function.func
            self.settings.update(function.keywords)

    def __call__(self, function: Function, *args: Any) -> Any:
        module = _module_of(function)
        kwargs: Mapping[str, Any] = {}
        if isinstance(function, functools.partial):  # keyword tensors must be seen: they may require grad
            args, kwargs, function = (*function.args, *args), function.keywords, function.func
            if args and args[0] is module:
                function, args = functools.partial(function, module), args[1:]
        if module is None:  # a closure: the reentrant variant would build a graph where nothing is differentiated
            settings = {**self.settings, "use_reentrant": False}
            return _checkpointed(self.checkpoint, settings, None, function, args, kwargs)
        if not _is_differentiated(module, args, kwargs):
            return function(*args, **kwargs)
        return _checkpointed(self.checkpoint, self.settings, module, function, args, kwargs)


class _TwoPassCall:
    """Calls ``function`` with a flat list of arguments; every call but the first is a recomputation."""

    def __init__(self, function: Function, inputs: TreeSpec) -> None:
        self.function = function
        self.inputs = inputs
        self.forward_done = False

    def __call__(self, *leaves: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, self.inputs)
        if not self.forward_done:
            self.forward_done = True
            return self.function(*args, **kwargs)
        with phases.within(Phase.RECOMPUTE):
            return self.function(*args, **kwargs)


class _ReentrantCall(_TwoPassCall):
    """For autograd's reentrant variant, which returns tensors in a flat tuple only, and needs a differentiated input.

    The empty tensor ``trigger`` is that input: making the hidden states themselves require grad would compute a
    gradient for them that nobody reads.
    """

    outputs: TreeSpec

    def __call__(self, trigger: torch.Tensor, *leaves: Any) -> Any:
        leaves_out, self.outputs = tree_flatten(super().__call__(*leaves))
        return tuple(leaves_out)


def _checkpointed(
    checkpoint_function: Function,
    settings: Mapping[str, Any],
    module: nn.Module | None,
    function: Function,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run ``function`` (the forward of ``module``) under ``checkpoint_function`` with the given settings."""
    settings = {"preserve_rng_state": module is None or _draws_random_numbers(module), **settings}
    leaves, inputs = tree_flatten((args, dict(kwargs)), is_leaf=_is_opaque)
    if not settings["use_reentrant"]:
        return checkpoint_function(_TwoPassCall(function, inputs), *leaves, **settings)
    call = _ReentrantCall(function, inputs)
    flat = checkpoint_function(call, torch.empty(0, requires_grad=True), *leaves, **settings)
    return tree_unflatten(flat, call.outputs)


def _is_checkpoint(function: Function) -> bool:
    """Whether ``function`` is torch's checkpoint, which is itself a wrapped function, or that with settings."""
    return function is checkpoint or isinstance(function, functools.partial)


def _is_opaque(value: Any) -> bool:
    """Whether to pass ``value`` on as it is: a cache object taken apart and rebuilt would lose its updates."""
    return type(value) not in (tuple, list, dict)


def _is_differentiated(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    if any(parameter.requires_grad for parameter in module.parameters()):
        return True
    leaves, _ = tree_flatten((args, dict(kwargs)), is_leaf=_is_opaque)
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)


def _draws_random_numbers(module: nn.Module) -> bool:
    """Whether a part of ``module`` is set to draw random numbers: dropout of any kind, or a setting named like it."""
    for part in module.modules():
        if not part.training:
            continue
        if isinstance(part, nn.RReLU) or (isinstance(part, _DropoutNd) and part.p > 0):
            return True
        settings = vars(part)
        config = getattr(settings.get("config"), "attention_dropout", None)  # some models read it there at each call
        values = [value for name, value in settings.items() if any(word in name for word in _RANDOM_SETTINGS)]
        if any(isinstance(value, (int, float)) and value > 0 for value in (*values, config)):
            return True
    return False


def _without_cache(
    function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with every key-value cache switched off, or None if there was none to begin with."""
    positional = dict(zip(inspect.signature(function).parameters, args, strict=False))
    given = {**positional, **kwargs}
    if not given.get("use_cache") and all(given.get(name) is None for name in _CACHE_ARGUMENTS):
        return None
    off = {"use_cache": False, **dict.fromkeys(_CACHE_ARGUMENTS)}
    named = tuple(off.get(name, value) for name, value in positional.items())
    return (*named, *args[len(named) :]), {name: off.get(name, value) for name, value in kwargs.items()}


def _module_of(function: Function) -> nn.Module | None:
    """The layer whose forward ``function`` is: ``partial(forward, module, ...)``, or a bound method of it."""
    if isinstance(function, functools.partial):
        if function.args and isinstance(function.args[0], nn.Module):
            return function.args[0]
        return _module_of(function.func)
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None
