from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest

from badam.errors import InputError
from badam_planner.sources.catalogue import find_gpu
from badam_planner.sources.nvml import detect_gpu

MIB = 2**20


@dataclass
class FakeGpu:
    name: str
    total_mib: int
    used_mib: int = 300
    capability: tuple[int, int] = (8, 6)
    uuid: str = "GPU-0"


@dataclass
class FakeDriver:
    """Stands in for the module pynvml: the functions that the probe calls, over a list of cards."""

    cards: list[FakeGpu] = field(default_factory=list)
    init_error: Exception | None = None
    memory_error: Exception | None = None
    open_sessions: int = 0

    def module(self) -> ModuleType:
        module = ModuleType("pynvml")
        for name in ("NVMLError", "NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"):
            base = getattr(module, "NVMLError", Exception)
            setattr(module, name, type(name, (base,), {}))
        vars(module).update(
            nvmlInit=self._init,
            nvmlShutdown=self._shutdown,
            nvmlDeviceGetCount=lambda: len(self.cards),
            nvmlDeviceGetHandleByIndex=lambda index: self.cards[index],
            nvmlDeviceGetName=lambda gpu: gpu.name,
            nvmlDeviceGetUUID=lambda gpu: gpu.uuid,
            nvmlDeviceGetCudaComputeCapability=lambda gpu: gpu.capability,
            nvmlSystemGetDriverVersion=lambda: "580.65.06",
            nvmlDeviceGetMemoryInfo=self._memory,
        )
        return module

    def _init(self) -> None:
        if self.init_error is not None:
            raise self.init_error
        self.open_sessions += 1

    def _shutdown(self) -> None:
        self.open_sessions -= 1

    def _memory(self, gpu: FakeGpu) -> SimpleNamespace:
        if self.memory_error is not None:
            raise self.memory_error
        return SimpleNamespace(total=gpu.total_mib * MIB, used=gpu.used_mib * MIB)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setitem(sys.modules, "pynvml", fake.module())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_the_first_card_is_matched_to_its_record(driver: FakeDriver) -> None:
    driver.cards = [FakeGpu("NVIDIA GeForce RTX 3090", 24576, used_mib=700)]
    found = detect_gpu()
    assert found.record is find_gpu("rtx3090")
    assert (found.total_bytes, found.used_bytes, found.driver) == (24576 * MIB, 700 * MIB, "580.65.06")
    assert found.target() == find_gpu("rtx3090").target()
    assert driver.open_sessions == 0


def test_several_cards_are_listed_and_the_first_is_taken(driver: FakeDriver) -> None:
    driver.cards = [FakeGpu("NVIDIA L4", 23034), FakeGpu("NVIDIA A40", 46068), FakeGpu("NVIDIA L4", 23034)]
    found = detect_gpu()
    assert (found.name, found.others) == ("NVIDIA L4", ("NVIDIA A40", "NVIDIA L4"))
    assert "NVIDIA A40" in found.describe()


@pytest.mark.parametrize("visible", ["1", "1,0", "GPU-bb", " 1 "])
def test_the_card_that_cuda_is_told_to_use_is_taken(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    driver.cards = [FakeGpu("NVIDIA L4", 23034, uuid="GPU-aa11"), FakeGpu("NVIDIA A40", 46068, uuid="GPU-bb22")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detect_gpu().name == "NVIDIA A40"


@pytest.mark.parametrize("visible", ["", "7", "-1", "GPU-cc"])
def test_hiding_every_card_is_said_with_the_variable_that_hides_it(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    driver.cards = [FakeGpu("NVIDIA L4", 23034, uuid="GPU-aa11")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        detect_gpu()
    assert driver.open_sessions == 0


def test_what_the_driver_measures_overrules_the_record(driver: FakeDriver) -> None:
    driver.cards = [FakeGpu("NVIDIA RTX A6000", 46068)]  # error correction switched on
    record, target = find_gpu("rtx-a6000"), detect_gpu().target()
    assert target.total_bytes == 46068 * MIB
    assert target.total_bytes - target.usable_bytes == record.total_bytes - record.usable_bytes
    assert target.gpu == "rtx-a6000"


@pytest.mark.parametrize(
    ("gpu", "workspace"),
    [
        (FakeGpu("NVIDIA GeForce RTX 4090", 49140, capability=(8, 9)), 8_519_680),  # another size of a known card
        (FakeGpu("NVIDIA X1", 65536, capability=(11, 0)), 32 * MIB),
    ],
)
def test_a_card_that_the_catalogue_does_not_know_is_planned_from_the_driver(
    driver: FakeDriver, gpu: FakeGpu, workspace: int
) -> None:
    driver.cards = [gpu]
    found = detect_gpu()
    target = found.target()
    assert found.record is None
    assert (target.gpu, target.total_bytes, target.workspace_bytes) == (gpu.name, gpu.total_mib * MIB, workspace)
    assert target.usable_bytes < target.total_bytes
    assert target.context_bytes > 0


@pytest.mark.parametrize("error", ["NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"])
def test_no_driver_is_a_sentence_that_says_what_to_do(driver: FakeDriver, error: str) -> None:
    driver.init_error = getattr(sys.modules["pynvml"], error)()
    with pytest.raises(InputError, match=r"No NVIDIA driver was found.*--gpu rtx3090") as caught:
        detect_gpu()
    assert caught.value.exit_code == 2


def test_a_driver_without_a_card_is_a_sentence(driver: FakeDriver) -> None:
    with pytest.raises(InputError, match="no card"):
        detect_gpu()


@pytest.mark.parametrize("moment", ["init_error", "memory_error"])
def test_any_other_failure_of_the_driver_is_a_sentence_with_its_words(driver: FakeDriver, moment: str) -> None:
    driver.cards = [FakeGpu("NVIDIA L4", 23034)]
    setattr(driver, moment, sys.modules["pynvml"].NVMLError("GPU is lost"))
    with pytest.raises(InputError, match="GPU is lost"):
        detect_gpu()
    assert driver.open_sessions == 0


def test_the_binding_has_every_name_that_the_probe_uses() -> None:
    import pynvml

    fake = FakeDriver().module()
    assert [name for name in vars(fake) if name.lower().startswith("nvml") and not hasattr(pynvml, name)] == []
