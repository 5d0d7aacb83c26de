"""What TensorRT's objects do on the GPU that is not there: engines really compute, with ONNX Runtime.

A plan is the ONNX file behind a line of JSON. ``Machine.faults`` names what goes wrong, each in the way in
which TensorRT reports it: None, False, -1, a null pointer or a RuntimeError, with a line in the log.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import EnumValue, FakeTensorrt, StrictError
from fake_tensorrt_cuda import FakeCuda

COMPUTE_MS = 1.5
DEVICE = "NVIDIA Test 100"
LINES = {
    "builder": "CUDA initialization failure with error: 35",
    "runtime": "CUDA initialization failure with error: 35",
    "network": "createNetworkV2: Error Code 9: API Usage Error",
    "build": "Error Code 10: Internal Error (Could not find any implementation for node {/conv}.)",
    "profile": "Error Code 4: API Usage Error (kOPT dimensions are not within range)",
    "deserialize": "Error Code 1: Serialization (Version tag does not match)",
    "context": "Error Code 2: OutOfMemory (Requested size was 4096 bytes.)",
    "input_shape": "setInputShape: Error Code 3: API Usage Error (Supplied dimension is out of range)",
    "address": "setTensorAddress: Error Code 3: API Usage Error",
    "execute": "enqueueV3: Error Code 1: Cuda Runtime (an illegal memory access was encountered)",
    "capture": "enqueueV3: Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)",
}


class Machine:
    """One process with a GPU and TensorRT of release "10" or "11"."""

    def __init__(self, release: str) -> None:
        self.cuda = FakeCuda()
        self.faults: set[str] = set()
        self.parser_errors: list[tuple[str, str]] = []
        self.configs: list[Config] = []
        self.timed: list[int] = []
        self.deserialized = 0
        self.during_build: Callable[[], object] = lambda: None
        self._logger: Any = None
        self.trt = FakeTensorrt(
            release,
            {
                "Builder": lambda logger: Builder(self) if self.starts(logger, "builder") else None,
                "OnnxParser": lambda network, logger: Parser(self, network),
                "Runtime": lambda logger: Runtime(self) if self.starts(logger, "runtime") else None,
            },
        )

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put this TensorRT and this GPU in the place of the process's own; NVML is not there."""
        monkeypatch.setitem(sys.modules, "tensorrt", self.trt)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda)
        monkeypatch.setitem(sys.modules, "pynvml", None)

    def starts(self, logger: Any, fault: str) -> bool:
        """Take a logger as TensorRT does, the first one for all; False where the fault is on."""
        if not getattr(logger, "ready", False):
            raise StrictError("ILogger.__init__ was not called")
        self._logger = self._logger or logger
        return not self.fails(fault)

    def say(self, severity: str, line: str) -> None:
        """A line in the log."""
        self._logger.log(self.trt.member("ILogger.Severity", severity), line)

    def fails(self, fault: str) -> bool:
        """Whether something goes wrong, which is then in the log."""
        if fault in self.faults and fault in LINES:
            self.say("ERROR", LINES[fault])
        return fault in self.faults

    def cache(self, *keys: str, device: str = DEVICE) -> bytes:
        """A timing cache with these kernels."""
        return json.dumps({"version": self.trt.__version__, "device": device, "keys": sorted(keys)}).encode()

    def plan(self, model: bytes, profile: Any, version: str | None = None) -> bytes:
        """The plan of an ONNX file."""
        head = {"version": version or self.trt.__version__, "profile": profile}
        return json.dumps(head).encode() + b"\n" + model


class Builder:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def create_network(self, flags: int = 0) -> Network | None:
        strongly_typed = 1 << int(self._machine.trt.member("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"))
        if flags != strongly_typed:
            raise StrictError(f"create_network({flags}): not strongly typed")
        return None if self._machine.fails("network") else Network()

    def create_builder_config(self) -> Config:
        self._machine.configs.append(Config(self._machine))
        return self._machine.configs[-1]

    def create_optimization_profile(self) -> Profile:
        return Profile(self._machine)

    def build_serialized_network(self, network: Network, config: Config) -> Memory | None:
        machine = self._machine
        machine.say("WARNING", "a warning that says nothing of the failure")
        if -1 in Tensor(network.input).shape and not config.profiles:
            raise StrictError("an input has free dimensions, and there is no profile")
        if machine.fails("build"):
            return None
        machine.timed.append(config.time_kernels(network))
        machine.during_build()
        profile = config.profiles[0].shapes if config.profiles else None
        return Memory(machine.plan(network.content, profile))


class Network:
    def __init__(self) -> None:
        self.content = b""
        self.model = onnx.ModelProto()

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    @property
    def num_outputs(self) -> int:
        return len(self.model.graph.output)

    @property
    def input(self) -> Any:
        return self.model.graph.input[0]

    def get_input(self, index: int) -> Tensor:
        return Tensor(self.model.graph.input[index])


class Tensor:
    def __init__(self, value: Any) -> None:
        self.name = str(value.name)
        self._dimensions = value.type.tensor_type.shape.dim

    @property
    def shape(self) -> Dims:
        return Dims(size.dim_value if size.HasField("dim_value") else -1 for size in self._dimensions)


class Dims(list[int]):
    """Its ``__len__`` and ``__getitem__`` are a list's, with the bindings' names of arguments."""

    def __init__(self, sizes: Iterator[int]) -> None:
        super().__init__(sizes)

    def __getitem__(self, arg0: Any) -> Any:
        return super().__getitem__(arg0)


class Parser:
    def __init__(self, machine: Machine, network: Network) -> None:
        self._machine, self._network = machine, network

    def parse_from_file(self, model: str) -> bool:
        machine = self._machine
        if machine.parser_errors:
            machine.say("ERROR", "ModelImporter.cpp:729: While parsing node number 3 [Conv]:")
            return False
        try:
            self._network.content = Path(model).read_bytes()
            self._network.model = onnx.load_from_string(self._network.content)
        except Exception:
            machine.say("ERROR", f"Failed to parse ONNX model from file: {model}!")
            return False
        return True

    @property
    def num_errors(self) -> int:
        return len(self._machine.parser_errors)

    def get_error(self, index: int) -> ParserError:
        return ParserError(*self._machine.parser_errors[index])


class ParserError:
    def __init__(self, description: str, node: str) -> None:
        self._description, self._node = description, node

    def desc(self) -> str:
        return self._description

    def node_name(self) -> str:
        return self._node


class Profile:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        if self._machine.fails("profile_shape"):
            raise RuntimeError("Shape provided for min is inconsistent with other shapes.")
        self.shapes[input] = [min, opt, max]


class Config:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._cache: Cache | None = None
        self.flags = {"TF32"}
        self.pools: dict[str, int] = {}
        self.profiles: list[Profile] = []
        self.builder_optimization_level = 3
        self.max_aux_streams = 0
        self.avg_timing_iterations = 1
        self.profiling_verbosity: EnumValue | None = None

    def clear_flag(self, flag: EnumValue) -> None:
        self.flags.discard(flag.name)

    def set_flag(self, flag: EnumValue) -> None:
        self.flags.add(flag.name)

    def set_memory_pool_limit(self, pool: EnumValue, pool_size: int) -> None:
        self.pools[pool.name] = pool_size

    def add_optimization_profile(self, profile: Profile) -> int:
        if self._machine.fails("profile"):
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Cache | None:
        if self._machine.fails("cache_raises") and serialized_timing_cache:
            raise RuntimeError("damaged")
        content = serialized_timing_cache or self._machine.cache()
        try:
            found = json.loads(content)
        except ValueError:
            self._machine.say("ERROR", "Error Code 3: API Usage Error (timing cache is damaged)")
            return None
        return Cache(self._machine, found)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        if self._machine.fails("cache_refused") or (not ignore_mismatch and not cache.fits):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Cache | None:
        return self._cache

    def time_kernels(self, network: Network) -> int:
        """Time the kernels that the cache lacks; returns how many."""
        keys = {f"{node.op_type} {len(node.input)}" for node in network.model.graph.node}
        if self._cache is None:
            return len(keys)
        new = keys - self._cache.keys
        self._cache.keys |= keys
        return len(new)


class Cache:
    def __init__(self, machine: Machine, found: dict[str, Any]) -> None:
        self._machine = machine
        self.keys: set[str] = set(found["keys"])
        self.fits = found["version"] == machine.trt.__version__ and found["device"] == DEVICE

    def combine(self, input_cache: Cache, ignore_mismatch: bool) -> bool:
        if not (input_cache.fits and self.fits) and not ignore_mismatch:
            return False
        self.keys |= input_cache.keys
        return True

    def serialize(self) -> Memory:
        return Memory(self._machine.cache(*self.keys))


class Memory:
    def __init__(self, content: bytes) -> None:
        self.content = content


class Runtime:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        machine = self._machine
        machine.deserialized += 1
        head, _, model = serialized_engine.partition(b"\n")
        with contextlib.suppress(ValueError):
            found = json.loads(head)
            if found["version"] == machine.trt.__version__ and "deserialize" not in machine.faults:
                return Engine(machine, model, found["profile"])
        machine.say("ERROR", LINES["deserialize"])
        return None


class Engine:
    def __init__(self, machine: Machine, model: bytes, profile: Any) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.machine, self.profile = machine, profile
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.tensors = {value.name: value for value in self.session.get_inputs() + self.session.get_outputs()}
        self.inputs = [value.name for value in self.session.get_inputs()]
        nodes = onnx.load_from_string(model).graph.node
        self.layers = [(f"{node.output[0]} kernel", node.op_type) for node in nodes]

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.tensors)[index])

    def get_tensor_mode(self, name: str) -> EnumValue:
        return self.machine.trt.member("TensorIOMode", "INPUT" if name in self.inputs else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> EnumValue:
        kinds = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
        return self.machine.trt.member("DataType", kinds[self.tensors[name].type])

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def create_execution_context(self) -> Context | None:
        return None if self.machine.fails("context") else Context(self)

    def create_engine_inspector(self) -> Inspector:
        return Inspector(self)


class Inspector:
    execution_context: Any = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get_engine_information(self, format: EnumValue) -> str:
        layers = [{"Name": name, "LayerType": kind} for name, kind in self._engine.layers]
        # Whatever was not built with detailed verbosity is a name alone.
        return json.dumps({"Layers": [*layers, "Reformat"], "Context": self.execution_context is not None})


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine, self._machine = engine, engine.machine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._has_run = False
        self.profiler: Any = None
        self._inferences = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = (self._engine.profile or {name: [shape] * 3})[name]
        inside = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if not inside:
            self._machine.say("ERROR", LINES["input_shape"])
        self._shapes[name] = shape
        return inside and not self._machine.fails("input_shape")

    def infer_shapes(self) -> list[str]:
        if self._machine.fails("infer_raises"):
            raise RuntimeError("Shape inference failed.")
        if "infer_names" in self._machine.faults:
            return list(self._engine.inputs)
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Dims:
        batch = next(iter(self._shapes.values()))[0]
        return Dims(size if isinstance(size, int) else batch for size in self._engine.tensors[name].shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return not self._machine.fails("address")

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = self._machine.cuda
        stream = cuda.streams[stream_handle]  # also an error for 0, the default stream
        if self._machine.fails("execute"):
            return False
        if stream.recorded is not None and (self._machine.fails("capture") or not self._has_run):
            return False
        self._has_run = True
        cuda.enqueue(stream_handle, self._compute)
        self._tell()
        return True

    def _tell(self) -> None:
        """Tell each layer's time: 0.1 ms for the first, 0.2 for the second; the first inference is slow."""
        if self.profiler is None:
            return
        if not getattr(self.profiler, "ready", False):
            raise StrictError("IProfiler.__init__ was not called")
        self._inferences += 1
        for number, (name, _) in enumerate([*self._engine.layers, ("Reformat", "")], start=1):
            self.profiler.report_layer_time(name, number * (0.1 if self._inferences > 1 else 5.0))

    def _compute(self) -> float:
        (source,), sink = (
            self._engine.inputs,
            next(n for n in self._addresses if n not in self._engine.inputs),
        )
        shape = self._shapes[source]
        content = bytes(self._machine.cuda.view(self._addresses[source], 4 * int(np.prod(shape))))
        images = np.frombuffer(content, np.float32).reshape(shape)
        (logits,) = self._engine.session.run([sink], {source: images})
        memory = self._machine.cuda.view(self._addresses[sink], logits.nbytes)
        memory[: logits.nbytes] = logits.tobytes()
        return COMPUTE_MS
