"""What test processes run; a module of its own, so that a process can load it by name."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu.pool import GO, READY


def job(order: dict[str, Any], pipe: Connection) -> None:
    """Do what ``order`` says, and log when the device was held."""
    if order.get("fails"):
        raise SystemExit(3)
    pipe.send(READY)
    assert pipe.recv() == GO
    log = Path(order["log"])
    with log.open("a") as file:
        file.write(f"{order['name']} begins\n")
    time.sleep(order.get("seconds", 0))
    if order.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    with log.open("a") as file:
        file.write(f"{order['name']} ends\n")
