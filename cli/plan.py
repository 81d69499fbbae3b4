"""``badam-plan``: which partition of which model fits which card, at which peak."""

from __future__ import annotations

import atexit
import gc
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from badam.vocabulary import (
    AttentionChoice,
    CheckpointingChoice,
    Dtype,
    Engine,
    LossChoice,
    Method,
    Offload,
    PartitionChoice,
    SegmentsChoice,
    SwitchMode,
    TaskChoice,
)
from badam_cli._app import Version, quiet_libraries, reporting_errors, say
from badam_cli._plan_output import present, progress_on_stderr

app = typer.Typer(rich_markup_mode=None)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Catalogue name, Hub id, directory or config.json.")],
    gpu: Annotated[str, typer.Option(help="Card by name, auto for the one in this machine, or cpu.")] = "auto",
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory that may be used, such as 24GiB, instead of what the card has.")
    ] = None,
    num_gpus: Annotated[str, typer.Option(help="Number of cards; auto finds the fewest that fit.")] = "1",
    engine: Annotated[
        Engine,
        typer.Option(help="How several cards share the model: ddp copies it, fsdp2 and zero3 shard it."),
    ] = "single",
    shard_size: Annotated[
        str | None,
        typer.Option(
            help="With fsdp2, cards that one copy of the model is cut over, auto for the fewest that do; all by "
            "default. With fewer than all there are several copies (HSDP)."
        ),
    ] = None,
    offload: Annotated[
        Offload,
        typer.Option(help="With zero3: keep the optimizer's state, or parameters as well, in host memory."),
    ] = "none",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Cards in one machine, for transfer times.")] = 8,
    method: Annotated[Method, typer.Option(help="Training method.")] = "badam",
    compare_methods: Annotated[bool, typer.Option("--compare-methods", help="Also plan every other method.")] = False,
    partition: Annotated[PartitionChoice, typer.Option(help="What a block is; auto tries all three.")] = "auto",
    include_embedding: Annotated[bool, typer.Option(help="Train the embedding as a block.")] = False,
    include_lm_head: Annotated[bool, typer.Option(help="Train the output projection as a block.")] = False,
    active_module: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Train this module in every visit, besides its block. Can be repeated."),
    ] = None,
    task: Annotated[
        TaskChoice,
        typer.Option(help="What to train for; auto follows the model's configuration."),
    ] = "auto",
    num_labels: Annotated[
        int | None, typer.Option(min=2, help="Number of classes of a classification; two by default.")
    ] = None,
    update_ratio: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="badam-ratio: share of each parameter trained at a time.")
    ] = 0.1,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank, for lora and qlora (8 by default) and galore (128 by default).")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="lora, qlora: alpha of the adapters, twice the rank by default.")
    ] = None,
    target_module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            help="lora, qlora: adapt modules of this name. Can be repeated. By default every linear layer but the "
            "output projection.",
        ),
    ] = None,
    sampled_layers: Annotated[int, typer.Option(min=1, help="lisa: number of layers trained at a time.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per micro-batch (and card).")] = 1,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sequence, 512 by default; fixed for images and speech.")
    ] = None,
    decoder_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Models with encoder and decoder: tokens per target sequence. By default --seq-len, or for speech the "
            "longest that the decoder can write.",
        ),
    ] = None,
    grad_accum: Annotated[int, typer.Option(min=1, help="Micro-batches per optimizer step.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Data type of the weights.")] = "bfloat16",
    checkpointing: Annotated[
        CheckpointingChoice,
        typer.Option(help="Activation checkpointing of all layers; auto only where needed to fit."),
    ] = "auto",
    loss: Annotated[
        LossChoice,
        typer.Option(help="Logits in full or in chunks; auto in chunks only where needed to fit."),
    ] = "auto",
    expandable_segments: Annotated[
        SegmentsChoice,
        typer.Option(help="Expandable segments of the CUDA allocator; auto only where needed to fit."),
    ] = "auto",
    allow_cache_release: Annotated[
        bool,
        typer.Option(
            "--allow-cache-release",
            help="If nothing fits: plan what stays within memory only because torch gives back cached segments in each "
            "step and reserves them anew, which costs time.",
        ),
    ] = False,
    attention: Annotated[
        AttentionChoice,
        typer.Option(help="Attention implementation; auto is sdpa where the model has it."),
    ] = "auto",
    switch_every: Annotated[
        str, typer.Option(help="K, the optimizer steps of each visit to a block; auto takes 50 to 100, by --samples.")
    ] = "auto",
    switch_mode: Annotated[SwitchMode, typer.Option(help="Order in which blocks are visited.")] = "random",
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Number of training examples, for --switch-every auto and the time of an epoch."),
    ] = None,
    epochs: Annotated[
        float, typer.Option(min=0.0, help="With --samples: passes over the data, for the time of the run.")
    ] = 1.0,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Learning rate, as badam-train will use it.")] = 1e-5,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the block order.")] = 0,
    output: Annotated[Path, typer.Option(help="Where to write the plan.")] = Path("plan.json"),
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained HTML report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan on stdout and nothing else.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Rehearse every layer instead of one of each kind.")] = False,
    version: Version = False,
) -> None:
    """Predict the peak memory of fine-tuning MODEL for each way to cut it into blocks, and write a plan for the best.

    Exit code 0: it fits, and the plan was written; 1: nothing fits, or only by giving back cached memory, which
    --allow-cache-release accepts; 2: bad input.
    """
    with reporting_errors():
        quiet_libraries()
        gc.disable()  # nearly all that is made from here on, modules included, lives to the end, which is seconds away
        from badam.plan import MethodOptions
        from badam.units import parse_bytes
        from badam_planner.search.answers import answer
        from badam_planner.search.question import Question, wrong_values_refused

        with wrong_values_refused():
            question = Question(
                model=model,
                task=task,
                num_labels=num_labels,
                gpu=gpu,
                gpu_memory_bytes=None if gpu_memory is None else parse_bytes(gpu_memory),
                num_gpus=_number_or_auto("--num-gpus", num_gpus),
                engine=engine,
                shard_size=None if shard_size is None else _number_or_auto("--shard-size", shard_size),
                offload=offload,
                gpus_per_node=gpus_per_node,
                method=method,
                compare_methods=compare_methods,
                partition=partition,
                include_embedding=include_embedding,
                include_lm_head=include_lm_head,
                active_modules=tuple(active_module or ()),
                batch_size=batch_size,
                seq_len=seq_len,
                decoder_len=decoder_len,
                grad_accum=grad_accum,
                dtype=dtype,
                checkpointing=checkpointing,
                loss=loss,
                expandable_segments=expandable_segments,
                allow_cache_release=allow_cache_release,
                attention=attention,
                switch_every=_visit_length(switch_every),
                switch_mode=switch_mode,
                samples=samples,
                learning_rate=learning_rate,
                options=MethodOptions(
                    update_ratio=update_ratio,
                    rank=rank,
                    alpha=alpha,
                    target_modules=tuple(target_module or ()),
                    sampled_layers=sampled_layers,
                ),
                seed=seed,
                exact=exact,
            )
        command = shlex.join(["badam-plan", *sys.argv[1:]])
        with progress_on_stderr() as progress:
            found = answer(question, command=command, progress=progress, tell=say)
        if num_gpus == "auto" and found.plan is not None and found.plan.target.num_gpus == 1:
            say(f"One card is enough, so the plan is for one, without {engine}.")
        for note in found.notes:
            say(note)
        present(found, output, html, epochs=epochs, as_json=as_json)


def _number_or_auto(option: str, text: str) -> int | Literal["auto"]:
    from badam.errors import InputError

    if text == "auto":
        return "auto"
    if not (text.isdecimal() and int(text) > 0):
        raise InputError(f"{option} {text!r} is neither a number of cards nor auto.")
    return int(text)


def _visit_length(text: str) -> int | None:
    from badam.errors import InputError

    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"--switch-every {text!r} is neither a number of steps nor auto.") from error


def main() -> None:
    """Console entry point."""
    # As it ends, the interpreter looks for cycles through all that was imported: with torch, a fifth of all this takes.
    atexit.register(gc.freeze)
    app()


if __name__ == "__main__":
    main()
