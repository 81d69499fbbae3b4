"""Where calibrations are kept: one small file per device in the user's data directory."""

from __future__ import annotations

from pathlib import Path

from badam.errors import InputError
from badam.files import DATA_DIRECTORY, data_directory
from badam.plan import load_record, save_record
from badam.profiling.record import Machine
from badam_planner.accuracy.calibration import Calibration
from badam_planner.sources.catalogue import fold_gpu, match_gpu


def device_key(machine: Machine) -> str:
    """What plans call the device of a run: the catalogue's name of its card, "cpu", or else the driver's name."""
    if machine.device == "cpu":
        return "cpu"
    record = match_gpu(machine.device_name)
    return machine.device_name if record is None else record.id


def calibration_path(gpu: str) -> Path:
    """The file of the device that plans call ``gpu``."""
    return data_directory() / "calibration" / f"{fold_gpu(gpu)}.json"


def load_calibration(gpu: str) -> Calibration | None:
    """The stored calibration of a device, or None if it was never calibrated.

    Raises:
        PlanError: if there is one that cannot be read; the advice says how to renew it.
    """
    path = calibration_path(gpu)
    if not path.exists():
        return None
    return load_record(path, Calibration, "calibration", "Delete it and run badam-report --calibrate again.")


def save_calibration(calibration: Calibration) -> Path:
    """Store a calibration, whole or not at all; returns the file.

    Raises:
        InputError: if the directory cannot be written.
    """
    path = calibration_path(calibration.gpu)
    try:
        save_record(calibration, path, parents=True)
    except InputError as error:
        raise InputError(error.message, advice=f"Name another directory in {DATA_DIRECTORY}.") from error
    return path
