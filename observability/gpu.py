"""Utilisation, memory and temperature of NVIDIA GPUs, asked of the driver at each scrape; nothing where there is none.

Needs the optional package nvidia-ml-py (`pip install -e '.[gpu]'`). The driver answers in about a millisecond for
each figure, in the thread that renders the scrape.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from observability.families import gauge

logger = logging.getLogger(__name__)

GPUS_MAX = 64  # more than one machine takes; bounds the rows


class GpuCollector(Collector):
    """nvml: the module pynvml, after nvmlInit(). One row for each GPU of the machine, whoever uses it."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    def collect(self) -> Iterable[Metric]:
        nvml = self._nvml
        gpus = [(str(index), nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(self._count())]

        def rows(ask: Callable[[Any], float]) -> dict[str, float]:
            """A figure that a GPU does not have costs its row alone."""
            found = {}
            for index, gpu in gpus:
                try:
                    found[index] = float(ask(gpu))
                except nvml.NVMLError:
                    continue
            return found

        label = ("gpu",)
        yield gauge(
            "gpu_utilisation_ratio",
            "Share of the last sample period in which the GPU worked.",
            label,
            rows(lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100),
        )
        yield gauge(
            "gpu_memory_used_bytes",
            "GPU memory in use, by all processes.",
            label,
            rows(lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used),
        )
        yield gauge(
            "gpu_memory_total_bytes",
            "GPU memory there is.",
            label,
            rows(lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total),
        )
        yield gauge(
            "gpu_temperature_celsius",
            "Temperature of the GPU.",
            label,
            rows(lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
        )

    def _count(self) -> int:
        return min(int(self._nvml.nvmlDeviceGetCount()), GPUS_MAX)


def gpu_collector() -> Collector | None:
    """None without the package, a driver or a GPU."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as exc:
        logger.info("no GPU metrics: NVIDIA's driver does not answer", extra={"error.message": str(exc)})
        return None
    return GpuCollector(nvml) if count else None
