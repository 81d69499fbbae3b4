"""From a plan to the live objects of a training run.

The trainer calls these functions on real tensors and the planner's rehearsal calls them on fake ones; nothing about
model, optimizer or checkpointing is described anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from badam.checkpointing import checkpoint_layers
from badam.errors import InputError, in_one_line, missing_library, near_matches
from badam.optim.block import BlockOptimizer
from badam.plan import ModelSpec, Plan, Training
from badam.training.loading import load_pretrained
from badam.training.methods import method_of
from badam.training.tasks import builder_of
from badam.vocabulary import Attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_POSITIONS = ("position_embeddings", "wpe", "embed_positions")
"""Names of tables with one row per absolute position."""


def model_config(spec: ModelSpec) -> PretrainedConfig:
    """The transformers configuration of a plan's model.

    Raises:
        InputError: if the installed transformers does not know the model type, or refuses the configuration.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    facts = dict(spec.config)
    model_type = str(facts.pop("model_type", None))
    if model_type not in CONFIG_MAPPING and (own := facts.get("auto_map")):
        raise InputError(
            f"{spec.id} comes with its own code for the model type {model_type!r} "
            f"({', '.join(dict.fromkeys(map(str, own.values()))) if isinstance(own, dict) else own}); "
            f"transformers {_version('transformers')} has none, and code of a checkpoint is not run.",
            advice="Look for a copy of it that was converted to a model type of transformers.",
        )
    if model_type not in CONFIG_MAPPING:
        close = near_matches(model_type, CONFIG_MAPPING.keys())
        raise InputError(
            f"transformers {_version('transformers')} does not know the model type {model_type!r} of {spec.id}.",
            advice=f"Did you mean {', '.join(close)}?" if close else None,
        )
    try:
        return cast("PretrainedConfig", AutoConfig.for_model(model_type, **facts))
    except ImportError as error:
        raise missing_library(spec.id, error) from error
    except Exception as error:  # each configuration class checks its facts in its own way, with its own errors
        raise InputError(
            f"transformers {_version('transformers')} refuses the configuration of {spec.id}: {in_one_line(error)}"
        ) from error


def build_model(
    spec: ModelSpec,
    training: Training,
    *,
    weights: str | None = None,
    loading: Mapping[str, Any] | None = None,
    builder: Callable[[type[PreTrainedModel]], Any] | None = None,
    tell: Callable[[str], None] = lambda _text: None,
) -> PreTrainedModel:
    """Build a plan's model in training mode, in the plan's dtype, with its attention implementation.

    Args:
        spec: which model.
        training: dtype and attention.
        weights: a Hub id or directory to load safetensors from; None initializes at random.
        loading: more options for loading them, see ``loading_options`` of a method.
        builder: makes of a model class what builds it in the place of transformers' auto class.
        tell: called with what is new or unused of the weights.

    Raises:
        InputError: if transformers cannot build the model, or the weights are those of another.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, training.dtype), "attn_implementation": training.attention}
    config = model_config(spec)
    model_class, auto = builder_of(spec, config)
    auto = auto if builder is None else builder(model_class)
    config.use_cache = False  # a key-value cache has no use in training and would be held through the step
    try:
        if weights is None:
            model = auto.from_config(config, **options)
        else:
            options |= {"config": config, "use_safetensors": True, "output_loading_info": True, **(loading or {})}
            model = load_pretrained(partial(auto.from_pretrained, weights, **options), weights, spec.task, tell)
    except ImportError as error:
        raise missing_library(spec.id, error) from error
    except ValueError as error:
        if "attention implementation" not in str(error):
            raise
        raise InputError(
            f"{spec.id} has no {training.attention} attention in transformers {_version('transformers')}.",
            advice="Use --attention auto or --attention eager.",
        ) from error
    own_head = spec.config.get("tie_word_embeddings") is False
    if weights is None or not own_head:
        model.tie_weights()
    if weights is None and own_head:
        _untie_head(model)
    return cast("PreTrainedModel", model.train())


def _untie_head(model: PreTrainedModel) -> None:
    """Give the output projection weights of its own.

    Newer transformers tie those of a T5 whatever the configuration says, and leave them apart only where they load a
    checkpoint in which they are.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())


def choose_attention(spec: ModelSpec) -> Attention:
    """The attention that needs less memory where the model has it: sdpa, else eager."""
    model_class, _ = builder_of(spec, model_config(spec))
    return "sdpa" if model_class._supports_sdpa else "eager"


def build_optimizer(model: nn.Module, plan: Plan, *, start_block: int | None = None) -> Optimizer:
    """The optimizer of the plan's method over ``model``.

    Args:
        model: the model to train, prepared for the method by :func:`prepare_model`.
        plan: method, partition, schedule and optimizer settings.
        start_block: index of the block to begin with; None leaves it to the schedule.

    Raises:
        InputError: if the plan asks of the method what it cannot do, or a library is missing.
    """
    method = method_of(plan.method)
    method.check(plan)
    return method.build_optimizer(model, plan, start_block=start_block)


def prepare_model(model: PreTrainedModel, plan: Plan) -> None:
    """Give ``model`` the modules that the plan's method trains; most methods leave it as it is.

    Raises:
        InputError: if the plan asks of the method or the model what it cannot do, or a library is missing.
    """
    _check_positions(model, plan)
    method = method_of(plan.method)
    method.check(plan)
    method.prepare(model, plan)


def _check_positions(model: nn.Module, plan: Plan) -> None:
    """Refuse sequences for whose end the model has no position: it would only fail once one that long comes."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            unused = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
            limit = module.num_embeddings - unused
            decodes = plan.training.decoder_len is not None and "decoder" in name.split(".")
            length = (plan.training.decoder_len if decodes else None) or plan.training.seq_len
            if length > limit:
                raise InputError(
                    f"{plan.model.id} has positions for {limit} tokens, the plan is for {length}.",
                    advice=f"Plan with --{'decoder' if decodes else 'seq'}-len {limit} or less.",
                )


def prepare_checkpointing(model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
    """Checkpoint the layers that the plan lists for the active block, and follow every switch."""
    wanted = [block.checkpointed_layers for block in plan.partition.blocks]
    if not any(wanted):
        return
    if not isinstance(optimizer, BlockOptimizer):
        checkpoint_layers(model, wanted[0])
        return
    checkpointing = checkpoint_layers(model, wanted[optimizer.current_block_idx])
    optimizer.register_switch_hook(lambda switched: checkpointing.set_layers(wanted[switched.current_block_idx]))


def _version(distribution: str) -> str:
    from importlib.metadata import version

    return version(distribution)
