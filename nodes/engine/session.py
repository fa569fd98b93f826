"""Loads a graph on ONNX Runtime: which device, how many slots of how many tokens, and which kind of session runs it.

Only the session modules, kv_buffers and cuda import onnxruntime.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnxruntime

from nodes.engine import memory
from nodes.engine.concat_kv_session import PREFILL_TOKENS_MAX, ConcatKvSession, HolesUnsupported
from nodes.engine.cuda import (
    CUDA,
    INSTALL_FIX,
    LOG_FATAL_ONLY,
    DeviceUnavailable,
    cannot_run,
    prepare_cuda,
    provider_options,
)
from nodes.engine.devices import Provider
from nodes.engine.graph import DecoderGraph, describe_graph
from nodes.engine.graph_extension import extension
from nodes.engine.huge_pages import collapse_new, private_regions
from nodes.engine.kv_buffers import CudaKv, HostKv, KvBuffers, KvShape
from nodes.engine.memory import KvNeeds, KvPlan, MemoryTooSmall
from nodes.engine.model_folder import BUILD_FIX, ModelFolder, ModelFolderInvalid
from nodes.engine.model_loader import read_model_folder
from nodes.engine.model_variants import find_variants
from nodes.engine.priority import call_making_way
from nodes.engine.shared_kv_session import SharedKvSession

__all__ = ["OnnxSession", "Provider", "load_session"]

logger = logging.getLogger(__name__)

OnnxSession = SharedKvSession | ConcatKvSession
KvFactory = Callable[[int, KvShape, Any], KvBuffers]

CPU = "CPUExecutionProvider"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # of a graph given as bytes
# Of a graph's file, which ONNX Runtime's Python layer keeps as long as the session: a larger one has its weights in it.
EXTENDED_BYTES_MAX = 8 * 1024 * 1024
COMPLAINT_CHARS_MAX = 200
OUT_OF_MEMORY = re.compile(
    r"failed to allocate|bad[_ ]alloc|out of memory|OOM|cudaErrorMemoryAllocation", re.IGNORECASE
)
NO_KERNEL = re.compile(r"Could not find an implementation for (\S+)")
MEMORY_FIX = "free memory, take a smaller variant of the model, or give fewer slots or a smaller capacity"


def load_session(
    folder: ModelFolder,
    *,
    slots: int | None = None,
    capacity: int | None = None,
    threads: int = 0,
    spinning: bool = True,
    provider: Provider = "auto",
    memory_limit_bytes: int | None = None,
    device_index: int = 0,
) -> tuple[OnnxSession, ModelFolder]:
    """Load the graph and run it once, on CUDA where `provider` lets and a device answers, else on the CPU.

    Returns also the folder as it was served: read anew for the CPU where its variant was chosen for a device that then
    could not be used. slots, capacity: None takes what fits into memory, at most memory.SLOTS_DEFAULT_MAX slots of
    memory.CAPACITY_DEFAULT_MAX tokens, or the model's context where that is less. memory_limit_bytes: for weights and
    KV together, on the device that runs it. threads: 0 uses all cores. spinning: threads wait busily between steps; off
    where other processes need the cores. device_index: which CUDA device, counted from 0.
    Raises ModelFolderInvalid, also when the provider is "cuda" and CUDA cannot run it, and when it does not fit.
    """
    make_loader = partial(
        _Loader,
        slots=slots,
        capacity=capacity,
        threads=threads,
        spinning=spinning,
        limit_bytes=memory_limit_bytes,
    )
    if provider != "cpu":
        try:
            return make_loader(folder).on_cuda(device_index), folder
        except DeviceUnavailable as exc:
            reason = str(exc)
            if provider == "cuda":
                logger.error("CUDA cannot be used", extra={"reason": reason})
                raise cannot_run(folder.path, reason) from exc
            folder = _for_cpu(folder, reason)
    return call_making_way(make_loader(folder).on_cpu), folder


def _for_cpu(folder: ModelFolder, reason: str) -> ModelFolder:
    """The folder with the variant that the CPU runs best, where it was left to us. Raises ModelFolderInvalid."""
    served = read_model_folder(folder.path, provider="cpu") if folder.chosen_for == "cuda" else folder
    if served.graph_file == folder.graph_file:
        logger.info("running on the CPU", extra={"reason": reason})
        return folder
    extra = {"reason": reason, "graph": served.graph_name, "instead_of": folder.graph_name}
    logger.warning("running on the CPU, with the variant for it", extra=extra)
    return served


class _Loader:
    def __init__(
        self,
        folder: ModelFolder,
        slots: int | None,
        capacity: int | None,
        threads: int,
        spinning: bool,
        limit_bytes: int | None,
    ) -> None:
        """Raises ModelFolderInvalid."""
        self._folder = folder
        self._graph = describe_graph(folder)
        self._slots = slots
        self._capacity = capacity
        self._threads = threads
        self._spinning = spinning
        self._limit_bytes = limit_bytes
        self._needs = _needs(folder, self._graph, capacity)
        self._huge_page_bytes = 0

    def on_cpu(self) -> OnnxSession:
        """Raises ModelFolderInvalid."""
        folder = self._folder
        try:
            plan = self._plan(memory.available_host_bytes())
            regions = private_regions()
            session, is_extended = self._open_on_cpu()
            self._huge_page_bytes = collapse_new(regions)
            return self._start(session, plan, HostKv, is_extended=is_extended)
        except MemoryTooSmall as exc:
            raise ModelFolderInvalid(folder.path, f"it does not fit into memory: {exc.reason}", exc.fix) from exc
        except ModelFolderInvalid:
            raise
        except Exception as exc:  # ONNX Runtime has no common root for what it raises
            raise self._invalid(exc) from exc

    def on_cuda(self, device_index: int) -> OnnxSession:
        """Raises DeviceUnavailable. Not measured on a GPU."""
        runtime = prepare_cuda(device_index)
        try:
            plan = self._plan(runtime.free_bytes())
            session = self._open(
                str(self._folder.graph_file), [CUDA, CPU], [provider_options(device_index, self._limit_bytes), {}]
            )
            if CUDA not in session.get_providers():
                raise DeviceUnavailable(f"ONNX Runtime could not load its CUDA provider; {INSTALL_FIX}")
            return self._start(session, plan, partial(CudaKv, runtime=runtime))
        except MemoryTooSmall as exc:
            raise DeviceUnavailable(f"it does not fit into device {device_index}: {exc.reason}; {exc.fix}") from exc
        except (DeviceUnavailable, ModelFolderInvalid):
            raise
        except Exception as exc:  # ONNX Runtime has no common root for what it raises
            raise DeviceUnavailable(_first_line(exc)) from exc

    def _plan(self, available_bytes: int | None) -> KvPlan:
        return memory.plan_kv(
            self._needs,
            slots=self._slots,
            capacity=self._capacity,
            available_bytes=available_bytes,
            limit_bytes=self._limit_bytes,
        )

    def _open_on_cpu(self) -> tuple[Any, bool]:
        """The session, and whether its graph is extended."""
        added, file = extension(self._graph), self._folder.graph_file
        if added is not None and file.stat().st_size <= EXTENDED_BYTES_MAX:
            try:
                return self._open(file.read_bytes() + added, [CPU], [{}]), True
            except Exception as exc:  # ONNX Runtime has no common root for what it raises
                extra = {"graph": self._folder.graph_name, "reason": _first_line(exc)}
                logger.info("the graph cannot tell where its logits are large: all are read", extra=extra)
        return self._open(str(file), [CPU], [{}]), False

    def _open(self, graph: str | bytes, providers: list[str], provider_settings: list[dict[str, str]]) -> Any:
        """graph: a path, or a file's content."""
        options = onnxruntime.SessionOptions()
        if isinstance(graph, bytes):
            options.add_session_config_entry(WEIGHTS_FOLDER, str(self._folder.graph_file.parent))
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._spinning else "0")
        options.log_severity_level = LOG_FATAL_ONLY
        return onnxruntime.InferenceSession(
            graph,
            options,
            providers=providers,
            provider_options=provider_settings,
            enable_fallback=0,
        )

    def _start(self, session: Any, plan: KvPlan, kv: KvFactory, *, is_extended: bool = False) -> OnnxSession:
        graph = self._graph
        loaded: OnnxSession
        if graph.kind == "shared":
            shape = (plan.slots, graph.kv_heads, plan.capacity, graph.head_size)
            buffers = kv(2 * graph.layers, shape, graph.kv_type)
            loaded = SharedKvSession(session, graph, plan.slots, plan.capacity, buffers, is_extended=is_extended)
        else:
            device = "cuda" if CUDA in session.get_providers() else "cpu"
            loaded = ConcatKvSession(session, graph, plan.slots, plan.capacity, device, is_extended=is_extended)
        # One chunk and one decode step, so that the first request pays for no allocation and a graph that cannot run is
        # found now.
        loaded.prefill(0, np.zeros(min(2, plan.capacity), np.int64), 0)
        loaded.decode(np.zeros(1, np.int64), np.ones(1, np.int64) if plan.capacity > 1 else np.zeros(1, np.int64))
        if isinstance(loaded, ConcatKvSession):
            try:
                loaded.check_holes()
            except HolesUnsupported as exc:
                fix = "export it with position_ids: `optimum-cli export onnx --task text-generation-with-past`"
                raise ModelFolderInvalid(
                    self._folder.path, f"{self._folder.graph_name} cannot run several sequences together ({exc})", fix
                ) from exc
        facts = {
            "model": self._folder.path.name,
            "device": loaded.device,
            "graph": self._folder.graph_name,
            "graph_reason": _graph_reason(self._folder),
            "precision": str(self._folder.precision),
            "kv": graph.kind,
            "is_graph_extended": is_extended,
            "slots": plan.slots,
            "capacity": plan.capacity,
            "kv_bytes": plan.kv_bytes,
            "huge_page_bytes": self._huge_page_bytes,
            "reason": plan.reason,
        }
        logger.info("model loaded", extra=facts)
        if plan.slots < graph.steady_rows_min:
            logger.warning(
                "with one slot, greedy and seeded answers of this model may differ from those of nodes with more",
                extra={"model": self._folder.path.name, "slots": plan.slots},
            )
        return loaded

    def _invalid(self, error: Exception) -> ModelFolderInvalid:
        """What ONNX Runtime or numpy raised while loading on the CPU, as one line."""
        path, graph_name, line = self._folder.path, self._folder.graph_name, _first_line(error)
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            return ModelFolderInvalid(path, f"memory ran out while loading {graph_name} ({line})", MEMORY_FIX)
        if found := NO_KERNEL.search(str(error)):
            reason = f"{graph_name} has an operator {found[1]} that runs on another device only"
            return ModelFolderInvalid(path, reason, "choose a variant for this device, such as q4 on the CPU")
        return ModelFolderInvalid(path, f"{graph_name} cannot be loaded ({line})", BUILD_FIX)


def _needs(folder: ModelFolder, graph: DecoderGraph, capacity: int | None) -> KvNeeds:
    """Raises ModelFolderInvalid where the capacity and the sliding window do not go together."""
    context = folder.context_length
    window = folder.sliding_window or context
    if graph.kind == "shared":
        # The graph looks back `window` rows in its buffer, so the buffer has them.
        least = min(window, context) if folder.sliding_window else min(memory.CAPACITY_MIN, context)
        default, most = max(memory.CAPACITY_DEFAULT_MAX, least), context
        if capacity is not None and folder.sliding_window and capacity < least:
            reason = f"its attention looks back {window} tokens, and the capacity is {capacity}"
            raise ModelFolderInvalid(folder.path, reason, f"give it a capacity of at least {least}")
        bytes_per_row = graph.kv_bytes_per_row
    else:
        # The graph tells distances by columns, holes included, so the window must never be reached.
        most = context if folder.sliding_window is None else min(context, window - PREFILL_TOKENS_MAX)
        if most < 1:
            reason = f"its sliding window of {window} tokens leaves no room, since it has no shared KV buffers"
            raise ModelFolderInvalid(folder.path, reason, BUILD_FIX)
        least, default = min(memory.CAPACITY_MIN, most), memory.CAPACITY_DEFAULT_MAX
        bytes_per_row = 2 * graph.kv_bytes_per_row  # the joined output is as large as the rows
    return KvNeeds(
        weight_bytes=sum(file.stat().st_size for file in folder.weight_files()),
        bytes_per_row=bytes_per_row,
        capacity_least=least,
        capacity_default=default,
        capacity_most=most,
    )


def _graph_reason(folder: ModelFolder) -> str:
    if folder.chosen_for is None:
        return "it was named"
    others = len(find_variants(folder.path)) - 1
    return f"runs best on {folder.chosen_for} of {others + 1} variants" if others > 0 else "the only one"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:COMPLAINT_CHARS_MAX]
