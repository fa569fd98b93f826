"""What the nodes of a simulated mesh say of themselves. Numbers are such that 32-bit floats hold them."""

from __future__ import annotations

from mesh.view import ModelInfo, ModelLoad, NodeLoad, NodeProfile, Readiness


def ready_load(name: str, step_count: int, *, queued: int = 0) -> NodeLoad:
    """A load as a node of the built-in model has it."""
    model = ModelLoad(1, queued, 7, 2048.0, 24.5, step_count, 12)
    return NodeLoad(Readiness.READY, 1, 24.5, 0.0078125, {"demo": model})


def wide_load(step_count: int) -> NodeLoad:
    """A load of about 300 bytes: a node that serves seven models."""
    models = {
        f"model-of-some-{i}": ModelLoad(step_count % 8, step_count % 5, 7, 2048.0, 24.5, step_count, 12)
        for i in range(7)
    }
    return NodeLoad(Readiness.READY, 1, 24.5, 0.0078125, models)


def profile_of(name: str) -> NodeProfile:
    return NodeProfile(f"http://{name}:8080", "0.1.0", (ModelInfo("demo", "5eed" * 8, 2048, 8),))
