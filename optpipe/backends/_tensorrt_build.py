"""From an ONNX file to a TensorRT engine.

The network is strongly typed: every layer computes in the precision that the file gives it, and TensorRT
chooses among kernels of that precision only. TensorRT 10 and 11 both build such networks, and 11 no others.
TF32, which rounds the factors of a float32 product to 10 bits and is on by default, is switched off.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from optpipe.backends._engine import engine_of
from optpipe.backends._images import shape_text
from optpipe.backends._tensorrt_cache import TimingCache, default_path
from optpipe.backends._tensorrt_log import Log, log_of
from optpipe.backends._tensorrt_options import Options, flags_of
from optpipe.errors import RunError
from optpipe.files import write_atomically
from optpipe.types import Engine, Target

_NO_GPU = "check the GPU and its driver with optpipe doctor --gpu"


def build_engine(trt: Any, source: Path, target: Target, options: Options, folder: Path) -> Engine:
    """Build the engine of an ONNX file into ``folder`` as ``engine.plan``.

    Raises:
        RunError: TensorRT cannot read the file or build from it, with its own lines about why; or the file
            takes other images than the target's.
    """
    begin = time.perf_counter()
    log = log_of(trt)
    log.clear()
    builder = log.made(lambda: trt.Builder(log.logger), "start a builder", _NO_GPU)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = log.made(lambda: builder.create_network(flags), "start a network", _NO_GPU)
    # The parser owns the weights that the network refers to: it must live until the engine is built.
    parser = log.made(lambda: trt.OnnxParser(network, log.logger), "start its ONNX parser", _NO_GPU)
    _parse(parser, source, log)
    config = log.made(builder.create_builder_config, "start a configuration", _NO_GPU)
    _configure(trt, config, options)
    _add_profile(builder, config, network, log, source, target, options)
    cache = _timing_cache(trt, config, options, log)
    plan = log.made(
        lambda: builder.build_serialized_network(network, config),
        f"build {source} in {target.precision}",
        "if memory is short, close what else uses the GPU or lower target.options.workspace_mb; "
        'if a layer is not supported, set target.backend = "onnxruntime"',
    )
    notes = [line for line in log.warnings if "timing cache" in line.lower()]
    if cache is not None:
        cache.save()
        notes = cache.notes + notes
    engine = folder / "engine.plan"
    write_atomically(engine, bytes(plan))
    kept = cache.path if cache is not None and cache.path.is_file() else None
    return engine_of(
        engine,
        time.perf_counter() - begin,
        timing_cache=kept,
        flags=(("strongly_typed", "on"), ("tf32", "off"), *flags_of(options)),
        notes=tuple(notes),
    )


def _parse(parser: Any, source: Path, log: Log) -> None:
    if parser.parse_from_file(str(source)):
        return
    for index in range(parser.num_errors):
        problem = parser.get_error(index)
        node, reason = problem.node_name(), " ".join(problem.desc().split())
        if not any(reason in line for line in log.errors):
            log.errors.append(f"{reason} (node {node})" if node else reason)
    raise log.failure(
        f"TensorRT cannot read {source}",
        'export the network anew without what it does not support, or set target.backend = "onnxruntime"',
    )


def _configure(trt: Any, config: Any, options: Options) -> None:
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.sparse_weights:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb * 2**20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.max_aux_streams is not None:
        config.max_aux_streams = options.max_aux_streams
    config.avg_timing_iterations = options.avg_timing_iterations
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for layers() to name the kernels


def _add_profile(
    builder: Any, config: Any, network: Any, log: Log, source: Path, target: Target, options: Options
) -> None:
    """Fix the dimensions that the file leaves free: the batch to the profile, all others to the target."""
    if network.num_inputs != 1 or network.num_outputs != 1:
        raise RunError(
            f"{source} has {network.num_inputs} inputs and {network.num_outputs} outputs: "
            "optpipe runs networks with one input of images and one output of logits"
        )
    images = network.get_input(0)
    shape, wanted = tuple(images.shape), (target.batch, *target.input_shape)
    if len(shape) != len(wanted) or any(a not in (-1, b) for a, b in zip(shape, wanted, strict=True)):
        raise RunError(
            f"{source} takes inputs of shape {shape_text(shape)}, the target has {shape_text(wanted)}: "
            "set target.batch and target.input_shape to the file's, or export the network anew"
        )
    if -1 not in shape:
        return
    batches = options.profile if shape[0] == -1 else (target.batch,) * 3
    smallest, best, largest = ((batch, *target.input_shape) for batch in batches)
    what = f"run {source} at batches {batches[0]} to {batches[2]}"
    mend = "set target.input_shape to the network's, and target.options.profile to batches it can run"
    profile = log.made(builder.create_optimization_profile, what, mend)
    try:
        profile.set_shape(images.name, smallest, best, largest)
    except (RuntimeError, ValueError) as error:
        raise log.failure(f"TensorRT cannot {what} ({' '.join(str(error).split())})", mend) from error
    if config.add_optimization_profile(profile) < 0:
        raise log.failure(f"TensorRT cannot {what}", mend)


def _timing_cache(trt: Any, config: Any, options: Options, log: Log) -> TimingCache | None:
    """The cache for this build; None at level 0, where TensorRT times nothing and reads no cache."""
    if options.optimization_level == 0:
        return None
    cache = TimingCache(config, options.timing_cache or default_path(trt.__version__))
    if cache.notes:
        log.errors.clear()  # about the file that was dropped: if the build fails, it is for another reason
    return cache
