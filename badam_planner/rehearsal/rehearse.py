"""Rehearse a plan: run the trainer's own code on fake tensors and record every allocation.

One visit is rehearsed: a whole training step, in whose update the block's master copies and moments come into being,
then one with them in place, then the switch to the next block. The first step holds less than those that follow, but
it decides where a GPU's allocator puts what comes later. Engines that cut the model are laid over a rehearsal of one
step; there the first update is made with bare gradients.

Not counted: scratch memory inside an operator other than what badam_planner.recording.kernel_scratch lists, the device
context (from the GPU's record), the data loader, and what the training loop holds for logging (some hundred bytes).
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from badam import phases
from badam.blocks.names import enclosing
from badam.distributed.deepspeed.linear import linear_for_parameters
from badam.plan import ModelSpec, Plan, Schedule, Target, Training
from badam.profiling.memory.states import base_of, masters, state_tensors
from badam.training.build import build_model, build_optimizer, prepare_checkpointing, prepare_model
from badam.training.methods import method_of
from badam.training.step import train_step
from badam.training.tasks import blank_batch
from badam.vocabulary import Phase
from badam_planner.multi_gpu.engines import engine_of
from badam_planner.recording.recording import Entries, Recording, TensorRole
from badam_planner.rehearsal.kept_layers import build_without, with_left_out
from badam_planner.rehearsal.tracker import StorageTracker
from badam_planner.rehearsal.values import refusing_what_needs_values

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from badam.training.methods.base import TrainingMethod

VISIT_STEPS = 2


@contextmanager
def fake_world() -> Iterator[FakeTensorMode]:
    """Everything made inside has shape and no data, and runs the same kernels' bookkeeping as real training would.

    Two things differ between tracing and running in transformers and torch, and both are set to how they run:
    unpacked sequences need no mask (under tracing transformers cannot look, and builds a 4-D one), and a checkpoint
    saves the CPU generator's state as a tensor of its real size.
    """
    from transformers import masking_utils
    from transformers.initialization import no_init_weights

    state_bytes = torch.get_rng_state().numel()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_quiet("transformers"))
        mode = stack.enter_context(FakeTensorMode())
        stack.enter_context(no_init_weights())
        stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", _no_packed_sequences))
        stack.enter_context(patch.object(torch, "get_rng_state", lambda: torch.empty(state_bytes, dtype=torch.uint8)))
        stack.enter_context(patch.object(torch, "set_rng_state", lambda _state: None))
        stack.enter_context(patch.object(torch.utils, "swap_tensors", _become))
        yield mode


@contextmanager
def _attention_of(target: Target) -> Iterator[None]:
    """On a card, attention stays fused with dropout and with a mask that is trained, as T5's position biases are; on
    the CPU both take the path that writes all weights out.

    Not counted: the copy of such a mask that a card makes where the length is no multiple of 16.
    """
    if target.gpu == "cpu":
        yield
        return
    attend = torch.nn.functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        options["dropout_p"] = 0.0
        trained = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
        if attn_mask is None or not trained or options.get("enable_gqa"):
            return attend(query, key, value, attn_mask, **options)
        bias = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        attended: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, is_causal=options.get("is_causal", False), scale=options.get("scale")
        )[0]
        return attended

    with patch.object(torch.nn.functional, "scaled_dot_product_attention", fused):
        yield


def _linear_of(target: Target) -> AbstractContextManager[None]:
    """The linear layer that the plan's engine computes with."""
    return linear_for_parameters() if engine_of(target).has_own_linear else nullcontext()


@contextmanager
def _masks_of(spec: ModelSpec) -> Iterator[None]:
    """A mask that a model makes itself, as BioGPT and the decoder of BART do, hides no padding.

    transformers looks into such a mask and leaves it out, which it cannot do under tracing. A batch has a mask of its
    own for encoders and for classification only (badam.training.tasks).
    """
    from transformers import masking_utils

    causal, bidirectional = "_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"
    own = {"causal-lm": (causal, bidirectional), "sequence-to-sequence": (causal,), "speech-to-text": (causal,)}
    with ExitStack() as stack:
        for name in own.get(spec.task, ()):
            decide = _with_nothing_hidden(getattr(masking_utils, name))
            stack.enter_context(patch.object(masking_utils, name, decide))
        yield


def _with_nothing_hidden(decide: Callable[..., bool]) -> Callable[..., bool]:
    """``decide`` for a mask that hides nothing."""

    def decided(_padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
        return decide(None, *args, **kwargs)

    return decided


def fake_model(spec: ModelSpec, training: Training) -> PreTrainedModel:
    """The plan's model without weights; call inside :func:`fake_world`."""
    return build_model(spec, training)


def rehearse(
    plan: Plan,
    block: int,
    *,
    layers: Sequence[str] = (),
    classes: Sequence[type[nn.Module]] = (),
    without: Mapping[str, str] | None = None,
) -> Recording:
    """Rehearse ``plan`` with block number ``block`` active.

    Args:
        plan: what to run; its schedule is replaced by one that stays in ``block`` for the rehearsed visit.
        block: index into the plan's blocks.
        layers: module paths of the layers, in order of execution, whose beginnings to mark in the recording.
        classes: the class of each layer; needed with ``without``.
        without: layers to leave out of the forward pass, each with an equal one that stays. The recording has their
            parameters all the same. None or empty is full depth.

    Returns:
        The events of the visit; see the module's docstring.

    Raises:
        InputError: if the model's code asks for values of tensors, which are not there.
    """
    without = without or {}
    method = method_of(plan.method)
    staged, start = method.rehearsed_plan(*_of_one_visit(plan, block, without))
    phases.enter(Phase.SETUP)
    with ExitStack() as stack:
        stack.enter_context(refusing_what_needs_values(plan.model))
        mode = stack.enter_context(fake_world())
        stack.enter_context(_attention_of(plan.target))
        stack.enter_context(_masks_of(plan.model))
        stack.enter_context(_linear_of(plan.target))
        stack.enter_context(_without_garbage_collection())
        model = build_without(lambda: fake_model(plan.model, plan.training), layers, classes, without)
        prepare_model(model, plan)
        tracker = StorageTracker(model, layers, mode=mode, target=plan.target)
        _label_weights(model, method, tracker, layers, without)
        on_host = list(method.resident_states(model, plan, block)) if plan.target.gpu == "cpu" else []
        for name, (key, tensor), is_there in with_left_out(((n, (k, t)) for n, k, t in on_host), layers, without):
            if is_there:
                tracker.tell([(name, tensor)], TensorRole.STATE, key)
            else:
                tracker.stand_in(tensor, name, TensorRole.STATE, key)
        with tracker.watching():
            optimizer = build_optimizer(model, staged, start_block=start)
            prepare_checkpointing(model, optimizer, staged)
            if not engine_of(plan.target).joins_gpus:
                tracker.counts_work = False
                _training_step(plan, method, model, optimizer, tracker)
                label_states(model, optimizer, tracker)
            elif method.keeps_gradients:
                _first_update(model, optimizer, tracker)
            else:
                label_states(model, optimizer, tracker)
            tracker.recording.traffic.clear()  # work so far is no part of a later step
            tracker.recording.flops.clear()
            tracker.counts_work = True
            _training_step(plan, method, model, optimizer, tracker)
        del on_host  # only now: it stays allocated throughout
        return tracker.recording


def _label_weights(
    model: PreTrainedModel,
    method: TrainingMethod,
    tracker: StorageTracker,
    layers: Sequence[str],
    without: Mapping[str, str],
) -> None:
    """Tell the tracker of all parameters and buffers, in the order of the whole model."""
    every = (
        (model.named_parameters(), TensorRole.PARAMETER),
        (model.named_buffers(), TensorRole.BUFFER),
        (method.unnamed_weights(model), TensorRole.PARAMETER),
    )
    for named, role in every:
        for name, tensor, is_there in with_left_out(named, layers, without):
            if is_there:
                tracker.tell([(name, tensor)], role)
            else:
                tracker.stand_in(tensor, name, role)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Reference counts alone say when tensors die; a collection in between would depend on what ran before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def count_entries(
    plan: Plan,
    block: int = 0,
    *,
    layers: Sequence[str] = (),
    classes: Sequence[type[nn.Module]] = (),
    without: Mapping[str, str] | None = None,
) -> Entries:
    """Entries that the plan's method trains at a time, and those that it quantizes.

    Args:
        plan, block, layers, classes, without: as for :func:`rehearse`; those of layers left out are counted.
    """
    without = without or {}
    method = method_of(plan.method)
    with fake_world():
        model = build_without(lambda: fake_model(plan.model, plan.training), layers, classes, without)
        prepare_model(model, plan)
        staged, start = method.rehearsed_plan(*_of_one_visit(plan, block, without))
        trained = method.trained_entries(model, build_optimizer(model, staged, start_block=start))
        kinds = (trained, method.quantized_entries(model))
        return Entries(*(sum(count for _, count, _ in with_left_out(kind.items(), layers, without)) for kind in kinds))


def _of_one_visit(plan: Plan, block: int, without: Collection[str]) -> tuple[Plan, int]:
    """The plan with visits as long as the rehearsal and without layers that are left out, and the block's index."""
    kept = [
        each.model_copy(
            update={"checkpointed_layers": tuple(path for path in each.checkpointed_layers if path not in without)}
        )
        for each in plan.partition.blocks
        if not all(enclosing(prefix, without) for prefix in each.prefixes)
    ]
    name = plan.partition.blocks[block].name
    visit = Schedule(switch_mode="ascending", switch_every=VISIT_STEPS)
    partition = plan.partition.model_copy(update={"blocks": tuple(kept)})
    index = next(index for index, each in enumerate(kept) if each.name == name)
    return plan.model_copy(update={"schedule": visit, "partition": partition}), index


def _first_update(model: PreTrainedModel, optimizer: Optimizer, tracker: StorageTracker) -> None:
    """The update that creates masters and moments, from gradients as backward leaves them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
            for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
                hook(parameter)  # as autograd does: some optimizers take gradients away there
    label_gradients(model, tracker)
    optimizer.step()
    label_states(model, optimizer, tracker)
    optimizer.zero_grad(set_to_none=True)
    phases.enter(Phase.SETUP)


def _training_step(
    plan: Plan, method: TrainingMethod, model: PreTrainedModel, optimizer: Optimizer, tracker: StorageTracker
) -> None:
    """The trainer's step, on batches without content."""
    tracker.begin_step()

    def next_batch() -> tuple[dict[str, Tensor], Tensor]:
        batch = blank_batch(plan, model.config)
        tracker.tell(batch.items(), TensorRole.BATCH)
        return batch, torch.zeros((), dtype=torch.int64)

    train_step(
        plan,
        method,
        model,
        optimizer,
        next_batch,
        micro_batches=plan.training.grad_accum,
        on_loss=lambda _loss: label_gradients(model, tracker),
    )


def label_gradients(model: PreTrainedModel, tracker: StorageTracker) -> None:
    """Tell the tracker which live tensors are gradients."""
    tracker.tell(
        (
            (name, getattr(parameter.grad, "window_values", parameter.grad))
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        ),
        TensorRole.GRADIENT,
    )


def label_states(model: PreTrainedModel, optimizer: Optimizer, tracker: StorageTracker) -> None:
    """Tell the tracker which live tensors are master copies and optimizer states."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter, master in masters(optimizer):
        names[id(master)] = name
        if master is not parameter:
            tracker.tell([(name, master)], TensorRole.MASTER)
    for parameter, key, value in state_tensors(base_of(optimizer)):
        tracker.tell([(names.get(id(parameter), ""), value)], TensorRole.STATE, key)


def _no_packed_sequences(*_args: Any, **_kwargs: Any) -> None:
    return None


def _become(tensor: Tensor, other: Tensor) -> None:
    """What ``Module.to`` does with real parameters; for fake ones torch would swap two tensors, and refuses to."""
    tensor.data = other.data


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
