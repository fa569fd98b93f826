"""GPU metrics over a fake of NVIDIA's library, and nothing at all without it."""

from __future__ import annotations

import sys

import pytest

from observability.gpu import gpu_collector
from tests.unit.fake_nvml import FakeNvml, gpu_families
from tests.unit.test_collectors import rows


def test_each_gpu_has_its_figures_and_what_one_lacks_costs_its_row_alone() -> None:
    families = gpu_families()
    assert rows(families, "ai_cluster_gpu_utilisation_ratio") == {("0",): 0.75, ("1",): 0.74}
    assert rows(families, "ai_cluster_gpu_memory_used_bytes") == {("0",): 10, ("1",): 11}
    assert rows(families, "ai_cluster_gpu_memory_total_bytes") == {("0",): 80, ("1",): 80}
    assert rows(families, "ai_cluster_gpu_temperature_celsius") == {("0",): 55}


@pytest.mark.parametrize(
    ("nvml", "is_there"),
    [
        pytest.param(FakeNvml(), True, id="two GPUs"),
        pytest.param(FakeNvml(count=0), False, id="no GPU"),
        pytest.param(FakeNvml(has_driver=False), False, id="no driver"),
        pytest.param(None, False, id="no package"),
    ],
)
def test_there_is_a_collector_where_there_is_a_gpu(
    nvml: FakeNvml | None, is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # None: importing it fails
    assert (gpu_collector() is not None) == is_there
