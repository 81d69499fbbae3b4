"""A run that saves a checkpoint after every visit and does not end by itself; for tests that kill one of its ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from badam.distributed import save_checkpoint
from tests.badam.distributed.small_training import SWITCH_EVERY, make, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    directory = Path(sys.argv[1])
    (directory / f"rank-{dist.get_rank()}.pid").write_text(str(os.getpid()))
    model, optimizer = make("fsdp")
    while True:
        train(model, optimizer, optimizer.global_step + SWITCH_EVERY)
        save_checkpoint(directory / f"step-{optimizer.global_step}", model, optimizer)
