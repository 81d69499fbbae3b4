"""How long a step's messages take on a link, and which links there are. Pure.

Rates are nominal, per direction and card; collectives reach less, more so for small messages. Transfers overlap with
computation where the next layer is gathered ahead, so a step takes between the longer of the two and their sum.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """One kind of connection between cards."""

    name: str
    bytes_per_second: float  # one card sends so much while it receives as much
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
    """Time to send ``sent_bytes`` from one card over ``link``. Not counted: latency, protocol, contention."""
    return sent_bytes / link.bytes_per_second


def transfer_times(sent_bytes: int, cards: int, cards_per_node: int) -> list[tuple[str, float]]:
    """Seconds per step on each link; a ring that leaves a node is as slow as the link between nodes."""
    inside = [(link.name, seconds(sent_bytes, link)) for link in LINKS]
    if cards <= cards_per_node:
        return inside
    between = seconds(sent_bytes, BETWEEN_NODES)
    return [(f"{name} and {BETWEEN_NODES.name}", max(time, between)) for name, time in inside]
