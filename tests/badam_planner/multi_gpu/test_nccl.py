"""What the communication library is assumed to take."""

from __future__ import annotations

from badam_planner.multi_gpu.nccl import with_nccl
from tests.badam_planner.multi_gpu.targets import gpus_of, on_a100


def test_each_communicator_has_buffers_and_gloo_has_none() -> None:
    assert on_a100(1).communication_bytes == 0
    assert on_a100(2).communication_bytes == 544 * 2**20
    assert on_a100(8, engine="ddp").communication_bytes == 688 * 2**20
    assert on_a100(16, 8).communication_bytes == (688 + 688 + 544) * 2**20
    assert with_nccl(gpus_of("fsdp2", 8)).communication_bytes == 0
