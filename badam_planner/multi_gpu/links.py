"""How long a step's messages take on a link, and which links there are. Pure.

Rates are nominal, per direction and GPU; collectives reach less, more so for small messages. Transfers overlap with
computation where the next layer is gathered ahead, so a step takes between the longer of the two and their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from badam.plan import Target


@dataclass(frozen=True, slots=True)
class Link:
    """One kind of connection between GPUs."""

    name: str
    bytes_per_second: float  # one GPU sends so much while it receives as much
    source: str


LINKS = (
    Link("NVLink 4 (H100)", 450e9, "NVIDIA H100 data sheet: 900 GB/s, both directions"),
    Link("NVLink 3 (A100)", 300e9, "NVIDIA A100 data sheet: 600 GB/s, both directions"),
    Link("PCIe 5.0 x16", 63e9, "PCI-SIG: 32 GT/s, 16 lanes, 128b/130b"),
    Link("PCIe 4.0 x16", 31.5e9, "PCI-SIG: 16 GT/s, 16 lanes, 128b/130b"),
    Link("PCIe 3.0 x16", 15.75e9, "PCI-SIG: 8 GT/s, 16 lanes, 128b/130b"),
)

BETWEEN_NODES = Link("InfiniBand NDR, one port per card", 50e9, "NVIDIA Quantum-2: 400 Gbit/s per port")


def seconds(sent_bytes: int, link: Link) -> float:
    """Time to send ``sent_bytes`` from one GPU over ``link``. Not counted: latency, protocol, contention."""
    return sent_bytes / link.bytes_per_second


def step_range(compute_seconds: float, transfer_seconds: float, *, overlaps: bool) -> tuple[float, float]:
    """Shortest and longest time of a step: transfers overlap with computation altogether, or not at all.

    Where nothing ``overlaps``, as with whole copies that average gradients after backward, the two are the same.
    """
    together = compute_seconds + transfer_seconds
    return (max(compute_seconds, transfer_seconds) if overlaps else together), together


def transfer_times(target: Target, within_bytes: int, between_bytes: int) -> list[tuple[str, float]]:
    """Seconds per step on each link; a ring that leaves a machine is as slow as the link between machines.

    Gradients are averaged between copies when backward is through with them, so both times add up.

    Args:
        target: the GPUs, numbered machine by machine; those that follow each other hold one copy of the model.
        within_bytes: what each GPU sends to those with which it shares a copy.
        between_bytes: what it sends to those that hold the same part of other copies.
    """
    several_nodes = target.num_gpus > target.gpus_per_node
    within_leaves = several_nodes and target.gpus_per_node % target.shards != 0
    times = []
    for link in LINKS:
        parts = ((within_bytes, within_leaves), (between_bytes, several_nodes))
        inside, outside = (sum(size for size, leaves in parts if leaves is where) for where in (False, True))
        slower = min(link, BETWEEN_NODES, key=lambda kind: kind.bytes_per_second)
        name = f"{link.name} and {BETWEEN_NODES.name}" if several_nodes else link.name
        times.append((name, seconds(inside, link) + seconds(outside, slower)))
    return times
