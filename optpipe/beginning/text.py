"""A first recipe as commented TOML. Pure."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from optpipe.beginning.look import BUDGET, Found, Seen, Verdict

FILL_IN = "FILL IN"
"""Begins the comment of a line that only the user can complete."""

CALIBRATION_COUNT = 500
"""As many images as a method takes that needs no labels, where there are more."""

_WIDTH = 108


def recipe_text(seen: Seen, path: Path) -> str:
    """The whole recipe; it loads, and runs when all that is marked is filled in."""
    sections = [
        _head(seen, path),
        _model(seen),
        _data(seen),
        _preprocess(seen),
        _target(),
        _method(seen),
        _recover(seen),
        _budget(),
    ]
    return "\n\n".join(sections) + "\n"


def _head(seen: Seen, path: Path) -> str:
    shown = seen.graph
    channels, height, width = shown.input_shape
    narrow = sum(group.prunable for group in shown.groups)
    found = (
        f"torch.fx traces it with an image of {channels} x {height} x {width}. {shown.classes} classes, "
        f"{shown.parameters:,} parameters, {shown.macs:,} MACs of one image. {len(shown.droppable)} residual "
        f"blocks can be dropped, {narrow} of {len(shown.groups)} channel groups can be narrowed, there are "
        f"{seen.batch_norms or 'no'} batch-norm layers."
    )
    return "\n".join(
        [
            *_comment(f"A first recipe for {seen.asked.model}, by `optpipe init`. What was found: {found}"),
            "#",
            *_comment(
                f"Lines marked with {FILL_IN} need you. `optpipe run {path.name} --dry-run` then checks "
                f"everything, and `optpipe inspect {path.name}` lists each block and channel group."
            ),
        ]
    )


def _model(seen: Seen) -> str:
    asked = seen.asked
    lines = ["[model]", f"name = {_quoted(asked.model)}"]
    if seen.weights is not None:
        lines.append(f"weights = {_quoted(seen.weights)}")
    elif seen.published:
        lines.append(
            f'# weights = "{seen.published[-1]}"    # {FILL_IN}: your file, or this name; now they are random'
        )
    else:
        mend = "; leave it out if the function loads them" if not asked.model.startswith("zoo:") else ""
        lines.append(f'# weights = "FILE.pth"    # {FILL_IN}: .safetensors, .pth or .pt{mend}')
    given = (("classes", asked.classes), ("in_channels", asked.in_channels))
    return "\n".join([*lines, *[f"{key} = {value}" for key, value in given if value is not None]])


def _data(seen: Seen) -> str:
    learnt, held_out = seen.calibration, seen.evaluation
    taken = _taken(seen)
    lines = [
        "[data]",
        *_comment("What is learnt from. Images of evaluation are never trained on: they only score."),
        *(_missing_calibration(seen) if learnt is None else [_source("calibration", learnt, count=taken)]),
    ]
    if held_out is not None:
        shared = learnt is not None and learnt.source == held_out.source
        if shared:
            lines += _comment("Both are of one source, of which skip leaves out what is learnt from.")
        lines.append(_source("evaluation", held_out, skip=taken if shared else None))
    else:
        lines.append(
            f'evaluation = {{ source = "path/to/evaluation" }}    # {FILL_IN}: a folder or .npz, labelled'
        )
    return "\n".join(lines)


def _taken(seen: Seen) -> int | None:
    """How many calibration images are taken; None is all of them."""
    learnt, held_out = seen.calibration, seen.evaluation
    if learnt is None:
        return None
    shared = held_out is not None and held_out.source == learnt.source
    most = max(1, learnt.count // 2) if shared else learnt.count
    if not seen.chosen.needs_labels:
        most = min(most, CALIBRATION_COUNT)
    return None if most == learnt.count else most


def _missing_calibration(seen: Seen) -> list[str]:
    what = "labelled" if seen.chosen.needs_labels else "labels or not"
    lines = [f'calibration = {{ source = "path/to/calibration" }}    # {FILL_IN}: a folder or .npz, {what}']
    if seen.batch_norms:
        lines += _comment(
            "Without any images, they can be made from what the batch-norm layers remember: calibration = "
            f'{{ source = "synthesize", count = {CALIBRATION_COUNT} }}'
        )
    return lines


def _source(name: str, found: Found, *, count: int | None = None, skip: int | None = None) -> str:
    labels = ", labels = false" if found.no_labels else ""
    first = "" if count is None else f", count = {count}"
    rest = "" if skip is None else f", skip = {skip}"
    line = f"{name} = {{ source = {_quoted(found.source)}{labels}{first}{rest} }}"
    if not found.no_labels:
        return line
    without = "; scored by agreement with the original" if name == "evaluation" else ""
    return f"{line}    # {found.no_labels}{without}"


def _preprocess(seen: Seen) -> str:
    prepared = seen.prepared
    preprocess = prepared.preprocess
    assert preprocess.size is not None
    height, width = preprocess.size
    mark = f"    # {FILL_IN}: {prepared.guessed}" if prepared.guessed else ""
    return "\n".join(
        [
            f"[data.preprocess]{mark}",
            f"size = [{height}, {width}]",
            f'resize = "{preprocess.resize}"    # "crop" keeps the aspect ratio, "squash" all of the image',
            f"mean = {_numbers(preprocess.mean)}",
            f"std = {_numbers(preprocess.std)}",
        ]
    )


def _target() -> str:
    return """[target]
batch = 16             # images in an inference, as you will deploy
device = "cpu"         # `--gpu` on the command line is "cuda"
backend = "auto"       # or onnxruntime, openvino, tensorrt, inductor, "fastest"
# threads = 2          # all cores by default"""


def _method(seen: Seen) -> str:
    chosen = seen.chosen
    lines = _comment("Which method, and why:")
    for verdict in seen.verdicts:
        lines += _comment(_said(verdict, chosen), "#   ", "#     ")
    return "\n".join([*lines, "[method]", f"name = {_quoted(chosen.name)}"])


def _said(verdict: Verdict, chosen: Verdict) -> str:
    if not verdict.works:
        return f"{verdict.name} cannot work: {verdict.reason}"
    return f"{verdict.name} {'is taken' if verdict == chosen else 'can work too'}: {verdict.reason}"


def _recover(seen: Seen) -> str:
    return "\n".join(
        [
            *_comment(
                f"How the result is trained again; by default as {seen.chosen.name} does. Fewer steps are "
                "quicker, more recover more."
            ),
            "# [recover]",
            "# steps = 300",
        ]
    )


def _budget() -> str:
    return "\n".join(
        [
            *_comment(
                "What the result must meet, measured on the target: a fifth less time, to begin with. Or "
                "latency_ms, macs_reduction, parameters_reduction; exactly one."
            ),
            "[budget]",
            f"latency_reduction = {BUDGET.latency_reduction}",
        ]
    )


def _comment(text: str, first: str = "# ", later: str = "# ") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _quoted(text: str) -> str:
    """A TOML string; JSON's are TOML's too."""
    return json.dumps(text, ensure_ascii=False)


def _numbers(values: Sequence[float]) -> str:
    return f"[{', '.join(str(value) for value in values)}]"
