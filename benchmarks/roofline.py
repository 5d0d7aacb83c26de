"""How fast a network could be at best on a device, from the memory's and the arithmetic's measured speed.

Two bounds, which differ in what may stay in a cache. The whole network's counts only what must be moved: the
image, the weights and the logits once; activations never leave the chip. The layers' sum lets every layer
read its input and its weights from memory and write its output there, with batch-norm, ReLU and the addition
at a block's end computed on the way. The first is a bound for any engine that finds no weights in the cache
and multiplies as often as the network says. The second is one where a layer's tensors do not fit into the
cache: an engine that keeps them there, or computes several layers at once, beats it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from optpipe import timing
from optpipe.backends._inductor_settings import threads_of_torch, true_fp32
from optpipe.graph.trace import module_of, node_macs, shape, tensor_inputs
from optpipe.types import Precision

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
_CUDA_WARMUP_S = 0.2  # as long as engines are warmed up
_OUTSIDE = 4  # bytes of an image's and a logit's number, which are fp32 at every precision


@dataclass(frozen=True, slots=True)
class Roof:
    """What a device was measured to do, medians of ``samples`` runs.

    ``bytes_per_s`` counts those read and those written by a copy of ``copied_bytes`` within its memory,
    ``flops_per_s`` two for each multiply-add of a product of two square matrices of ``matrix`` rows.
    """

    precision: Precision
    bytes_per_s: float
    flops_per_s: float
    copied_bytes: int
    matrix: int
    samples: int


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer moves, if all its tensors are in memory, and computes for a batch."""

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Work:
    """A network's layers, and the bytes that it must move if only activations stay on the chip."""

    layers: tuple[Layer, ...]
    compulsory_bytes: int

    @property
    def flops(self) -> int:
        """Of all layers."""
        return sum(layer.flops for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Floor:
    """The two bounds on a network's time, and whether memory is what sets each."""

    layers_ms: float
    whole_ms: float
    memory_bound_layers: int
    layers: int
    memory_bound_whole: bool


def work(traced: fx.GraphModule, batch: int, precision: Precision) -> Work:
    """What a traced network moves and computes for a batch, at a precision's size of a number."""
    width = torch.finfo(DTYPES[precision]).bits // 8
    moved: list[int] = []
    flops: list[int] = []
    # The layer that writes a node's tensor; what only changes its values is computed on the way.
    writer: dict[fx.Node, int] = {}

    def size(node: fx.Node) -> int:
        each = _OUTSIDE if node.op == "placeholder" else width
        return batch * torch.Size((shape(node) or (1,))[1:]).numel() * each

    for node in traced.graph.nodes:
        sources = [] if node.op in {"placeholder", "output"} else tensor_inputs(node)
        if not sources or shape(node) is None:
            continue
        macs = node_macs(traced, node)
        written = [source for source in sources if source in writer]
        if macs == 0 and written and all(shape(source) == shape(node) for source in sources):
            last = max(written, key=lambda source: writer[source])
            moved[writer[last]] += sum(size(source) for source in sources if source is not last)
            writer[node] = writer[last]
        elif macs == 0 and len(written) == 1 and len(sources) == 1 and size(sources[0]) == size(node):
            writer[node] = writer[written[0]]  # a flattening moves nothing
        else:
            writer[node] = len(moved)
            moved.append(
                sum(size(source) for source in sources) + size(node) + width * _weights(traced, node)
            )
            flops.append(2 * macs * batch)
    ends = [node for node in traced.graph.nodes if node.op == "placeholder"]
    output = next(node for node in traced.graph.nodes if node.op == "output")
    outside = sum(size(node) for node in ends) + batch * (shape(output) or (1, 1))[-1] * _OUTSIDE
    weights = sum(_weights(traced, node) for node in traced.graph.nodes if node_macs(traced, node))
    return Work(tuple(Layer(*pair) for pair in zip(moved, flops, strict=True)), outside + width * weights)


def floor(done: Work, roof: Roof) -> Floor:
    """The least time that the work takes under a roof."""
    times = [
        (1e3 * layer.bytes / roof.bytes_per_s, 1e3 * layer.flops / roof.flops_per_s) for layer in done.layers
    ]
    memory_ms = 1e3 * done.compulsory_bytes / roof.bytes_per_s
    compute_ms = 1e3 * done.flops / roof.flops_per_s
    return Floor(
        layers_ms=sum(max(pair) for pair in times),
        whole_ms=max(memory_ms, compute_ms),
        memory_bound_layers=sum(memory > compute for memory, compute in times),
        layers=len(times),
        memory_bound_whole=memory_ms > compute_ms,
    )


def measure(device: str, precision: Precision, *, small: bool, threads: int) -> Roof:
    """The roof of a device at a precision; TF32 is off. ``small`` is enough to try the code."""
    copied, matrix, repeats = (2**24, 256, 5) if small else (2**30, 8192, 20)
    if device == "cuda":
        copied = min(copied, torch.cuda.get_device_properties().total_memory // 8)
    source = torch.ones(copied // 4, device=device)
    sink = torch.empty_like(source)
    generator = torch.Generator(device).manual_seed(0)
    # Random numbers: a product of zeros draws less power, and is faster than any network could be.
    left, right = (
        torch.randn(matrix, matrix, device=device, generator=generator).to(DTYPES[precision])
        for _ in range(2)
    )
    product = torch.empty_like(left)
    with torch.inference_mode(), true_fp32(), threads_of_torch(threads):
        copy_s = _median_s(lambda: sink.copy_(source), device, repeats)
        multiply_s = _median_s(lambda: torch.matmul(left, right, out=product), device, repeats)
    return Roof(precision, 2 * 4 * len(source) / copy_s, 2 * matrix**3 / multiply_s, copied, matrix, repeats)


def _median_s(work_once: Callable[[], object], device: str, repeats: int) -> float:
    import numpy as np

    once = _cuda_s if device == "cuda" else _cpu_s
    # A GPU that had nothing to do raises its clocks only after a while.
    end = time.perf_counter() + (_CUDA_WARMUP_S if device == "cuda" else 0.0)
    warmup = 0
    while warmup < 5 or time.perf_counter() < end:
        once(work_once)
        warmup += 1
    return timing.median(np.array([once(work_once) for _ in range(repeats)]))


def _cuda_s(work_once: Callable[[], object]) -> float:
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    begin.record()
    work_once()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _cpu_s(work_once: Callable[[], object]) -> float:
    start = time.perf_counter()
    work_once()
    return time.perf_counter() - start


def _weights(traced: fx.GraphModule, node: fx.Node) -> int:
    module = module_of(traced, node)
    return 0 if module is None else sum(weight.numel() for weight in module.parameters(recurse=False))
