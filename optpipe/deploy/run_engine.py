"""Run an engine of the deploy bundle that this file lies in: classify images, and time the engine.

    python run_engine.py                      time the engine at the target's precision
    python run_engine.py photo.jpg            classify an image, then time
    python run_engine.py images.npy --json    uint8 pixels (N, H, W, C), results as JSON
    python run_engine.py photo.jpg --uncertainty    how far the ensemble in the bundle trusts itself

It needs neither torch nor optpipe but numpy and what runs the engine: tensorrt and pycuda, onnxruntime, or
openvino. An inductor package alone needs torch. An engine is executable code, so its bytes are compared with
the manifest's sha256 before anything opens them. Figures are named and taken as trtexec does.

Exit codes: 0 fine, 1 not the manifest's engine, 2 bad usage, 3 a package or device is missing, 4 cannot run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Json = dict[str, Any]

SCHEMA = "optpipe.manifest/2"
LATENCY, COMPUTE, ENQUEUE = "Latency", "GPU Compute Time", "Enqueue Time"
H2D, D2H = "H2D Latency", "D2H Latency"
MIN_ITERATIONS, UNSTABLE, ENQUEUE_BOUND = 10, 0.025, 0.8  # trtexec's, and where it begins to warn
ENSEMBLE = "uncertainty.onnx"  # runs on the CPU, whatever the target
CROP_RATIO = 0.875  # what "crop" keeps of the resized image


class RunnerError(Exception):
    """What ends the program with one line."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Engine(NamedTuple):
    """An engine whose bytes are those of the manifest; ``shape`` is (N, C, H, W) of its batch."""

    name: str
    backend: str
    precision: str
    content: bytes
    shape: tuple[int, ...]
    threads: int
    target: Json
    built_on: str

    def failure(self, reason: object) -> RunnerError:
        """That the engine's library does not take it, unless ``reason`` says better what is wrong."""
        if isinstance(reason, RunnerError):
            return reason
        what = f"{self.backend} cannot run {self.name}, built on {self.built_on}"
        mend = "optpipe rebuild builds the bundle's engines anew on this machine"
        return RunnerError(4, f"{what}: {' '.join(str(reason).split())[:400]}; {mend}")


def read_manifest(folder: Path) -> Json:
    """What manifest.json of a bundle holds."""
    path = folder / "manifest.json"
    try:
        text = path.read_bytes()
        manifest: Json = json.loads(text)
        written, seal, digest = text.rpartition(b',\n "seal": "')
        if seal and digest[:64] != hashlib.sha256(written + b"\n}\n").hexdigest().encode():
            raise ValueError("it is not what was written: the seal at its end is of another content")
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"its schema is {manifest['schema']}, this program reads {SCHEMA}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunnerError(2, f"{path}: cannot be used: {error}") from None
    return manifest


def trusted_engine(folder: Path, manifest: Json, precision: str | None) -> Engine:
    """The engine at a precision, by default the target's, once its bytes have the manifest's sha256."""
    target = manifest["target"]
    wanted = precision or target["precision"]
    entries = {entry["precision"]: entry for entry in manifest["engines"]}
    if wanted not in entries:
        raise RunnerError(2, f"{folder}: has no {wanted} engine; there are: {', '.join(entries)}")
    return _trusted(folder, manifest, entries[wanted]["engine"], entries[wanted]["backend"], wanted, target)


def trusted_ensemble(folder: Path, manifest: Json) -> Engine:
    """The networks that together say how far to trust them, once their file has the manifest's sha256."""
    if ENSEMBLE not in manifest["files"]:
        raise RunnerError(2, f"{folder}: has no {ENSEMBLE}: the recipe must have [export] uncertainty = true")
    target = {**manifest["target"], "device": "cpu"}
    return _trusted(folder, manifest, ENSEMBLE, "onnxruntime", "fp32", target)


def _trusted(folder: Path, manifest: Json, name: str, backend: str, precision: str, target: Json) -> Engine:
    path = folder / name
    if name not in manifest["files"]:
        raise RunnerError(1, f"{path}: the manifest has no sha256 of it: it is not opened")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunnerError(1, f"{path}: lies outside the bundle: it is not opened")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunnerError(1, f"{path}: cannot be read: {error.strerror}") from None
    recorded, found = manifest["files"][name]["sha256"], hashlib.sha256(content).hexdigest()
    if found != recorded:
        digests = f"sha256 is {found[:16]}..., the manifest says {recorded[:16]}..."
        raise RunnerError(1, f"{path}: {digests}: it is not the engine that was built, and is not opened")
    shape, threads = (target["batch"], *target["input_shape"]), target["threads"] or os.cpu_count() or 1
    return Engine(name, backend, precision, content, shape, threads, target, manifest["built_on"]["device"])


def package(name: str, mend: str) -> Any:
    """A package that only some engines need."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise RunnerError(3, f"{name.partition('.')[0]} cannot be imported ({error}): {mend}") from None


def load_images(path: Path, preprocess: Json, shape: Sequence[int]) -> Array:
    """The network's input, float32 (N, C, H, W): of an image file, an .npy, or an .npz with ``images``."""
    channels, mend = shape[1], "pip install pillow, or give an .npy of uint8 pixels"
    pillow = None if path.suffix.lower() in (".npy", ".npz") else package("PIL.Image", mend)
    try:
        pixels = _pixels(path, channels, pillow)
    except Exception as error:  # a damaged file leads its decoder to any error
        raise RunnerError(2, f"{path}: holds no image that can be read: {error}") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != channels or not len(pixels):
        found = f"{pixels.dtype} of shape {pixels.shape}"
        raise RunnerError(2, f"{path}: holds {found}; images are uint8 (N, H, W, {channels})")
    resized = np.stack([_resize(image, preprocess) for image in pixels]).transpose(0, 3, 1, 2)
    if resized.shape[1:] != tuple(shape[1:]):
        raise RunnerError(2, f"{path}: an image is {resized.shape[1:]}, the engine takes {shape[1:]}")
    mean, std = (np.array(preprocess[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
    return np.ascontiguousarray((resized.astype(np.float32) / np.float32(255) - mean) / std)


def _pixels(path: Path, channels: int, pillow: Any) -> Array:
    """Pixels (N, H, W, C) of a file; in an array a single image may lack N, grey ones C."""
    if pillow is not None:
        with pillow.open(str(path), formats=("PNG", "JPEG", "BMP", "WEBP", "PPM", "GIF")) as image:
            return np.asarray(image.convert("RGB"))[np.newaxis, ..., :channels]
    with path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)  # a pickle could run code
        pixels = loaded if isinstance(loaded, np.ndarray) else loaded["images"]
    if channels == 1 and pixels.shape[-1:] != (1,):
        pixels = pixels[..., np.newaxis]
    return pixels[np.newaxis] if pixels.ndim == 3 else pixels


def _resize(image: Array, preprocess: Json) -> Array:
    """Pixels (H, W, C) at the network's resolution, by the same arithmetic as when it was trained."""
    if preprocess["size"] is None:
        return image
    height, width = image.shape[:2]
    crop_h, crop_w = new_h, new_w = preprocess["size"]
    if preprocess["resize"] == "crop":
        box_h, box_w = round(crop_h / CROP_RATIO), round(crop_w / CROP_RATIO)
        if height * box_w <= width * box_h:
            new_h, new_w = box_h, width * box_h // height
        else:
            new_h, new_w = height * box_w // width, box_w
    if (new_h, new_w) != (height, width):
        pillow = package("PIL.Image", f"pip install pillow, or give an .npy of pixels {new_h}x{new_w}")
        bands = [pillow.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[2])]
        resized = [band.resize((new_w, new_h), pillow.BILINEAR) for band in bands]
        image = np.stack([np.asarray(band) for band in resized], axis=-1)
    top, left = round((new_h - crop_h) / 2), round((new_w - crop_w) / 2)
    return image[top : top + crop_h, left : left + crop_w]


class HostRunner:
    """An engine called with an array and timed by the host's clock, on a GPU with the copies to and fro."""

    notes = ()

    def __init__(self, shape: Sequence[int], call: Callable[[Array], Array]) -> None:
        self._images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        self._call = call

    def run(self, batch: Array) -> Array:
        """Logits (N, classes) of exactly one batch."""
        self._images[:] = batch
        return np.array(self._call(self._images), np.float32)

    def sample(self) -> dict[str, float]:
        """Milliseconds of one inference."""
        begin = time.perf_counter()
        self._call(self._images)
        return {LATENCY: (time.perf_counter() - begin) * 1e3}

    def close(self) -> None:
        """Release the engine."""
        del self._call


def ensemble(engine: Engine) -> HostRunner:
    """A runner that gives an ensemble's logits, expected entropy and mutual information side by side."""
    return _onnxruntime(engine, ("logits", "uncertainty"))


def _onnxruntime(engine: Engine, outputs: Sequence[str] = ()) -> HostRunner:
    """The first output, or several side by side."""
    runtime = package("onnxruntime", "pip install onnxruntime, or onnxruntime-gpu for an NVIDIA GPU")
    gpu = engine.target["device"] == "cuda"
    if gpu and hasattr(runtime, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # what it says is no result
            runtime.preload_dlls()  # from pip's packages, where the provider itself does not look
    provider = "CUDAExecutionProvider" if gpu else "CPUExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise RunnerError(3, f"this onnxruntime has no {provider}: pip install onnxruntime-gpu")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = engine.threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1" if gpu else "0")
    options.add_free_dimension_override_by_name("batch", engine.shape[0])
    options.log_severity_level = 4  # what goes wrong arrives as an exception
    chosen = [(provider, {"use_tf32": "0"} if gpu else {})]
    try:
        session = runtime.InferenceSession(engine.content, options, providers=chosen, enable_fallback=0)
    except Exception as error:
        if "default CPU EP" not in str(error):
            raise
        raise RunnerError(3, f"{provider} does not load: check the driver, CUDA and cuDNN") from None
    name = session.get_inputs()[0].name
    if outputs:
        return HostRunner(engine.shape, lambda batch: np.hstack(session.run(outputs, {name: batch})))
    return HostRunner(engine.shape, lambda batch: session.run(None, {name: batch})[0])


def _openvino(engine: Engine) -> HostRunner:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it sends usage reports
    core = package("openvino", "pip install openvino").Core()
    model = core.read_model(engine.content)
    model.reshape(list(engine.shape))
    rest = dict(engine.target["options"]).get("int8_rest", "f32")
    precision = {"fp32": "f32", "bf16": "bf16"}.get(engine.precision, rest)
    settings = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    settings.update(INFERENCE_NUM_THREADS=engine.threads, INFERENCE_PRECISION_HINT=precision)
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return HostRunner(engine.shape, lambda batch: request.infer([batch])[0])


def _inductor(engine: Engine) -> HostRunner:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch = package("torch", "an inductor package runs in torch and in nothing else: pip install torch")
    torch.set_num_threads(engine.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # as when optpipe timed it
    with tempfile.TemporaryDirectory(prefix="run-engine-") as folder:
        copy = Path(folder) / "engine.pt2"  # of the bytes that were checked
        copy.write_bytes(engine.content)
        network = torch._inductor.aoti_load_package(str(copy), run_single_threaded=True)
    device = engine.target["device"]
    return HostRunner(engine.shape, lambda batch: network(torch.from_numpy(batch).to(device)).cpu().numpy())


class TensorrtRunner:
    """A TensorRT plan, release 10 or 11, on a stream of its own and timed by the GPU's clock."""

    notes = ("Note: enqueued layer by layer: PyCUDA has no CUDA graphs, which optpipe bench replays",)

    def __init__(self, engine: Engine) -> None:
        trt = package("tensorrt", "install TensorRT 10 or 11: pip install tensorrt")
        self._cuda = cuda = package("pycuda.driver", "pip install pycuda")
        try:
            package("pycuda.autoprimaryctx", "pip install -U pycuda")
        except (RuntimeError, cuda.Error) as error:
            raise RunnerError(3, f"CUDA finds no GPU ({error}): check with nvidia-smi") from None
        self._engine, self._logger = engine, _stderr_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._plan = self._made(self._runtime.deserialize_cuda_engine(engine.content))
        self._context = self._made(self._plan.create_execution_context())
        source, sink = self._names(trt)
        self._made(self._context.set_input_shape(source, engine.shape))
        unknown, shape = self._context.infer_shapes(), tuple(self._context.get_tensor_shape(sink))
        if unknown or len(shape) != 2 or shape[0] != engine.shape[0]:
            raise engine.failure(f"it returns {shape} for images {engine.shape}")
        self._stream, self._events = cuda.Stream(), [cuda.Event() for _ in range(4)]
        self._host_images = cuda.pagelocked_empty(engine.shape, np.float32)
        self._host_logits = cuda.pagelocked_empty(shape, np.float32)
        self._images = cuda.mem_alloc(self._host_images.nbytes)
        self._logits = cuda.mem_alloc(self._host_logits.nbytes)
        self._made(self._context.set_tensor_address(source, int(self._images)))
        self._made(self._context.set_tensor_address(sink, int(self._logits)))
        self.run(np.random.default_rng(0).standard_normal(engine.shape, dtype=np.float32))

    def run(self, batch: Array) -> Array:
        """Logits (N, classes) of exactly one batch."""
        self._host_images[:] = batch
        self.sample()
        return np.array(self._host_logits)

    def sample(self) -> dict[str, float]:
        """Milliseconds of one inference, of its enqueueing, and of the copies around it."""
        begin, copied, computed, end = self._events
        begin.record(self._stream)
        self._cuda.memcpy_htod_async(self._images, self._host_images, self._stream)
        copied.record(self._stream)
        start = time.perf_counter()
        self._made(self._context.execute_async_v3(self._stream.handle))
        enqueue_ms = (time.perf_counter() - start) * 1e3
        computed.record(self._stream)
        self._cuda.memcpy_dtoh_async(self._host_logits, self._logits, self._stream)
        end.record(self._stream)
        end.synchronize()
        return {
            LATENCY: begin.time_till(end),
            ENQUEUE: enqueue_ms,
            H2D: begin.time_till(copied),
            COMPUTE: copied.time_till(computed),
            D2H: computed.time_till(end),
        }

    def close(self) -> None:
        """Release the context before its plan, and that before the runtime."""
        self._context = self._plan = self._runtime = None  # from the left to the right

    def _names(self, trt: Any) -> tuple[str, str]:
        """The names of the one input and the one output, both float32."""
        plan, modes = self._plan, trt.TensorIOMode
        names = [plan.get_tensor_name(index) for index in range(plan.num_io_tensors)]
        names.sort(key=lambda name: plan.get_tensor_mode(name) != modes.INPUT)
        found = [plan.get_tensor_mode(name) for name in names]
        types = [plan.get_tensor_dtype(name) for name in names]
        if found != [modes.INPUT, modes.OUTPUT] or types != [trt.DataType.FLOAT] * 2:
            raise self._engine.failure(f"{names} are not one input and one output of float32")
        return names[0], names[1]

    def _made(self, found: Any) -> Any:
        """What TensorRT answered, unless that is None or False, which is how it fails."""
        if found is None or found is False:
            raise self._engine.failure("see TensorRT's lines above")
        return found


def _stderr_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the bindings have no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants its own called

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                print(f"TensorRT: {msg}", file=sys.stderr)

    return Logger()


RUNNERS: Json = {
    "tensorrt": TensorrtRunner,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "inductor": _inductor,
}


def logits(runner: Any, images: Array, batch: int) -> Array:
    """Logits (N, classes) of any number of images, the last batch padded with zeros."""
    found = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        padded = np.zeros((batch, *images.shape[1:]), np.float32)
        padded[: len(part)] = part
        found.append(runner.run(padded)[: len(part)])
    return np.concatenate(found)


def classify(scores: Array, count: int = 5) -> list[Json]:
    """The most probable classes of each image, the first the likeliest, from logits (N, classes)."""
    scores = scores.astype(np.float64)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
    ranked = np.take_along_axis(probabilities, best, axis=1).tolist()
    return [{"classes": row, "probabilities": ranked[index]} for index, row in enumerate(best.tolist())]


def measure(runner: Any, warmup_ms: float, duration_s: float) -> Json:
    """Figures in ms by name, batches in a second, and remarks on how to read them."""
    begin = time.perf_counter()
    while (time.perf_counter() - begin) * 1e3 < warmup_ms:
        runner.sample()
    samples: list[dict[str, float]] = []
    begin = time.perf_counter()
    while len(samples) < MIN_ITERATIONS or time.perf_counter() - begin < duration_s:
        samples.append(runner.sample())
    rate = len(samples) / (time.perf_counter() - begin)
    columns = {name: np.array([sample[name] for sample in samples]) for name in samples[0]}
    figures = {name: _summary(values) for name, values in columns.items()}
    remarks = [*runner.notes]
    if COMPUTE in columns:
        spread = columns[COMPUTE].std(ddof=1) / columns[COMPUTE].mean()
        if spread > UNSTABLE:
            mend = "lock the clocks, or keep other work off the GPU"
            remarks.append(f"Warning: {COMPUTE} varies by {spread:.1%} (standard deviation): {mend}")
        if figures[ENQUEUE]["median"] > ENQUEUE_BOUND * figures[COMPUTE]["median"]:
            mend = "the host may be what limits it, and a CUDA graph would help"
            remarks.append(f"Warning: {ENQUEUE} is above {ENQUEUE_BOUND:g} of {COMPUTE}: {mend}")
    return {"throughput_qps": rate, "iterations": len(samples), "figures_ms": figures, "remarks": remarks}


def _summary(values: Array) -> dict[str, float]:
    figures = {"min": values.min(), "max": values.max(), "mean": values.mean(), "median": np.median(values)}
    figures.update({f"percentile({q}%)": np.percentile(values, q) for q in (90, 95, 99)})
    return {name: float(value) for name, value in figures.items()}


def _show(engine: Engine, results: Json) -> None:
    print(f"=== {engine.name} ({engine.backend}, {engine.precision}, batch {engine.shape[0]}) ===")
    for index, image in enumerate(results["images"]):
        likely = [f"{image['classes'][k]} ({p:.1%})" for k, p in enumerate(image["probabilities"])]
        print(f"Image {index}: class {', '.join(likely)}")
    rate = results["throughput_qps"]
    print(f"Throughput: {rate:.2f} qps ({rate * engine.shape[0]:.1f} images/s)")
    for name, figures in results["figures_ms"].items():
        print(f"{name}: {', '.join(f'{key} = {value:.4f} ms' for key, value in figures.items())}")
    for remark in results["remarks"]:
        print(remark)


def _doubt(options: argparse.Namespace, manifest: Json) -> None:
    """Print what the bundle's ensemble says of images and of itself; entropies are in nats."""
    engine = trusted_ensemble(options.bundle, manifest)
    if options.images is None:
        raise RunnerError(2, "--uncertainty: name an image, or an .npy or .npz of uint8 pixels")
    images = load_images(options.images, manifest["preprocess"], engine.shape)
    try:
        found = logits(ensemble(engine), images, engine.shape[0])
    except Exception as error:  # ONNX Runtime's exceptions have no base in common
        raise engine.failure(error) from None
    rows = classify(found[:, :-2])
    for row, (entropy, information) in zip(rows, found[:, -2:].tolist(), strict=True):
        row.update(expected_entropy=entropy, mutual_information=information)
    if options.json:
        print(json.dumps({"engine": engine.name, "images": rows}, indent=1))
        return
    for index, row in enumerate(rows):
        best = f"Image {index}: class {row['classes'][0]} ({row['probabilities'][0]:.1%})"
        doubt = f"expected entropy {row['expected_entropy']:.4f}"
        print(f"{best}, {doubt}, mutual information {row['mutual_information']:.4f} nats")


def _run(options: argparse.Namespace) -> None:
    manifest = read_manifest(options.bundle)
    if options.uncertainty:
        _doubt(options, manifest)
        return
    engine = trusted_engine(options.bundle, manifest, options.precision)
    images = options.images and load_images(options.images, manifest["preprocess"], engine.shape)
    if engine.backend not in RUNNERS:
        raise RunnerError(2, f"{engine.name}: optpipe bench alone runs engines of {engine.backend}")
    results: Json = {"engine": engine.name, "backend": engine.backend, "precision": engine.precision}
    try:
        runner = RUNNERS[engine.backend](engine)
        results["images"] = [] if images is None else classify(logits(runner, images, engine.shape[0]))
        results.update(measure(runner, options.warmUp, options.duration))
        runner.close()
    except Exception as error:  # these libraries' exceptions have no base in common
        raise engine.failure(error) from None
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        _show(engine, results)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description="Classify images with an engine of this bundle; time it.")
    parser.add_argument("images", nargs="?", type=Path, help="an image, or an .npy or .npz of uint8 pixels")
    parser.add_argument("--precision", help="of the engine [the target's]")
    parser.add_argument("--warmUp", type=float, default=200, metavar="MS", help="before timing [200]")
    parser.add_argument("--duration", type=float, default=3, metavar="S", help="of timing [3]")
    parser.add_argument("--uncertainty", action="store_true", help="ask the bundle's ensemble, on the CPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--bundle", type=Path, default=Path(__file__).resolve().parent, help="[this folder]")
    try:
        _run(parser.parse_args(arguments))
    except RunnerError as error:
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.code
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        print(f"Error: manifest.json holds what cannot be used: {error!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
