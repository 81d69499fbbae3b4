from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from badam.errors import InputError
from badam_planner.sources import host
from badam_planner.sources.host import host_memory

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 64 GiB of which 48 are available, and a control group without a limit."""
    memory = SimpleNamespace(total=64 * GIB, available=48 * GIB, free=1)
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    return tmp_path


def test_a_machine_offers_what_is_available_not_what_is_free(machine: Path) -> None:
    memory = host_memory()
    assert (memory.total_bytes, memory.available_bytes) == (64 * GIB, 48 * GIB)


def test_a_container_offers_its_limit_less_what_it_holds_beside_cached_files(machine: Path) -> None:
    (machine / "memory.max").write_text(f"{16 * GIB}\n")
    (machine / "memory.current").write_text(f"{10 * GIB}\n")
    (machine / "memory.stat").write_text(f"anon {4 * GIB}\ninactive_file {5 * GIB}\n")
    memory = host_memory()
    assert (memory.total_bytes, memory.available_bytes) == (16 * GIB, 11 * GIB)


def test_a_container_never_offers_more_than_its_machine(machine: Path) -> None:
    (machine / "memory.max").write_text(f"{60 * GIB}\n")
    assert host_memory().available_bytes == 48 * GIB
    (machine / "memory.max").write_text(f"{100 * GIB}\n")
    assert host_memory().total_bytes == 64 * GIB


def test_a_machine_that_does_not_say_is_to_be_told(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> None:
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(host.psutil, "virtual_memory", unreadable)
    with pytest.raises(InputError, match="could not be determined") as refused:
        host_memory()
    assert "--gpu-memory 16GiB" in str(refused.value)


def test_this_machine_says_how_much_it_has() -> None:
    memory = host_memory()
    assert memory.total_bytes >= memory.available_bytes > 0


def test_the_host_as_a_target_has_no_context_and_no_workspace(machine: Path) -> None:
    target = host_memory().target()
    assert (target.gpu, target.total_bytes, target.usable_bytes) == ("cpu", 64 * GIB, 48 * GIB)
    assert (target.context_bytes, target.workspace_bytes) == (0, 0)
