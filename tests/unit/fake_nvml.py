"""NVIDIA's management library as nvidia-ml-py shows it, with two GPUs; the second one has no temperature."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.core import Metric

from observability.gpu import GpuCollector


class NVMLError(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Utilisation:
    gpu: int


@dataclass(frozen=True, slots=True)
class Memory:
    used: int
    total: int


class FakeNvml:
    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, count: int = 2, has_driver: bool = True) -> None:
        self.count = count
        self.has_driver = has_driver

    def nvmlInit(self) -> None:  # noqa: N802 - as the library has it
        if not self.has_driver:
            raise NVMLError("driver not loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> Utilisation:  # noqa: N802
        return Utilisation(75 - gpu)

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Memory:  # noqa: N802
        return Memory(10 + gpu, 80)

    def nvmlDeviceGetTemperature(self, gpu: int, sensor: int) -> int:  # noqa: N802
        if gpu == 1:
            raise NVMLError("not supported")
        return 55


def gpu_families() -> list[Metric]:
    return list(GpuCollector(FakeNvml()).collect())
