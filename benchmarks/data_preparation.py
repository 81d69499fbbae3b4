"""What it takes to prepare the data of a run: 52,000 alpaca-like records, from a file to tokens with labels.

The records are made up of words drawn by Zipf's law, as long as those of Alpaca-GPT4 (10 words of instruction, an input
in two fifths of them, 120 words of output in the mean). Timed is everything that badam-train does with them: reading,
recognizing and converting, tokenizing by a byte-level tokenizer of 32,000 tokens, labels, length statistics. Not
timed: making the file and the tokenizer, and importing libraries, whose memory is told beside. The bar of 60 seconds
is held against processor seconds, so that other work on the machine does not count; that of 1 GiB against all memory of
the process that was ever resident at a time, libraries and mapped files included.

    python -m benchmarks.data_preparation [RECORDS]
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import datasets
import torch

from badam.plan import BlockPlan, ModelSpec, Partition, Plan, Provenance, Target, Training, config_digest
from badam.profiling.recorder import Recorder
from badam.training.build import build_model
from badam.training.data.inputs import load_inputs
from badam.training.data.tokenizer import train_tokenizer
from badam.training.options import RunOptions
from badam.training.setup import prepare_trainer
from badam.units import format_bytes

RECORDS, WORDS, VOCABULARY = 52_000, 30_000, 32_000
BAR_SECONDS, BAR_BYTES = 60, 2**30
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": 8,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
}  # fmt: skip


def make_records(path: Path, count: int) -> None:
    """Write alpaca records as one JSON array, as the original is."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(WORDS)]
    weights = list(accumulate(1 / rank for rank in range(1, WORDS + 1)))

    def text(mean: float) -> str:
        return " ".join(draw.choices(words, cum_weights=weights, k=1 + int(draw.expovariate(1 / mean))))

    rows = [
        {"instruction": text(10), "input": text(15) if draw.random() < 0.4 else "", "output": text(120)}
        for _ in range(count)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")


def tiny_plan(seq_len: int) -> Plan:
    """A plan whose model costs nothing."""
    return Plan(
        model=ModelSpec(
            id="badam/none", source="config", config=CONFIG, config_digest=config_digest(CONFIG), parameters=1
        ),
        target=Target(gpu="cpu", total_bytes=0, usable_bytes=0),
        partition=Partition(
            strategy="layer", blocks=(BlockPlan(name="0", prefixes=("model.layers.0",), parameters=1),)
        ),
        training=Training(batch_size=2, seq_len=seq_len),
        provenance=Provenance(versions={}, command="", date=""),
    )


def main() -> None:
    """Print seconds and memory, and whether they are within the bars."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    count = int(sys.argv[1]) if len(sys.argv) > 1 else RECORDS
    plan = tiny_plan(728)
    with tempfile.TemporaryDirectory() as directory:
        path, tokenizer = Path(directory) / "alpaca.json", Path(directory) / "tokenizer"
        if os.fork() == 0:  # so that what making them takes is not in this process's peak
            make_records(path, count)
            sample = json.loads(path.read_text(encoding="utf-8"))[:4000]
            train_tokenizer((row["output"] for row in sample), VOCABULARY).save_pretrained(tokenizer)
            os._exit(0)
        os.wait()
        model = build_model(plan.model, plan.training)
        options = RunOptions(output_dir=Path(directory), data=str(path), max_steps=1)
        before = _peak_bytes()
        wall, processor = time.perf_counter(), time.process_time()
        inputs = load_inputs(plan, options, str(tokenizer))
        recorder = Recorder(torch.device("cpu"), every_step=False)
        prepared = prepare_trainer(plan, options, model, inputs, recorder, print)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        peak = _peak_bytes()
    print(prepared.sentence)
    kept = "within" if processor <= BAR_SECONDS and peak <= BAR_BYTES else "over"
    print(
        f"{count:,} records: {wall:.1f} s, {processor:.1f} s of processor; "
        f"{format_bytes(peak)} at most, of which {format_bytes(before)} are libraries: {kept} the bars"
    )


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
