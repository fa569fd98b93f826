"""What can be told of accelerators without loading anything of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Provider = Literal["auto", "cpu", "cuda"]
Processor = Literal["cpu", "cuda"]

# One of them exists where NVIDIA's driver is loaded, on Linux and on WSL.
NVIDIA_DEVICES = ("/dev/nvidia0", "/dev/dxg")


def is_nvidia_there() -> bool:
    return any(Path(device).exists() for device in NVIDIA_DEVICES)


def likely_processor(provider: Provider) -> Processor:
    """Where a graph will run, before anything was tried."""
    if provider == "auto":
        return "cuda" if is_nvidia_there() else "cpu"
    return provider
