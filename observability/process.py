"""CPU, memory and descriptors of this process under Prometheus's usual names, on systems with and without /proc."""

from __future__ import annotations

from collections.abc import Iterable

import psutil
from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class PortableProcessCollector(Collector):
    """The figures of prometheus_client's ProcessCollector, asked from psutil: macOS has no /proc."""

    def __init__(self) -> None:
        self._process = psutil.Process()

    def collect(self) -> Iterable[Metric]:
        with self._process.oneshot():
            memory, times = self._process.memory_info(), self._process.cpu_times()
            yield GaugeMetricFamily("process_virtual_memory_bytes", "Virtual memory size in bytes.", memory.vms)
            yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory size in bytes.", memory.rss)
            yield GaugeMetricFamily(
                "process_start_time_seconds", "Start of the process, in Unix time.", self._process.create_time()
            )
            yield CounterMetricFamily(
                "process_cpu_seconds", "Total user and system CPU time spent in seconds.", times.user + times.system
            )
            yield GaugeMetricFamily("process_open_fds", "Number of open file descriptors.", self._process.num_fds())


def process_collector() -> Collector:
    """The collector that works on this system."""
    native = ProcessCollector(registry=None)
    return native if any(native.collect()) else PortableProcessCollector()
