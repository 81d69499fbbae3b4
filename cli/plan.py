"""``badam-plan``: which partition of which model fits which card, at which peak."""

from __future__ import annotations

import atexit
import gc
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from badam_cli._app import Version, quiet_libraries, reporting_errors, say
from badam_cli._plan_output import present, progress_on_stderr

if TYPE_CHECKING:
    from badam.plan import Target
    from badam_planner.search.result import Answer

Method = Literal["badam", "badam-ratio", "adam", "lora", "qlora", "lomo", "adalomo", "galore", "lisa", "hift", "mezo"]

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
        Literal["single", "ddp", "fsdp2", "zero3"],
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
        Literal["none", "optimizer", "all"],
        typer.Option(help="With zero3: keep the optimizer's state, or parameters as well, in host memory."),
    ] = "none",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Cards in one machine, for transfer times.")] = 8,
    method: Annotated[Method, typer.Option(help="Training method.")] = "badam",
    compare_methods: Annotated[bool, typer.Option("--compare-methods", help="Also plan every other method.")] = False,
    partition: Annotated[
        Literal["auto", "layer", "attn-mlp", "matrix"], typer.Option(help="What a block is; auto tries all three.")
    ] = "auto",
    include_embedding: Annotated[bool, typer.Option(help="Train the embedding as a block.")] = False,
    include_lm_head: Annotated[bool, typer.Option(help="Train the output projection as a block.")] = False,
    active_module: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Train this module in every visit, besides its block. Can be repeated."),
    ] = None,
    task: Annotated[
        Literal[
            "auto",
            "causal-lm",
            "sequence-classification",
            "sequence-to-sequence",
            "image-classification",
            "speech-to-text",
        ],
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
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Data type of the weights.")
    ] = "bfloat16",
    checkpointing: Annotated[
        Literal["auto", "all", "none"],
        typer.Option(help="Activation checkpointing of all layers; auto only where needed to fit."),
    ] = "auto",
    loss: Annotated[
        Literal["auto", "full", "chunked"],
        typer.Option(help="Logits in full or in chunks; auto in chunks only where needed to fit."),
    ] = "auto",
    expandable_segments: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(help="Expandable segments of the CUDA allocator; auto only where needed to fit."),
    ] = "auto",
    attention: Annotated[
        Literal["auto", "sdpa", "eager"],
        typer.Option(help="Attention implementation; auto is sdpa where the model has it."),
    ] = "auto",
    switch_every: Annotated[
        str, typer.Option(help="K, the optimizer steps of each visit to a block; auto takes 50 to 100, by --samples.")
    ] = "auto",
    switch_mode: Annotated[
        Literal["random", "ascending", "descending", "fixed"], typer.Option(help="Order in which blocks are visited.")
    ] = "random",
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Number of training examples, for --switch-every auto and the time of an epoch."),
    ] = None,
    epochs: Annotated[
        float, typer.Option(min=0.0, help="With --samples: passes over the data, for the time of the run.")
    ] = 1.0,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Learning rate, as badam-train will use it.")] = 1e-5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the block order.")] = 0,
    output: Annotated[Path, typer.Option(help="Where to write the plan.")] = Path("plan.json"),
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained HTML report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan on stdout and nothing else.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Rehearse every layer instead of one of each kind.")] = False,
    version: Version = False,
) -> None:
    """Predict the peak memory of fine-tuning MODEL for each way to cut it into blocks, and write a plan for the best.

    Exit code 0: it fits, and the plan was written; 1: nothing fits; 2: bad input.
    """
    with reporting_errors():
        quiet_libraries()
        cards = _gpus(engine, num_gpus, shard_size, gpus_per_node, offload)
        options = {
            "method": method,
            "compare_methods": compare_methods,
            "partition": partition,
            "include_embedding": include_embedding,
            "include_lm_head": include_lm_head,
            "active_modules": tuple(active_module or ()),
            "batch_size": batch_size,
            "seq_len": seq_len,
            "decoder_len": decoder_len,
            "grad_accum": grad_accum,
            "dtype": dtype,
            "checkpointing": checkpointing,
            "loss": loss,
            "expandable_segments": expandable_segments,
            "attention": attention,
            "switch_every": _visit_length(switch_every),
            "switch_mode": switch_mode,
            "samples": samples,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "options": _method_options(update_ratio, rank, alpha, tuple(target_module or ()), sampled_layers),
            "seed": seed,
            "exact": exact,
            "find_num_gpus": num_gpus == "auto",
            "find_shard_size": shard_size == "auto",
        }
        with progress_on_stderr() as progress:
            progress(f"reading {model}")
            target = _target(gpu, gpu_memory).model_copy(update=cards)
            purpose = {"task": None if task == "auto" else task, "labels": num_labels}
            answer = _answer(model, purpose, target, options, progress)
        if num_gpus == "auto" and answer.plan is not None and answer.plan.target.num_gpus == 1:
            say(f"One card is enough, so the plan is for one, without {engine}.")
        present(answer, output, html, epochs=epochs, as_json=as_json)


def _answer(
    model: str, purpose: dict[str, Any], target: Target, options: dict[str, Any], progress: Callable[[str], None]
) -> Answer:
    """The answer given before to the same question, or a new one; only a new one loads torch."""
    from badam_planner.search.answer_cache import answer_key, load_answer, save_answer
    from badam_planner.sources.model_source import find_config, specify

    source = find_config(model)
    key = answer_key({"model": source, **purpose, "target": target.model_dump(mode="json"), **options})
    command = shlex.join(["badam-plan", *sys.argv[1:]])
    answer = load_answer(key)
    if answer is None:
        gc.disable()  # nearly all that is made from here on, modules included, lives to the end, which is seconds away
        from badam.plan import MethodOptions
        from badam.training.build import choose_attention, model_config
        from badam.training.tasks import chosen_lengths
        from badam_planner.rehearsal.workers import available_workers
        from badam_planner.search.planner import Request, make_plan

        spec = specify(*source, **purpose)
        lengths = chosen_lengths(spec, model_config(spec), options["seq_len"], options["decoder_len"])
        options = {**options, **dict(zip(("seq_len", "decoder_len"), lengths, strict=True))}
        options["options"] = MethodOptions(**options["options"])
        if options["attention"] == "auto":
            options = {**options, "attention": choose_attention(spec)}
        request = Request(spec=spec, target=target, command=command, **options)
        answer = make_plan(request, progress, workers=available_workers())
        save_answer(key, answer)
    elif answer.plan is not None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        provenance = answer.plan.provenance.model_copy(update={"command": command, "date": now})
        answer = replace(answer, plan=answer.plan.model_copy(update={"provenance": provenance}))
    return answer


def _gpus(engine: str, num_gpus: str, shard_size: str | None, gpus_per_node: int, offload: str) -> dict[str, Any]:
    """The fields of the target that say how many cards there are and what joins them."""
    from badam.errors import InputError

    for option, given in (("--num-gpus", num_gpus), ("--shard-size", shard_size or "auto")):
        if given != "auto" and not (given.isdecimal() and int(given) > 0):
            raise InputError(f"{option} {given!r} is neither a number of cards nor auto.")
    if engine == "single" and num_gpus != "1":
        raise InputError(
            f"--num-gpus {num_gpus} needs an engine for several cards.", advice="Add --engine fsdp2, or --engine ddp."
        )
    if engine != "single" and num_gpus == "1":
        raise InputError(
            f"--engine {engine} joins cards, and there is one.",
            advice=f"Say how many with --num-gpus, or leave --engine {engine} out.",
        )
    if engine == "ddp" and num_gpus == "auto":
        raise InputError(
            "With --engine ddp every card needs the same memory, so there is no fewest that fit.",
            advice="Give a number.",
        )
    if offload != "none" and engine != "zero3":
        raise InputError(f"--offload {offload} needs DeepSpeed, not {engine}.", advice="Add --engine zero3.")
    cards = 1 if num_gpus == "auto" else int(num_gpus)
    if shard_size is not None:
        _check_shard_size(shard_size, engine, num_gpus)
    size = None if shard_size is None or shard_size in ("auto", num_gpus) else int(shard_size)
    return {
        "engine": engine,
        "num_gpus": cards,
        "shard_size": size,
        "gpus_per_node": gpus_per_node,
        "offload": offload,
    }


def _check_shard_size(shard_size: str, engine: str, num_gpus: str) -> None:
    from badam.errors import InputError

    if engine != "fsdp2":
        raise InputError(f"--shard-size {shard_size} needs FSDP2, not {engine}.", advice="Add --engine fsdp2.")
    if shard_size == "1":
        raise InputError("With --shard-size 1 no copy of the model would be cut.", advice="Use --engine ddp.")
    if num_gpus == "auto":
        raise InputError(
            f"With --shard-size {shard_size} what a card needs does not depend on the number of cards.",
            advice="Give --num-gpus a number; or leave --shard-size out, to find the fewest cards for one copy.",
        )
    if shard_size != "auto" and int(num_gpus) % int(shard_size):
        whole = [size for size in range(2, min(int(num_gpus), 4096) + 1) if int(num_gpus) % size == 0]
        raise InputError(
            f"{num_gpus} cards cannot be divided into groups of {shard_size}.",
            advice=f"Choose --shard-size among {', '.join(map(str, whole))}.",
        )


def _target(gpu: str, gpu_memory: str | None) -> Target:
    """The target with what runs measured on it have taught, if there were any."""
    from badam.units import parse_bytes
    from badam_planner.accuracy.calibration import calibrated
    from badam_planner.sources.calibration_store import load_calibration
    from badam_planner.sources.target import find_target

    target = find_target(gpu, None if gpu_memory is None else parse_bytes(gpu_memory))
    calibration = load_calibration(target.gpu)
    if calibration is None:
        return target
    say(calibration.sentence())
    return calibrated(target, calibration)


def _method_options(
    update_ratio: float, rank: int | None, alpha: float | None, target_modules: tuple[str, ...], sampled_layers: int
) -> dict[str, Any]:
    """What single methods ask for, as plain values; those not given keep the plan's defaults."""
    from badam.errors import InputError

    if update_ratio <= 0:
        raise InputError(f"--update-ratio {update_ratio:g} trains nothing.", advice="Give a share such as 0.1.")
    if alpha is not None and alpha <= 0:
        raise InputError(f"--alpha {alpha:g} would switch the adapters off.", advice="Give a positive number.")
    given = {"rank": rank, "alpha": alpha, "target_modules": target_modules}
    return {
        "update_ratio": update_ratio,
        "sampled_layers": sampled_layers,
        **{name: value for name, value in given.items() if value},
    }


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
