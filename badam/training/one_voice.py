"""One voice for several processes that a launcher has started.

What the user did wrong all of them find; the first one says it. What one of them alone meets, such as a file that its
machine lacks, it says itself, with its number. They find out through the store at the launcher's address, where a
process group may not be yet or no longer. Imports torch only where they have to find out.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from badam.errors import BadamError, RanksDisagree

PATIENCE_SECONDS = 10.0
"""How long a process waits to hear that the first one has met the same error."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Names the file whose message torchrun shows in its summary, in the place of a hint how to get a traceback."""


def rank_and_count() -> tuple[int, int]:
    """Which of how many processes this is, as the launcher says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def words_for(error: BadamError) -> str | None:
    """How this process begins to say ``error``; None if another one says it. Call :func:`told` afterwards."""
    rank, count = rank_and_count()
    if count == 1 or (rank == 0 and not isinstance(error, RanksDisagree)):
        return "error"
    store, key = _store(), _key(error)
    if store is None:
        return _numbered(rank, count)
    if isinstance(error, RanksDisagree):  # nobody waits: the launcher ends all as soon as one has ended
        return "error" if _is_first(store, key) else None
    if _was_told(store, key):
        return None
    return _numbered(rank, count) if _is_first(store, key) else None


def told(error: BadamError) -> None:
    """Let the other processes know that ``error`` was said, and torchrun what happened here."""
    rank, count = rank_and_count()
    if count == 1:
        return
    leave_error_file(str(error))
    if rank != 0 or isinstance(error, RanksDisagree):
        return
    store = _store()
    if store is not None:
        _tell_the_others(store, _key(error), count)


def leave_error_file(message: str) -> None:
    """What torchrun shows of this process, if torchrun has started it and nothing is written there yet."""
    path = Path(os.environ.get(ERROR_FILE, ""))
    if not path.name or path.exists():
        return
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    try:
        path.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        print(f"torchrun's error file {path} cannot be written: {error.strerror}", file=sys.stderr)


def _tell_the_others(store: Any, key: str, count: int) -> None:
    try:
        store.set(f"{key}/told", "1")
        if _hosts_the_store():  # it ends with this process
            deadline = time.monotonic() + PATIENCE_SECONDS
            while store.add(f"{key}/heard", 0) < count - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
    except RuntimeError:  # nobody is there to hear it
        return


def _was_told(store: Any, key: str) -> bool:
    try:
        store.wait([f"{key}/told"], timedelta(seconds=PATIENCE_SECONDS))
        store.add(f"{key}/heard", 1)
    except RuntimeError:
        return False
    return True


def _is_first(store: Any, key: str) -> bool:
    try:
        return bool(store.add(f"{key}/said", 1) == 1)
    except RuntimeError:
        return True


def _key(error: BadamError) -> str:
    """The same in all processes that have met the same; what tells of lost ones differs by the process's number."""
    text = "" if isinstance(error, RanksDisagree) else str(error)
    return f"badam/{hashlib.sha256(f'{type(error).__name__}: {text}'.encode()).hexdigest()}"


def _numbered(rank: int, count: int) -> str:
    return f"error in process {rank} of {count}"


def _hosts_the_store() -> bool:
    """Whether the launcher has left that to the first process, which has not done it for training either."""
    import torch.distributed as dist

    return (
        os.environ.get("RANK") == "0"
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        and not dist.is_initialized()
    )


def _store() -> Any:
    """The store at the launcher's address; None if there is none."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    import torch.distributed as dist

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not dist.is_available() or not address or not port:
        return None
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]  # it is documented there
            address,
            int(port),
            is_master=_hosts_the_store(),
            timeout=timedelta(seconds=PATIENCE_SECONDS),
            wait_for_workers=False,
        )
    except RuntimeError:
        return None
