"""Low-rank adapters beside frozen weights (LoRA, arXiv 2106.09685), made by PEFT."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from badam.blocks.names import enclosing
from badam.errors import InputError
from badam.plan import Plan
from badam.training.methods.base import TrainingMethod, adamw_options, parameter_groups
from badam.training.tasks import CLASSIFICATIONS
from badam.vocabulary import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_RANK = 8
ALPHA_PER_RANK = 2


class Lora(TrainingMethod):
    """fp32 adapters on the plan's target modules are trained by AdamW; everything else is frozen.

    The adapters are put into the model in place, so its layers keep their paths and its forward is the model's own. A
    classifier's head starts at random: it is trained as a whole, in fp32 like the adapters.
    """

    name: ClassVar[Method] = "lora"
    adapter_dtype: ClassVar[torch.dtype] = torch.float32
    libraries = {"peft": "peft"}  # noqa: RUF012 - declared as a class variable by the base

    def treats_layers_alike(self, plan: Plan) -> bool:
        """Not if a target module is named by more than its own name: that may be one layer's alone."""
        return not any("." in name for name in plan.training.options.target_modules)

    def prepare(self, model: PreTrainedModel, plan: Plan) -> None:
        """Put the adapters in, and freeze the rest.

        Raises:
            InputError: if none of the plan's target modules is in the model.
        """
        from peft import LoraConfig

        options = plan.training.options
        rank = options.rank or DEFAULT_RANK
        heads = _heads(model) if plan.model.task in CLASSIFICATIONS else []
        names = [name for name, child in model.named_children() if child in heads]
        config = LoraConfig(
            r=rank,
            exclude_modules=rf"({'|'.join(map(re.escape, names))})(\..*)?" if names else None,
            lora_alpha=options.alpha or ALPHA_PER_RANK * rank,
            target_modules=list(options.target_modules) or "all-linear",
        )
        try:
            self.attach(model, config)
        except ValueError as error:
            raise InputError(
                f"PEFT cannot put adapters into {plan.model.id}: {error}",
                advice="Name modules that the model has, such as --target-module q_proj.",
            ) from error
        for head in heads:
            head.requires_grad_(True)
            head.register_forward_pre_hook(_in_single_precision)
        for parameter in model.parameters():
            if parameter.requires_grad:  # fp32 as PEFT's own models have them: small updates would be lost in 16 bits
                parameter.data = parameter.data.to(self.adapter_dtype)

    def attach(self, model: PreTrainedModel, config: Any) -> None:
        """Put adapters of PEFT's configuration into ``model``."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, model)

    def build_optimizer(self, model: nn.Module, plan: Plan, *, start_block: int | None = None) -> Optimizer:
        """AdamW over the adapters."""
        groups = parameter_groups(model, plan.training.optimizer.weight_decay, trained_only=True)
        return torch.optim.AdamW(groups, **adamw_options(plan))

    def finish(self, model: PreTrainedModel) -> None:
        """Merge the adapters into the weights that they stand beside, so that any program can load the model.

        A head that was trained in fp32 gets the type of the other weights, and one that shares its weights with the
        embedding gets its own, if either of them has an adapter.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        _untie(model, [layer.get_base_layer() for layer in layers.values()])
        for layer in layers.values():
            layer.merge(safe_merge=True)
        for path, layer in layers.items():
            parent, _, name = path.rpartition(".")
            if not enclosing(parent, layers):  # around a module with several bare matrices PEFT nests one layer each
                setattr(model.get_submodule(parent), name, layer.get_base_layer())
        for head in _heads(model):
            hooks = head._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _in_single_precision]:
                del hooks[key]
                head.to(model.base_model.dtype)


def _untie(model: PreTrainedModel, adapted: list[nn.Module]) -> None:
    """Give modules with adapters weights of their own: merged into a shared one, they would change who shares it."""
    holders = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for module in adapted:
        weight = module._parameters.get("weight")
        if weight is not None and holders[id(weight)] > 1:
            holders[id(weight)] -= 1
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False  # or they would be tied again when they are loaded


def _heads(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that a task adds to the base model."""
    return [child for child in model.children() if child is not model.base_model]


def _in_single_precision(_head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs of a head whose weights are fp32, whatever the layers before it compute in."""
    return tuple(
        each.float() if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in inputs
    )
