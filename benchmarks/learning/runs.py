"""One run of the contest: the trainer's own model, loss, optimizer and step, in a loop that does nothing else."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from badam import phases
from badam.plan import Plan
from badam.profiling.recorder import Recorder
from badam.training.build import build_model, build_optimizer, prepare_model
from badam.training.data.batches import PlanCollator
from badam.training.losses import IGNORE_INDEX, full_loss
from badam.training.methods import method_of
from badam.vocabulary import Phase
from benchmarks.learning.contest import Contestant, Settings, plan_of
from benchmarks.learning.corpus import Corpus, Example, batches, endless_order
from benchmarks.learning.records import Point, RunRecord

CPU = torch.device("cpu")


def pretrain(settings: Settings, corpus: Corpus, directory: Path) -> None:
    """Train the model from random weights on sources, by Adam in the contest's type, and save it."""
    adam = Contestant("pretraining", "adam", settings.pretraining_rate)
    plan = plan_of(adam, settings, adam.rate, seed=0)
    torch.manual_seed(0)
    model = build_model(plan.model, plan.training)
    optimizer = build_optimizer(model, plan)
    steps, length = settings.pretraining_steps, settings.pretraining_length
    scheduler = get_scheduler(settings.scheduler, optimizer, steps // 20, steps)
    rows = torch.tensor(corpus.sources[: len(corpus.sources) // length * length]).view(-1, length)
    order = endless_order(len(rows), seed=0)
    for _ in range(steps):
        tokens = rows[list(islice(order, settings.pretraining_batch))]
        loss = full_loss(model, {"input_ids": tokens, "labels": tokens}, None)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    method_of("adam").settle(optimizer)
    model.save_pretrained(directory)


def fine_tune(
    contestant: Contestant, settings: Settings, corpus: Corpus, weights: Path, rate: float, seed: int
) -> RunRecord:
    """Fine-tune the saved model by one method; ``seed`` decides the order of the data and of the blocks."""
    plan = plan_of(contestant, settings, rate, seed)
    method = method_of(plan.method)
    method.check(plan)
    recorder = Recorder(CPU, every_step=False)
    recorder.start()
    try:
        torch.manual_seed(seed)
        model = build_model(plan.model, plan.training, weights=str(weights))
        prepare_model(model, plan)
        optimizer = build_optimizer(model, plan)
        scheduler = get_scheduler(settings.scheduler, optimizer, 0, settings.steps)
        collator = PlanCollator(settings.seq_len, corpus.tokenizer.pad_token_id)
        pairs = training_pairs(corpus, settings)
        points = [_point(0, 0.0, model, settings, corpus, pairs)]
        phases.enter(Phase.SETUP)
        recorder.attach(model, optimizer)
        seconds = 0.0
        for step, examples in enumerate(islice(batches(pairs, settings.batch_size, seed), settings.steps), 1):
            batch = collator(examples)
            recorder.next_step([batch])
            begun = time.process_time()
            _step(plan, method, model, optimizer, batch)
            scheduler.step()
            phases.enter(Phase.SETUP)
            seconds += time.process_time() - begun
            if step % settings.evaluate_every == 0:
                points.append(_point(step, seconds, model, settings, corpus, pairs))
                phases.enter(Phase.SETUP)
    finally:
        recorder.stop()
    peaks = [step.memory.peak_bytes for step in recorder.log.steps if step.memory is not None]
    _release(optimizer)
    return RunRecord(rate=rate, seed=seed, peak_bytes=max(peaks), points=tuple(points))


def training_pairs(corpus: Corpus, settings: Settings) -> list[Example]:
    """The pairs to fine-tune on: all, or as many as asked for, drawn once for all runs."""
    if settings.training_pairs is None:
        return corpus.training
    return random.Random(0).sample(corpus.training, settings.training_pairs)


def _point(
    step: int, seconds: float, model: Any, settings: Settings, corpus: Corpus, pairs: Sequence[Example]
) -> Point:
    known = evaluate(model, settings, corpus, pairs) if settings.training_pairs else None
    return Point(
        step=step, seconds=seconds, loss=evaluate(model, settings, corpus, corpus.evaluation), training_loss=known
    )


@torch.no_grad()
def evaluate(model: Any, settings: Settings, corpus: Corpus, examples_of: Sequence[Example]) -> float:
    """Mean loss per token over the docstrings of the first ``evaluation_batches`` batches of ``examples_of``."""
    model.eval()
    collator = PlanCollator(settings.seq_len, corpus.tokenizer.pad_token_id)
    total, tokens = 0.0, 0
    for examples in _evaluation(examples_of, settings):
        batch = collator(examples)
        count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        total += float(full_loss(model, batch, 1))
        tokens += count
    model.train()
    return total / tokens


def _evaluation(examples: Sequence[Example], settings: Settings) -> Iterator[list[Example]]:
    for index in range(settings.evaluation_batches):
        yield list(examples[index * settings.batch_size : (index + 1) * settings.batch_size])


def _step(plan: Plan, method: Any, model: Any, optimizer: Any, batch: dict[str, Tensor]) -> None:
    loss = method.loss(model, batch, plan, optimizer, None)
    method.backward(loss, optimizer)
    del loss
    phases.enter(Phase.STEP)
    if norm := plan.training.optimizer.max_grad_norm:
        clip = getattr(optimizer, "clip_grad_norm_", None)
        if clip is not None:
            clip(norm)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
    optimizer.step()
    optimizer.zero_grad()


def _release(optimizer: Any) -> None:
    """Hooks on parameters would keep masters and moments alive into the next run."""
    for active in getattr(optimizer, "active_parameters", ()):
        active.close()
    optimizer.state.clear()
