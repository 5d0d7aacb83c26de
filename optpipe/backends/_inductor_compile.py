"""An exported program, converted to the target's precision and device, to a package's bytes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe.backends import _processor
from optpipe.backends._images import shape_text
from optpipe.backends._inductor_settings import threads_of_torch, true_fp32
from optpipe.errors import RunError
from optpipe.types import Target

if TYPE_CHECKING:
    import torch
    from torch import fx
    from torch.export import ExportedProgram


def compiled(source: Path, target: Target, *, freezing: bool, max_autotune: bool) -> bytes:
    """The package of a program, compiled for the target's device, precision and threads.

    ``freezing`` lays the weights out as the kernels want them when compiling instead of at each run.

    Raises:
        RunError: the program cannot be read or compiled, or takes other images than the target's.
    """
    import torch

    package = io.BytesIO()
    configs = {"freezing": freezing, "max_autotune": max_autotune}
    # Freezing is for inference only: without no_grad torch leaves it out.
    with _quiet(), torch.no_grad(), true_fp32():
        program = _loaded(source, target)
        try:
            with threads_of_torch(_processor.threads_or_all(target.threads)):
                torch._inductor.aoti_compile_and_package(
                    _converted(program, target), package_path=package, inductor_configs=configs
                )
        except Exception as error:  # torch's, Triton's and the compilers' have no base in common
            raise RunError(f"AOTInductor cannot compile {source}: {_cause(error)}") from error
    return package.getvalue()


def _loaded(source: Path, target: Target) -> ExportedProgram:
    import torch

    try:
        program = torch.export.load(io.BytesIO(source.read_bytes()))
    except OSError as error:
        raise RunError(f"no program at {source}: {error.strerror}; export the network first") from None
    except Exception as error:  # a damaged file fails in as many ways as it has parts
        raise RunError(f"{source} is no torch.export program: {_cause(error)}; export it anew") from error
    inputs = program.example_inputs
    shape = tuple(inputs[0][0].shape) if inputs and inputs[0] else ()
    wanted = (target.batch, *target.input_shape)
    if shape != wanted:
        raise RunError(
            f"{source} takes inputs of shape {shape_text(shape)}, the target has {shape_text(wanted)}: "
            "set target.batch and target.input_shape to the program's, or export the network anew"
        )
    return program


def _converted(program: ExportedProgram, target: Target) -> ExportedProgram:
    """The program in the target's precision and on its device; images and logits stay fp32."""
    import torch
    from torch.export.passes import move_to_device_pass

    precision = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[target.precision]
    if precision is not torch.float32:
        traced = program.module(check_guards=False).to(precision)
        _cast(traced, precision)
        images = torch.zeros(target.batch, *target.input_shape)
        program = torch.export.export(traced, (images,))
    return move_to_device_pass(program, "cuda") if target.device == "cuda" else program


def _cast(traced: fx.GraphModule, precision: torch.dtype) -> None:
    """Convert the images where they come in, and the logits to fp32 where they leave."""
    import torch
    from torch import fx

    to = torch.ops.aten.to.dtype
    graph = traced.graph
    for check in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(check)  # it holds a tensor to the precision that is being changed
    (source,) = graph.find_nodes(op="placeholder")
    with graph.inserting_after(source):
        images = graph.call_function(to, (source, precision))
    source.replace_all_uses_with(images, delete_user_cb=lambda user: user is not images)
    sink = graph.output_node()
    with graph.inserting_before(sink):
        sink.args = fx.map_arg(sink.args, lambda logits: graph.call_function(to, (logits, torch.float32)))
    traced.recompile()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what torch logs, prints and warns of while compiling; its failures are exceptions."""
    sink = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _cause(error: BaseException) -> str:
    """The compiler's own complaint where there is one, else the first line of the cause."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    complaints = [line for line in lines if "error: " in line or "cannot find -l" in line]
    return (complaints or lines or [type(error).__name__])[0]
