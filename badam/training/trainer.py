"""The two trainers of plans: TRL's for language models, Hugging Face's own for classification."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from badam.training.loop import PlanLoop


class PlanTrainer(PlanLoop, SFTTrainer):
    """Trains a language model; TRL tokenizes the data and builds labels.

    Args:
        options: see PlanLoop, and for TRL's SFTTrainer.
    """

    def __init__(self, **options: Any) -> None:
        text_config = options["model"].config.get_text_config()
        returns_router_logits = getattr(text_config, "output_router_logits", None)
        super().__init__(**options)
        if returns_router_logits is not None:
            # TRL adds the load-balancing loss of a mixture of experts whatever the configuration says. The plan was
            # made for what it says, and a chunked loss has no place for another.
            text_config.output_router_logits = self.aux_loss_enabled = returns_router_logits
        # TRL sets a forward of its own on the model, for its fused head; ours is called as the rehearsal calls it.
        self.model.__dict__.pop("forward", None)


class PlanClassifier(PlanLoop):
    """Trains a classification on data that is tokenized already (badam.training.data.classes)."""
