"""``badam-train``: run a plan, leave a checkpoint and what was measured."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from badam.errors import InputError, require
from badam.training.one_voice import rank_and_count
from badam.vocabulary import LossOn, OnBadRow, OnLong, Padding, Profile
from badam_cli._allocator import configure_allocator
from badam_cli._app import OneVoice, Version, ending_at_once, quiet_libraries, reporting_errors, say

app = typer.Typer(rich_markup_mode=None)


@app.command(cls=OneVoice)
def train(
    plan: Annotated[Path, typer.Option(help="The plan, as badam-plan wrote it.")],
    data: Annotated[
        str,
        typer.Option(
            help="File (json, jsonl, csv, parquet, txt), directory or Hub id, in alpaca, prompt/completion, messages, "
            "ShareGPT or plain text form, or labelled texts for a classification. The default needs no file: "
            "docstrings of Python's standard library."
        ),
    ] = "stdlib-docstrings",
    column: Annotated[
        list[str] | None, typer.Option(metavar="NAME=YOURS", help="Your name for a column, as in completion=answer.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    records: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Key of the list of records in a .json file that is an object, as in train."),
    ] = None,
    on_bad_row: Annotated[
        OnBadRow,
        typer.Option(help="What to do with records that cannot be read, or that the chat template does not take."),
    ] = "refuse",
    loss_on: Annotated[
        LossOn | None,
        typer.Option(
            help="What is learned: all that the assistant says, the completion (the assistant's last turn) or "
            "everything. By default the completion where there is a prompt, else what the assistant says."
        ),
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Data to evaluate on, as --data.")] = None,
    eval_split: Annotated[str, typer.Option(help="Split of --eval-data, if it is a Hub data set.")] = "validation",
    eval_share: Annotated[
        float, typer.Option(help="Share of --data to hold out and evaluate on, where there is no --eval-data.")
    ] = 0.0,
    eval_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between evaluations; with every checkpoint, or else every epoch.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="End with the weights of the best evaluation, whose checkpoint is kept.")
    ] = False,
    patience: Annotated[
        int | None, typer.Option(min=1, help="With --best: stop after this many evaluations without a better one.")
    ] = None,
    pack: Annotated[bool, typer.Option("--pack", help="Pack several whole examples into one sequence.")] = False,
    adapt: Annotated[
        bool, typer.Option("--adapt", help="When memory runs out, halve the micro-batch, accumulate more, go on.")
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="New or empty directory for all that the run leaves; runs/MODEL by default."),
    ] = None,
    init: Annotated[str, typer.Option(help="pretrained, random, or a directory with safetensors weights.")] = (
        "pretrained"
    ),
    max_steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of --epochs.")] = None,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the data.")] = 1.0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint.")] = False,
    save_steps: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints; none by default.")] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Checkpoints to keep; all by default.")] = None,
    lr_scheduler: Annotated[
        Literal[
            "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"
        ],
        typer.Option(help="Learning rate over time."),
    ] = "cosine",
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps in which the learning rate rises from zero.")] = 0,
    warmup_share: Annotated[float, typer.Option(help="The same as a share of all steps, such as 0.03.")] = 0.0,
    pad_to: Annotated[
        Padding,
        typer.Option(
            help="Length of batches: the plan's, their longest example's, or the plan's for the first two steps of "
            "each visit, which shows early whether the plan fits."
        ),
    ] = "auto",
    on_long: Annotated[
        OnLong,
        typer.Option(help="What to do with examples that are longer than planned."),
    ] = "truncate",
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of random weights and of the order of the data.")
    ] = 0,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Given by deepspeed's launcher.")] = 0,
    profile: Annotated[
        Profile,
        typer.Option(
            help="full also records each module's time and memory, and on CUDA a snapshot for torch's memory viewer; "
            "slow."
        ),
    ] = "normal",
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Also log to tensorboard, wandb and others, as transformers can. Can be repeated."
        ),
    ] = None,
    version: Version = False,
) -> None:
    """Train the plan's model, and measure its memory and time.

    The output directory gets model/ (safetensors and tokenizer), checkpoint-N/, measured.json, metrics.jsonl,
    evaluations.jsonl and plan.json. Exit code: 0 done; 2 bad input; 3 out of memory; 130 or 143 stopped by SIGINT or
    SIGTERM after saving.
    """
    with reporting_errors():
        from badam.plan import load_plan, other_versions

        loaded = load_plan(plan)
        others = other_versions(loaded)
        if others is not None and rank_and_count()[0] == 0:
            say(f"The plan was made with other versions, which may need other memory: {others}.")
        libraries = ("trl", "datasets", "accelerate", "ijson")
        require("badam-train", dict(zip(libraries, libraries, strict=True)), extra="train")
        columns = _columns(column or [])
        quiet_libraries()
        configure_allocator(loaded.target)
        with ending_at_once():
            from rich.console import Console

            from badam.training.options import RunOptions
            from badam.training.run import run_plan
            from badam.training.run_directory import new_run_directory

        if output_dir is None and resume:
            raise InputError("--resume needs to know which run to continue.", advice="Name it with --output-dir.")
        options = RunOptions(
            output_dir=output_dir or new_run_directory(Path("runs"), loaded.model.id),
            data=data,
            columns=columns,
            split=split,
            records=records,
            on_bad_row=on_bad_row,
            loss_on=loss_on,
            init=init,
            max_steps=max_steps,
            epochs=epochs,
            resume=resume,
            save_steps=save_steps,
            keep=keep,
            lr_scheduler=lr_scheduler,
            warmup_steps=warmup_steps,
            warmup_share=warmup_share,
            eval_data=eval_data,
            eval_split=eval_split,
            eval_share=eval_share,
            eval_steps=eval_steps,
            keep_best=best,
            patience=patience,
            pack=pack,
            adapt=adapt,
            padding=pad_to,
            on_long=on_long,
            seed=seed,
            profile=profile,
            report_to=tuple(report_to or ()),
        )
        command = shlex.join(["badam-train", *sys.argv[1:]])
        result = run_plan(loaded, options, Console(stderr=True), command=command)
    if result.stopped_by is not None and not result.is_main_process:
        raise typer.Exit(128 + result.stopped_by)
    if not result.is_main_process:
        return
    from badam.units import format_bytes

    if result.stopped_by is not None:
        say(f"stopped by {result.stopped_by.name} after step {result.step} and saved; go on with --resume")
        raise typer.Exit(128 + result.stopped_by)
    if result.measured is not None:
        measurement = result.measured.measurement
        say(f"loss {measurement.first_loss:.3f} -> {measurement.last_loss:.3f} in {measurement.steps} steps")
        if cards := result.measured.cards:
            fullest = max(cards, key=lambda gpu: gpu.peak_allocated_bytes)
            peak = format_bytes(fullest.peak_allocated_bytes)
            say(f"fullest of {len(cards)} cards: {fullest.rank}, with a peak of {peak}")
    if result.best is not None:
        say(f"best evaluation: {result.best.figure:.3f} after step {result.best.step}, whose weights the model has")
    say(f"model: {result.model_path}")
    if result.measured is not None:
        say(f"compare: badam-report {plan} {result.measured_path}")


def _columns(given: list[str]) -> dict[str, str]:
    columns = {}
    for text in given:
        name, equals, theirs = text.partition("=")
        if not (name and equals and theirs):
            raise InputError(f"--column {text} has no name on both sides of '='.", advice="Write completion=answer.")
        columns[name] = theirs
    return columns


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
