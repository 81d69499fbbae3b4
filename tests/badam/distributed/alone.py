"""One process that believes to be one of many: torch's fake process group, whose collectives send nothing.

FSDP2 or DeepSpeed, the optimizer and the allocator are the real ones, so every tensor of one rank is there at its time;
what is not there is what a communication library takes for itself. Reads a list of requests as JSON from stdin, each
with the number of processes, a plan and the active block, and writes what ``llama_peak`` or ``zero3_peak`` found for
each to stdout.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from badam.optim.ranks import ProcessRanks
from badam.plan import Plan
from tests.badam.distributed.step_memory_jobs import llama_peak, zero3_peak


def without_gloo(*args: Any, **options: Any) -> Any:
    """Process groups other than those for checks, which nobody would answer."""
    return None if "gloo" in args else new_group(*args, **options)


def forget_groups() -> None:
    """DeepSpeed keeps the groups of the first run; the next one has another number of processes."""
    import deepspeed.comm.comm
    from deepspeed.utils import groups

    deepspeed.comm.comm.cdb = None
    groups._WORLD_GROUP = None


if __name__ == "__main__":
    torch.set_num_threads(1)
    new_group = dist.new_group
    dist.new_group = without_gloo
    ProcessRanks.check_same = lambda self, facts: None  # type: ignore[method-assign]
    ProcessRanks.all_finite = lambda self, sums, position: True  # type: ignore[method-assign]
    found = []
    for request in json.load(sys.stdin):
        dist.init_process_group("fake", rank=0, world_size=request["processes"], store=FakeStore())
        if Plan.model_validate_json(request["plan"]).target.engine == "zero3":
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(request["processes"]))
            found.append(zero3_peak(request["plan"], request["block"]))
            forget_groups()
        else:
            found.append(llama_peak(request["plan"], request["block"]))
        dist.destroy_process_group()
    print(json.dumps(found), flush=True)
    os._exit(0)
