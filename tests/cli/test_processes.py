"""What several processes that a launcher has started say: each sentence once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

_FAIL = """if True:
    import os, sys
    from badam.errors import InputError, RanksDisagree
    import typer
    from badam.training import one_voice
    from badam_cli._app import reporting_errors
    one_voice.PATIENCE_SECONDS = float(sys.argv[1])
    kind, message = eval(sys.argv[2]), sys.argv[3].replace("RANK", os.environ["RANK"])
    try:
        with reporting_errors():
            if message:
                raise kind(message, advice="Do something.")
    except typer.Exit as end:
        sys.exit(end.exit_code)
"""


def fail(
    messages: list[str], directory: Path, kind: str = "InputError", patience: float = 20.0, *, hosted: bool = True
) -> list[tuple[int, str]]:
    """Exit code and words of processes that fail with ``messages``; a launcher's store is there if ``hosted``."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30), wait_for_workers=False)
    port = store.port
    if not hosted:
        del store
    processes = []
    for rank, message in enumerate(messages):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(len(messages)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_ERROR_FILE": str(directory / f"{rank}.json"),
            "TORCHELASTIC_USE_AGENT_STORE": str(hosted),
        }
        command = [sys.executable, "-c", _FAIL, str(patience), kind, message]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return [(process.returncode, said) for process in processes for said in [process.communicate(timeout=120)[1]]]


def shown_by_torchrun(directory: Path, rank: int) -> str:
    message: str = json.loads((directory / f"{rank}.json").read_text())["message"]["message"]
    return message


def test_what_all_have_met_the_first_one_says(tmp_path: Path) -> None:
    first, second, third = fail(["There is no plan."] * 3, tmp_path)
    assert first == (2, "error: There is no plan.\n       Do something.\n")
    assert second == third == (2, "")
    for rank in range(3):
        assert shown_by_torchrun(tmp_path, rank) == "There is no plan. Do something."


def test_without_a_store_of_the_launchers_the_first_one_says_it_too(tmp_path: Path) -> None:
    first, second = fail(["There is no plan."] * 2, tmp_path, hosted=False)
    assert first == (2, "error: There is no plan.\n       Do something.\n")
    assert second == (2, "")


def test_what_one_alone_has_met_it_says_with_its_number(tmp_path: Path) -> None:
    first, second, third = fail(["", "This machine has no data.", "This machine has no data."], tmp_path, patience=2)
    assert first == (0, "")
    both = "".join(sorted([second[1], third[1]]))
    assert both in [
        f"error in process {rank} of 3: This machine has no data.\n       Do something.\n" for rank in (1, 2)
    ]
    assert second[0] == third[0] == 2


def test_that_another_process_was_lost_one_of_them_says(tmp_path: Path) -> None:
    ends = fail(["", "Process RANK lost another one.", "Process RANK lost another one."], tmp_path, "RanksDisagree")
    assert sorted(said.count("lost another one") for _, said in ends) == [0, 0, 1]


def test_options_that_are_wrong_are_complained_of_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "badam_cli.train", "--maxsteps", "3"]
    said = []
    for rank in ("0", "1"):
        environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 2
        said.append(ended.stderr)
    assert "No such option: --maxsteps" in said[0]
    assert said[1] == ""
