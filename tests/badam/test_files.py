from __future__ import annotations

import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from badam import files
from badam.errors import InputError
from badam.files import cache_directory, data_directory, write_file


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_text_and_bytes_are_written_and_nothing_is_left_beside_them(tmp_path: Path) -> None:
    write_file(tmp_path / "text", "größer\n")
    write_file(str(tmp_path / "bytes"), b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "größer\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == {"text", "bytes"}


def test_an_older_file_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    path.chmod(0o640)
    write_file(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "plan.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == {"plan.json"}


@pytest.mark.parametrize("target", ["there.json", "absent.json"])
def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path, target: str) -> None:
    (tmp_path / "there.json").write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to(target)
    write_file(link, "new")
    assert link.is_symlink()
    assert (tmp_path / target).read_text() == "new"
    assert not (tmp_path / target).is_symlink()


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match="Cannot write"):
        write_file(tmp_path / "a", "new")
    assert names(tmp_path) == {"a", "b"}


def test_a_fifo_gets_the_content_and_stays_one(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    content = "x" * 300_000  # more than a pipe holds
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_text()))
    reader.start()
    write_file(fifo, content)
    reader.join(10)
    assert found == [content]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert names(tmp_path) == {"fifo"}


def test_a_fifo_that_nobody_reads_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(InputError, match=r"nobody has read this FIFO for 0\.1 s"):
        write_file(fifo, "content")


def test_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    device = tmp_path / "nowhere"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # what /dev/null is, in a place of our own
        device.write_bytes(b"")
    except PermissionError:
        pytest.skip("only the superuser makes devices, and only where the file system has some")
    write_file(device, "content")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert names(tmp_path) == {"nowhere"}


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a directory"):
        write_file(tmp_path, "content")
    assert names(tmp_path) == set()


def test_standard_output_in_a_file_is_continued_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    with path.open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print("before")
        write_file(path, "content\n")
        print("after")
    assert path.read_text() == "before\ncontent\nafter\n"


@pytest.mark.parametrize("name", ["absent/plan.json", "file/plan.json", "x" * 300, "nul\0", "\ud800"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"(?s)Cannot write .*: .*\. Choose another path\."):
        write_file(tmp_path / name, "content")


def test_missing_directories_are_made_when_asked_for(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b" / "c.json", "content", parents=True)
    assert (tmp_path / "a" / "b" / "c.json").read_text() == "content"


def test_the_users_directories_are_those_of_the_system_or_those_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("BADAM_CACHE_DIR", "BADAM_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert (cache_directory(), data_directory()) == (tmp_path / "cache" / "badam", tmp_path / "data" / "badam")
    monkeypatch.setenv("BADAM_CACHE_DIR", "mine")
    monkeypatch.setenv("BADAM_DATA_DIR", "yours")
    assert (cache_directory(), data_directory()) == (Path("mine"), Path("yours"))


def test_a_user_without_a_home_is_told_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_arguments: Any, **_options: Any) -> Path:
        return Path("~/.cache/badam")

    monkeypatch.delenv("BADAM_CACHE_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", homeless)
    with pytest.raises(InputError, match=r"no home directory.*BADAM_CACHE_DIR"):
        cache_directory()
