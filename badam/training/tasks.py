"""What a model is trained for: which class builds it, what a batch of it looks like, and how long its sequences are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from badam.errors import InputError
from badam.plan import ModelSpec, Plan
from badam.vocabulary import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEFAULT_SEQ_LEN = 512


@dataclass(frozen=True, slots=True)
class TaskKind:
    """How transformers knows a task.

    Attributes:
        words: what is learned, to follow "for".
        builders: for each kind of model that does it the name of transformers' mapping from configuration classes to
            models, and of the auto class that builds from it.
        two_stacks: whether an encoder and a decoder have inputs of their own.
    """

    words: str
    builders: tuple[tuple[str, str], ...]
    two_stacks: bool = False


TASKS: dict[Task, TaskKind] = {
    "causal-lm": TaskKind(
        "predicting the next token",
        (
            ("MODEL_FOR_CAUSAL_LM_MAPPING", "AutoModelForCausalLM"),
            ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "AutoModelForImageTextToText"),
        ),
    ),
    "sequence-classification": TaskKind(
        "sequence classification",
        (("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "AutoModelForSequenceClassification"),),
    ),
    "sequence-to-sequence": TaskKind(
        "turning one text into another",
        (("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "AutoModelForSeq2SeqLM"),),
        two_stacks=True,
    ),
    "image-classification": TaskKind(
        "image classification", (("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "AutoModelForImageClassification"),)
    ),
    "speech-to-text": TaskKind(
        "turning speech into text",
        (("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "AutoModelForSpeechSeq2Seq"),),
        two_stacks=True,
    ),
}

CLASSIFICATIONS: tuple[Task, ...] = ("sequence-classification", "image-classification")
"""The tasks with one label per example, whose model has a head for it."""

TRAINED_HERE: tuple[Task, ...] = ("causal-lm", "sequence-classification")
"""The tasks that ``badam-train`` has data formats for."""

FRAMES_PER_POSITION = 2
"""Of a Whisper encoder, whose second convolution has this stride."""


def builder_of(spec: ModelSpec, config: PretrainedConfig) -> tuple[Any, Any]:
    """The transformers model class of a task, and the auto class that builds it; of models that also see images, the
    one for text.

    Raises:
        InputError: if the task is not one that this model is made for.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    kind = TASKS[spec.task]
    if kind.two_stacks == bool(getattr(config, "is_encoder_decoder", False)) and _has_size(spec.task, config):
        for mapping, auto in kind.builders:
            known = getattr(modeling_auto, mapping)
            if type(config) not in known:
                continue
            found = known[type(config)]
            plain = found[0] if isinstance(found, tuple) else found  # of several classes the first has no extras
            return plain, getattr(transformers, auto)
    what = (spec.config.get("architectures") or [type(config).__name__])[0]
    raise InputError(
        f"{spec.id} is a {what}, which cannot be planned and trained for {kind.words}.",
        advice="Plans are for models that predict the next token of a text, turn one text into another or speech into "
        "text (as Whisper does), and for classifiers of texts and of images cut into patches.",
    )


def _has_size(task: Task, config: PretrainedConfig) -> bool:
    """Whether the configuration says how large an input is, where the task cannot choose it."""
    if task == "speech-to-text":
        return all(hasattr(config, name) for name in ("num_mel_bins", "max_source_positions"))
    if task == "image-classification":
        return all(isinstance(getattr(config, name, None), int) for name in ("image_size", "patch_size"))
    return True


def default_task(config: Mapping[str, Any]) -> Task:
    """What a model of this configuration is trained for if nobody says.

    Models that are made of an encoder and a decoder turn texts or speech into text, those for images and encoders of
    text are fine-tuned for classification, and everything else that generates is a language model.
    A configuration that names no architecture means the first of these that transformers has for its model type.

    Args:
        config: as in ``config.json``.
    """
    from transformers.models.auto import modeling_auto as known

    names = [str(name) for name in config.get("architectures") or ()]
    model_type = config.get("model_type")
    if any(name.endswith("ImageClassification") for name in names):
        return "image-classification"
    generates = model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not any(name.endswith(("ForCausalLM", "SequenceClassification")) for name in names):
        two_stacks = config.get("is_encoder_decoder", not (generates and names))
        if two_stacks and model_type in known.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
            return "speech-to-text"
        if two_stacks and model_type in known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            return "sequence-to-sequence"
    classifies_texts = model_type in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if not generates and not classifies_texts and model_type in known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "image-classification"
    if not names and not generates:
        return "sequence-classification" if classifies_texts else "causal-lm"
    encoder = any(name.endswith(("ForMaskedLM", "ForPreTraining", "SequenceClassification")) for name in names)
    return "sequence-classification" if encoder else "causal-lm"


def input_positions(config: PretrainedConfig, task: Task) -> int | None:
    """Positions of an input whose size the model fixes: of an image its patches and the class token, of speech those
    of the encoder. None for texts, which have the length that is asked for.
    """
    if task == "image-classification":
        return int((config.image_size // config.patch_size) ** 2 + 1)
    if task == "speech-to-text":
        return int(config.max_source_positions)
    return None


def chosen_lengths(
    spec: ModelSpec, config: PretrainedConfig, seq_len: int | None, decoder_len: int | None
) -> tuple[int, int | None]:
    """The lengths of a plan: of the input, and of the text that a decoder learns to write (None without a decoder).

    Args:
        spec, config: the model.
        seq_len: what was asked for; None is 512, or what the model fixes.
        decoder_len: what was asked for; None is the input's length, or for speech all positions of the decoder.

    Raises:
        InputError: if the model has no such length to choose.
    """
    fixed = input_positions(config, spec.task)
    if fixed is not None and seq_len not in (None, fixed):
        raise InputError(
            f"{spec.id} takes inputs of {fixed} positions, so --seq-len {seq_len} is not possible.",
            advice="Leave --seq-len out.",
        )
    length = fixed or seq_len or DEFAULT_SEQ_LEN
    if not TASKS[spec.task].two_stacks:
        if decoder_len is not None:
            raise InputError(f"{spec.id} has no decoder with a length of its own.", advice="Leave --decoder-len out.")
        return length, None
    longest = getattr(config, "max_target_positions", None) if fixed else None
    return length, decoder_len or longest or length


def blank_batch(plan: Plan, config: PretrainedConfig) -> dict[str, Tensor]:
    """A batch of the plan's size without content: what forward gets in a step of the plan's task.

    Args:
        plan: task, batch size B, length S of the inputs, length T of the decoder's texts, dtype.
        config: of the model, which fixes the size of images and of speech.

    Returns:
        ``labels`` int64, [B] for a classification, [B, T] of a decoder, else [B, S]; and, zeros all of them but masks:
        ``input_ids`` int64 [B, S] with ``attention_mask`` where padding must be told (encoders of text);
        ``pixel_values`` [B, channels, height, width] or ``input_features`` [B, mel bins, frames] in the plan's dtype,
        in which the weights are: a collator does well to convert them while they are small in number.
    """
    training, task = plan.training, plan.model.task
    size = training.batch_size
    floating = getattr(torch, training.dtype)
    shape = (size, training.seq_len)
    batch: dict[str, Tensor] = {}
    if task == "image-classification":
        side = config.image_size
        batch["pixel_values"] = torch.zeros((size, getattr(config, "num_channels", 3), side, side), dtype=floating)
    elif task == "speech-to-text":
        frames = FRAMES_PER_POSITION * config.max_source_positions
        batch["input_features"] = torch.zeros((size, config.num_mel_bins, frames), dtype=floating)
    else:
        batch["input_ids"] = torch.zeros(shape, dtype=torch.int64)
    if task in ("sequence-classification", "sequence-to-sequence"):
        batch["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    if task == "sequence-classification" and getattr(config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
    labels = (size,) if task in CLASSIFICATIONS else (size, training.decoder_len or training.seq_len)
    batch["labels"] = torch.zeros(labels, dtype=torch.int64)
    return batch
