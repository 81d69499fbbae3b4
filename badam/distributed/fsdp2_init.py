"""Build a model of which this process keeps a part, without ever holding the whole: FSDP2's side of ``build_model``.

Pretrained weights: the model is cut while it has shapes but no data, and transformers then reads from the files what
this process keeps. Random weights: parameters have no data until they are initialized, layer after layer, each with the
numbers that one process would draw; of each layer the part is kept. Where a model initializes itself in another way
than parameter by parameter, it is built whole and then cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from badam.blocks.partition import layer_paths
from badam.distributed.fsdp2 import shard_units, thaw_for_first_forward
from badam.errors import InputError
from badam.tensors.dtensor import local_part

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_READY = "_is_hf_initialized"
"""How transformers marks a tensor, or a module, that needs no initialization any more."""


_NOTED_WHEN_SHARDED = "_badam_noted_when_sharded"
"""Where a model notes, while it is loaded, what may be trained and what is shared."""


ALIGNMENT = 64
"""Bytes; torch's own allocations on the host begin at multiples of it."""


class NotInParts(Exception):
    """A model initializes parameters out of turn. No error to anyone: it is built whole instead."""


class ShardedModelBuilder:
    """Takes the place of transformers' auto class for one model class; what it builds is sharded by blocks.

    Args:
        model_class: of transformers.
        mesh: see :func:`badam.distributed.shard_blocks`; its last dimension shards.
        device: where the parts go.
    """

    def __init__(self, model_class: type[PreTrainedModel], mesh: DeviceMesh, device: torch.device) -> None:
        self.model_class = model_class
        self.mesh = mesh
        self.device = device

    def from_config(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """Random weights, the same as in one process with the same seed."""
        before = torch.get_rng_state()
        parts = Parts(self.mesh)
        try:
            with _parameters_without_data(), parts.initializing(), _InTurn(parts, draws=True):
                model = cast("PreTrainedModel", cast(Any, self.model_class)._from_config(config, **options))
            parts.check(model)
        except NotInParts:
            torch.set_rng_state(before)
            return self._shard_whole(cast(Any, self.model_class)._from_config(config, **options))
        kept = {name: parts.kept[parameter] for name, parameter in _every_name(model)}
        trained = shard_units(model, mesh=self.mesh)
        self._put(model, kept)
        thaw_for_first_forward(model, trained)
        return model

    def from_pretrained(self, weights: str, **options: Any) -> tuple[PreTrainedModel, Any]:
        """Weights of a checkpoint; parameters that it lacks are initialized as in one process with the same seed.

        Args:
            weights: Hub id or directory.
            options: for transformers' ``from_pretrained``, ``output_loading_info`` among them.

        Returns:
            The model, and what transformers tells of its loading.

        Raises:
            InputError: if the checkpoint has two tensors where the model shares one.
        """
        if not _reads_parts():
            return self._cut_whole(weights, **options)
        before = torch.get_rng_state()
        parts = Parts(self.mesh)
        try:
            with parts.initializing(), _InTurn(parts, draws=False):
                model, info = cast(Any, self._sharding_class().from_pretrained(weights, **options))
        except NotInParts:
            torch.set_rng_state(before)
            return self._cut_whole(weights, **options)
        trained, shared = model.__dict__.pop(_NOTED_WHEN_SHARDED)
        _check_shared(model, shared, weights)
        self._put(model, {name: local_part(parameter) for name, parameter in _every_name(model)})
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        thaw_for_first_forward(model, trained)
        return model, info

    def _cut_whole(self, weights: str, **options: Any) -> tuple[PreTrainedModel, Any]:
        model, info = cast(Any, self.model_class.from_pretrained(weights, **options))
        return self._shard_whole(model), info

    def _shard_whole(self, model: PreTrainedModel) -> PreTrainedModel:
        """What was built whole."""
        thaw_for_first_forward(model, shard_units(model, mesh=self.mesh))
        return model

    def _sharding_class(self) -> type[PreTrainedModel]:
        """The model class, cut when it has been made: transformers loads what it then finds in it."""
        from transformers import PreTrainedModel

        base, mesh, tie = self.model_class, self.mesh, PreTrainedModel.tie_weights

        def __init__(model: Any, config: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
            base.__init__(model, config, *arguments, **options)
            tie(model, recompute_mapping=False)  # transformers would tie after loading: too late to cut what is shared
            if any(_leaves_some_without(parameter, mesh) for parameter in model.parameters()):
                raise NotInParts
            model.__dict__[_NOTED_WHEN_SHARDED] = shard_units(model, mesh=mesh), _shared_names(model)

        return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})

    def _put(self, model: nn.Module, kept: dict[str, Tensor]) -> None:
        """Give the cut parameters their data, on the device; shared ones stay one."""
        placed: dict[int, nn.Parameter] = {}
        for name, empty in list(_every_name(model)):
            if id(empty) not in placed:
                local = kept[name].to(self.device)
                whole = DTensor.from_local(
                    local,
                    empty.device_mesh,
                    empty.placements,
                    run_check=False,
                    shape=empty.shape,
                    stride=empty.stride(),
                )
                placed[id(empty)] = nn.Parameter(whole, requires_grad=empty.requires_grad)
            path, _, own = name.rpartition(".")
            model.get_submodule(path).register_parameter(own, placed[id(empty)])


def _check_shared(model: nn.Module, shared: dict[str, str], weights: str) -> None:
    """Make sure that loading has left shared what was ``shared`` when the model was cut, by name and first name."""
    left = _shared_names(model)
    for name, first_name in shared.items():
        if left.get(name) != first_name:
            raise InputError(
                f"The weights in {weights} have two tensors for {first_name} and {name}, which the model shares.",
                advice='Set "tie_word_embeddings" to false in the configuration, and plan again.',
            )


def _shared_names(model: nn.Module) -> dict[str, str]:
    """Further names of shared parameters, with the first one."""
    first_names: dict[int, str] = {}
    names = ((name, first_names.setdefault(id(parameter), name)) for name, parameter in _every_name(model))
    return {name: first_name for name, first_name in names if name != first_name}


class Scratch:
    """Memory that is used over and over.

    What is allocated and freed in turn with parts that stay would leave holes in the C library's heap, which grew to
    the size of the whole model.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._used = self._wanted = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any content, until :meth:`reuse`; like one of its own for autograd."""
        nbytes = math.prod(shape) * dtype.itemsize
        begin = self._used
        self._wanted += -(-nbytes // ALIGNMENT) * ALIGNMENT
        if self._wanted > len(self._bytes):
            return torch.empty(shape, dtype=dtype)
        self._used = self._wanted
        return self._bytes[begin : begin + nbytes].view(dtype).view(shape).data

    def reuse(self) -> None:
        """Begin anew, with room for all that was wanted since the last time."""
        if self._wanted > len(self._bytes):
            self._bytes = torch.empty(0, dtype=torch.uint8)
            self._bytes = torch.empty(self._wanted, dtype=torch.uint8)
        self._used = self._wanted = 0


class Parts:
    """Initializes parameters whole, a layer at a time, and keeps this process's part of each.

    ``kept`` has the parts by parameter. Parameters that are cut already get theirs.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._shards = mesh.size(mesh.ndim - 1)
        self._number = mesh.get_local_rank(mesh.ndim - 1)
        self._layer_of: dict[nn.Module, nn.Module] = {}
        self._scratch = Scratch()
        self._open: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        self.at_work = False
        self.kept: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def initializing(self) -> Iterator[None]:
        """Let transformers' initialization of every model that is built meanwhile go through here."""
        from transformers import PreTrainedModel

        whole_model, one_module = PreTrainedModel.initialize_weights, PreTrainedModel._initialize_weights

        def initialize_weights(model: PreTrainedModel) -> None:
            paths = layer_paths(name for name, _ in model.named_parameters())
            layers = [model.get_submodule(path) for path in paths]
            self._layer_of = {module: layer for layer in layers for module in layer.modules()}
            whole_model(model)
            self._close()

        def initialize_one(model: PreTrainedModel, module: nn.Module, *rest: Any) -> None:
            layer = self._layer_of.get(module)
            if not getattr(module, _READY, False):
                self._fill(module)
            self.at_work = True
            one_module(model, module, *rest)
            self.at_work = False
            if module is layer:  # the last of its modules
                self._close(layer)

        with ExitStack() as stack:
            for name, mine in (("initialize_weights", initialize_weights), ("_initialize_weights", initialize_one)):
                stack.callback(setattr, PreTrainedModel, name, getattr(PreTrainedModel, name))
                setattr(PreTrainedModel, name, mine)
            yield

    def check(self, model: nn.Module) -> None:
        """Make sure that all parameters have been initialized.

        Raises:
            NotInParts: else.
        """
        if any(parameter not in self.kept for parameter in model.parameters()):
            raise NotInParts

    def _fill(self, module: nn.Module) -> None:
        """Give a module's own parameters room for all their entries."""
        for name, parameter in list(module.named_parameters(recurse=False)):
            is_loaded = isinstance(parameter, DTensor) and getattr(parameter, _READY, False)
            if parameter not in self.kept and not is_loaded and (parameter.is_meta or isinstance(parameter, DTensor)):
                room = self._scratch.empty if module in self._layer_of else torch.empty
                whole = nn.Parameter(room(tuple(parameter.shape), dtype=parameter.dtype), parameter.requires_grad)
                module._parameters[name] = whole
                self._open.append((module, name, parameter, whole))

    def _close(self, layer: nn.Module | None = None) -> None:
        """Keep the parts of what was initialized in a layer, or of everything."""
        inside = set() if layer is None else set(layer.modules())
        left = []
        for module, name, parameter, whole in self._open:
            if layer is not None and module not in inside:
                left.append((module, name, parameter, whole))
                continue
            module._parameters[name] = parameter
            if whole._version == 0:
                raise NotInParts
            self.kept[parameter] = self._part(whole).clone()
            if isinstance(parameter, DTensor):
                local_part(parameter).copy_(self.kept[parameter])
        self._open = left
        self._scratch.reuse()

    def _part(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor, as FSDP2 deals them out: of the last processes fewer, or none."""
        chunks = whole.detach().chunk(self._shards)
        return chunks[self._number] if self._number < len(chunks) else whole.detach()[:0]


class _InTurn(TorchDispatchMode):
    """Refuses to initialize parameters of a module that has had its turn, of which only the part is left.

    With ``draws`` it draws for parameters without data the numbers that one process would draw, and forgets them:
    torch's own modules initialize themselves before transformers does.
    """

    def __init__(self, parts: Parts, *, draws: bool) -> None:
        super().__init__()
        self._parts = parts
        self._draws = draws
        self._scratch = Scratch()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = args[0] if args else None
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(target, Tensor):
            if self._parts.at_work and (target.is_meta or isinstance(target, DTensor)):
                raise NotInParts
            if target.is_meta and self._draws:
                func(self._scratch.empty(tuple(target.shape), target.dtype), *args[1:], **(kwargs or {}))
                self._scratch.reuse()
                return target
        return func(*args, **(kwargs or {}))


@contextmanager
def _parameters_without_data() -> Iterator[None]:
    """Every parameter that modules get meanwhile has a shape and a type, and no data."""
    register: Callable[..., None] = nn.Module.register_parameter

    def without_data(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_data  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _leaves_some_without(parameter: nn.Parameter, mesh: DeviceMesh) -> bool:
    """Whether a process gets none of the experts that transformers stacks, which it cannot do with none."""
    shards = mesh.size(mesh.ndim - 1)
    return parameter.ndim > 2 and len(torch.empty(parameter.shape[0], device="meta").chunk(shards)) < shards


def _reads_parts() -> bool:
    """Whether the installed transformers reads of a checkpoint what a cut model has room for."""
    from transformers import core_model_loading

    return hasattr(core_model_loading, "DtensorShardOperation")


def _every_name(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters by all their names: of a shared one each."""
    return model.named_parameters(remove_duplicate=False)
