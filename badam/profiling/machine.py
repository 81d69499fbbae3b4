"""Which machine and which versions a run was measured with."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from badam.plan import Provenance
from badam.profiling.record import Machine

PACKAGES = ("badam", "torch", "transformers", "trl", "accelerate", "peft", "datasets")


def this_machine(device: torch.device) -> Machine:
    """The machine that runs this process, with ``device`` as the one that trains."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, total = properties.name, properties.total_memory
    else:
        name, total = processor_name(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        device="cuda" if device.type == "cuda" else "cpu",
        device_name=name,
        device_total_bytes=total,
        cpu_count=os.cpu_count() or 1,
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    )


def provenance(command: str) -> Provenance:
    """Versions of what took part, the command and the date."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Provenance(versions=versions, command=command, date=datetime.now(UTC).isoformat(timespec="seconds"))


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
