"""ONNX Runtime's CUDA provider, with fixed buffers on a stream of our own.

The provider is never replaced silently: a network of which any layer would run on the CPU is refused
(``session.disable_cpu_ep_fallback``), and so is a session that came up without the provider, which is what
ONNX Runtime makes of a missing CUDA library.

ONNX Runtime records the CUDA graph itself, in the first runs, and replays it in every later one at the
addresses that are bound. It works on the stream that is handed to it, so that the events around a run time
its work and nothing else. By default a run ends with waiting for the stream, which each run is told not to
do. Releases that wait all the same after a replay add a little of the host's time to the compute time, which
the session notes; what the host spent on enqueueing is then not known.

TF32 is switched off: fp32 is computed in fp32. Convolution algorithms are chosen by timing all of them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import re
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optpipe.backends import _cuda, _nvml
from optpipe.backends._images import batches, shape_text
from optpipe.backends._onnxruntime import failure, open_session, runtime_errors
from optpipe.errors import RunError, UsageError
from optpipe.types import DeviceState, Engine, Fingerprint, Sample, Target

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PROVIDER = "CUDAExecutionProvider"
_SWITCH = {"on": True, "off": False, "true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Options:
    """What a recipe's ``[target.options]`` may say on a GPU."""

    cuda_graph: bool = True
    prefer_nhwc: bool = False


def options_of(target: Target) -> Options:
    """The target's options; UsageError for one that is unknown."""
    given: dict[str, bool] = {}
    for name, value in target.options:
        if name not in Options.__slots__:
            raise UsageError(
                f'target.options.{name} = {value!r}: on "cuda" the onnxruntime backend has '
                f"{', '.join(Options.__slots__)}; set one of these, or remove it"
            )
        if value.lower() not in _SWITCH:
            raise UsageError(f'target.options.{name} = {value!r}: must be "on" or "off"')
        given[name] = _SWITCH[value.lower()]
    return Options(**given)


def missing_cuda() -> str | None:
    """Why ONNX Runtime cannot use a GPU here and how to mend it; None if it can."""
    if importlib.util.find_spec("onnxruntime") is None:
        return f"the package onnxruntime-gpu is not installed: {_cuda.INSTALL}"
    said = _preload()
    import onnxruntime

    if _PROVIDER in onnxruntime.get_available_providers():
        return _cuda.device_problem() or _missing_libraries(said)
    if refused := re.search(r"Failed to register bundled CUDA.*", said):
        reason = " ".join(refused[0].split())
        return _cuda.device_problem() or _missing_libraries(said) or f"{reason}: {_cuda.INSTALL}"
    installed = " and ".join(name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name))
    return (
        f"the installed {installed or 'onnxruntime'} {onnxruntime.__version__} has no CUDA provider; the "
        "packages onnxruntime and onnxruntime-gpu hide each other: "
        f"pip uninstall -y onnxruntime onnxruntime-gpu, then {_cuda.INSTALL}"
    )


def fingerprint_cuda() -> Fingerprint:
    """The GPU, its driver and ONNX Runtime. One thread of the host enqueues, whatever the target says."""
    import onnxruntime

    device = _cuda.device()
    return Fingerprint(
        device=device.name,
        driver=_nvml.driver_version() or f"CUDA {device.driver_cuda}",
        versions=(
            ("onnxruntime", onnxruntime.__version__),
            ("cuda", str(getattr(onnxruntime, "cuda_version", "") or device.runtime_cuda)),
            ("compute capability", device.capability),
        ),
        threads=1,
        clocks=_nvml.highest_clocks(),
    )


class CudaSession:
    """An ONNX file opened on the GPU for one batch, where :func:`missing_cuda` finds nothing missing.

    It is used by one thread at a time.

    Raises:
        RunError: the file is not the one that was built, takes other images than the target's, or cannot
            run on the GPU as a whole.
    """

    headline = "GPU Compute Time"

    def __init__(self, engine: Engine, target: Target) -> None:
        import onnxruntime

        options = options_of(target)
        self._session: Any = None
        self._binding: Any = None
        self._path = engine.path
        self._shape = (target.batch, *target.input_shape)
        self._errors = runtime_errors()
        # What goes wrong arrives as an exception; without this it is also printed, as is what does not.
        onnxruntime.set_default_logger_severity(4)
        why = "target.options.cuda_graph is off"
        if options.cuda_graph:
            try:
                self._open(engine, target, options, graph=True)
            except self._errors as error:
                why = " ".join(str(error).split())
            else:
                self.notes = ("CUDA graph", *self._how(options))
                return
        try:
            self._open(engine, target, options, graph=False)
        except self._errors as error:
            raise _refused(engine, error) from error
        self.notes = (f"no CUDA graph: {why}", *self._how(options))

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N, classes) of images (N, C, H, W); the last batch is padded with zeros."""
        import numpy as np

        logits: list[NDArray[np.float32]] = []
        for batch, count in batches(images, self._shape, self._path):
            self._host_images.array[:] = batch
            _cuda.copy_to_device(self._host_images, self._images, self._stream)
            self._enqueue()
            _cuda.copy_to_host(self._logits, self._host_logits, self._stream)
            self._stream.synchronize()
            logits.append(self._host_logits.array[:count].copy())
        return np.concatenate(logits)

    def sample(self) -> Sample:
        """Time one inference of the target's batch with its copies, by the GPU's own clock."""
        begin, copied, computed, end = self._events
        begin.record(self._stream)
        _cuda.copy_to_device(self._host_images, self._images, self._stream)
        copied.record(self._stream)
        start_ns = time.perf_counter_ns()
        self._enqueue()
        enqueue_ns = time.perf_counter_ns() - start_ns
        computed.record(self._stream)
        _cuda.copy_to_host(self._logits, self._host_logits, self._stream)
        end.record(self._stream)
        end.synchronize()
        return Sample(
            compute_ms=_cuda.elapsed_ms(copied, computed),
            enqueue_ms=None if self._waits else enqueue_ns / 1e6,
            h2d_ms=_cuda.elapsed_ms(begin, copied),
            d2h_ms=_cuda.elapsed_ms(computed, end),
        )

    def state(self) -> DeviceState | None:
        """The GPU's clocks now; None where NVML does not answer."""
        return _nvml.state()

    def close(self) -> None:
        """Release the session, the GPU's memory and all else that it holds."""
        self._held.close()

    def _open(self, engine: Engine, target: Target, options: Options, *, graph: bool) -> None:
        with contextlib.ExitStack() as held:
            self._stream = _cuda.Stream()
            held.callback(self._stream.close)
            held.callback(self._drop_session)
            settings = provider_options(options, self._stream.handle, graph=graph)
            self._session = open_session(engine, target, _session_options, [(_PROVIDER, settings)])
            _check_provider(self._session, engine, settings)
            self._session.disable_fallback()
            self._open_buffers(held, self._classes())
            self._bind()
            self._warm_up()
            # Released in the reverse order: events, buffers, session, stream.
            self._held = held.pop_all()

    def _drop_session(self) -> None:
        self._binding = None
        self._session = None

    def _classes(self) -> int:
        """The number of classes, once the network is one of float32 images and logits."""
        source, sink = self._session.get_inputs()[0], self._session.get_outputs()[0]
        for value in (source, sink):
            if value.type != "tensor(float)":
                raise RunError(
                    f"{self._path}: {value.name} is {value.type}, not tensor(float): a network of any "
                    "precision takes and returns float32; export it anew"
                )
        shape = tuple(sink.shape)
        if len(shape) != 2 or shape[0] != self._shape[0] or not isinstance(shape[1], int):
            raise RunError(
                f"{self._path} returns logits of shape {shape_text(shape)} for {shape_text(self._shape)} "
                "images: a classifier returns (images, classes); export the network anew"
            )
        return shape[1]

    def _open_buffers(self, held: contextlib.ExitStack, classes: int) -> None:
        import numpy as np

        self._host_images = _cuda.HostBuffer(self._shape)
        held.callback(self._host_images.close)
        self._host_logits = _cuda.HostBuffer((self._shape[0], classes))
        held.callback(self._host_logits.close)
        self._images = _cuda.DeviceBuffer(self._host_images.nbytes)
        held.callback(self._images.close)
        self._logits = _cuda.DeviceBuffer(self._host_logits.nbytes)
        held.callback(self._logits.close)
        self._host_images.array[:] = np.random.default_rng(0).standard_normal(self._shape, dtype=np.float32)
        events = []
        for _ in range(4):
            events.append(_cuda.Event())
            held.callback(events[-1].close)
        self._events = tuple(events)

    def _bind(self) -> None:
        """Give the network its buffers, at addresses that stay."""
        import numpy as np

        source, sink = self._session.get_inputs()[0].name, self._session.get_outputs()[0].name
        logits = list(self._host_logits.array.shape)
        self._binding = self._session.io_binding()
        self._binding.bind_input(source, "cuda", 0, np.float32, list(self._shape), self._images.pointer)
        self._binding.bind_output(sink, "cuda", 0, np.float32, logits, self._logits.pointer)

    def _warm_up(self) -> None:
        """Run until all is allocated, chosen and recorded: here each run waits for the GPU at its end."""
        import onnxruntime

        _cuda.copy_to_device(self._host_images, self._images, self._stream)
        self._stream.synchronize()
        for _ in range(3):
            self._session.run_with_iobinding(self._binding)
        self._stream.synchronize()
        self._unsynchronized: Any = onnxruntime.RunOptions()
        self._unsynchronized.log_severity_level = 4
        self._unsynchronized.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._waits = True
        for _ in range(3):
            self._session.run_with_iobinding(self._binding, self._unsynchronized)
            self._waits = self._stream.idle() and self._waits
            self._stream.synchronize()

    def _how(self, options: Options) -> tuple[str, ...]:
        """What there is to say of how the network runs, beside the graph."""
        layout = ("NHWC layout",) if options.prefer_nhwc else ()
        return (*layout, "each run waits for the GPU, which is part of its time") if self._waits else layout

    def _enqueue(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._unsynchronized)
        except self._errors as error:
            raise failure(self._path, error) from error


def provider_options(options: Options, stream: int, *, graph: bool) -> dict[str, str]:
    """The CUDA provider's settings; ``stream`` is a ``cudaStream_t`` as a number."""
    return {
        "device_id": "0",
        "user_compute_stream": str(stream),
        "do_copy_in_default_stream": "1",
        "use_tf32": "0",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "prefer_nhwc": "1" if options.prefer_nhwc else "0",
        "enable_cuda_graph": "1" if graph else "0",
    }


def _session_options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.log_severity_level = 4
    return options


def _check_provider(session: Any, engine: Engine, asked: dict[str, str]) -> None:
    """RunError unless the session runs on the CUDA provider as it was asked to."""
    providers = session.get_providers()
    if providers[:1] != [_PROVIDER]:
        raise RunError(
            f"{engine.path}: ONNX Runtime would run it on {', '.join(providers)} instead of the GPU; "
            "optpipe doctor --gpu says what is missing"
        )
    used = session.get_provider_options().get(_PROVIDER, {})
    wanted = {name: asked[name] for name in ("use_tf32", "prefer_nhwc", "enable_cuda_graph")}
    wanted["has_user_compute_stream"] = "1"
    for name, value in wanted.items():
        if used.get(name, value) != value:
            raise RunError(
                f"{engine.path}: the CUDA provider uses {name} = {used[name]}, {value} was asked for; "
                "install another release of onnxruntime-gpu"
            )


def _refused(engine: Engine, error: Exception) -> RunError:
    if "default CPU EP" in str(error):
        return RunError(
            f"{engine.path}: ONNX Runtime can run only a part of it on the GPU, or its CUDA provider did not "
            "start, and nothing is left to the CPU; optpipe doctor --gpu says what is missing, the tensorrt "
            "and inductor backends may run the whole network"
        )
    return failure(engine.path, error)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _missing_libraries(said: str) -> str | None:
    """The CUDA libraries that ONNX Runtime needs and cannot find; without them it takes the CPU instead."""
    import onnxruntime

    # A name with a folder is one place of several where it was looked for.
    absent = sorted(set(re.findall(r"Failed to load ([^\s:/]+):", said)))
    if not absent:
        return None
    cuda = getattr(onnxruntime, "cuda_version", "")
    return (
        f"onnxruntime-gpu {onnxruntime.__version__} needs CUDA {cuda}, of which these are missing: "
        f"{', '.join(absent)}; pip install 'onnxruntime-gpu[cuda,cudnn]=={onnxruntime.__version__}'"
    )


def _preload() -> str:
    """Load CUDA's libraries from the packages that pip installs; returns what ONNX Runtime says of it.

    Releases whose CUDA provider is a plug-in have it only after this, unless the libraries were there when
    onnxruntime was imported; what they then warn of is mended here, or is in what is returned.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import onnxruntime
    with contextlib.redirect_stdout(said), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        onnxruntime.preload_dlls()
    return "\n".join([said.getvalue(), *(str(warning.message) for warning in warned)])
