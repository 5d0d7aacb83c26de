"""Memory: how much the shipped demos take, sets larger than it, and what happens where it is refused."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from faults import children
from faults.children import came, end, start, torn
from faults.report import Found

FEWER = "data.calibration.count=256"
DEMOS = {
    "practise": ("recover.steps=20",),
    "ekg": (FEWER, "recover.epochs=1"),
    "dllp": (FEWER, "method.epochs=1"),
    "three_d": (FEWER, "recover.epochs=1", "method.rounds=2"),
}
"""The shipped recipes, and what makes each shorter: how long it trains does not matter to what it holds, nor
do images of a kilobyte."""
IMAGES = 1000
"""How many images the smaller of the sets has that are streamed; the larger has four times as many."""
SIZE = 96
MOST_SHARE = 0.2
"""How much of the larger set's additional bytes may show in what the process holds."""
LONGEST_S = 3600
ROOMS_MB = (10, 100, 1000)
"""How much memory a run is left beyond its imports, where it is to be refused more."""

MEASURED = """
import dataclasses, json, resource, sys
from optpipe import cli, pipeline, preparation, timing
import onnxruntime, onnxscript, torch
def held(name):
    lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) / 1024
imported, most, room, code = held("VmHWM"), {most!r}, {room!r}, 0
if most:
    from optpipe.data import streaming
    streaming.most_held = lambda: most
# What is held does not hang on the clock, and what is found to be fast shall not hang on who else is at work.
timed = timing.paired
def paired(*sessions, **settings):
    return dataclasses.replace(timed(*sessions, **settings), ratio=0.9, ratio_ci95=(0.89, 0.91))
timing.paired = paired
none = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_DATA, (int((held("VmData") + room) * 2**20) if room else none, none))
try:
    cli.main({words!r})
except SystemExit as stop:
    code = stop.code
resource.setrlimit(resource.RLIMIT_DATA, (none, none))
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps([code, imported, held("VmHWM"), children]))
"""
"""A command whose process then tells what it held at most."""


@dataclass(frozen=True, slots=True)
class Peak:
    """How a command ended, and what its process had held at most, in MB: after its imports, and in the end.

    ``children_mb`` is the most that a process held which it began; 0 where it began none.
    """

    code: int
    imported_mb: float
    peak_mb: float
    children_mb: float
    err: str = ""


def measuring(
    words: list[str], folder: Path, *, most: int | None = None, room_mb: float | None = None
) -> subprocess.Popen[str]:
    """Begin a command. ``most`` is how large a set it holds; ``room_mb`` limits what it may allocate."""
    # Else glibc keeps ever more of what is freed, the longer a process allocates.
    returned = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    code = MEASURED.format(words=words, most=most, room=room_mb)
    return start("-c", code, folder=folder, extra=returned)


def peak_of(process: subprocess.Popen[str]) -> Peak:
    """What a command held at most, when it has ended."""
    ended = end(process, LONGEST_S)
    if ended.code:  # a signal, that is: the code of the command is told
        return Peak(ended.code, 0.0, 0.0, 0.0, ended.err)
    code, imported, peak, of_children = json.loads(ended.out.splitlines()[-1])
    return Peak(int(code or 0), imported, peak, of_children, ended.err)


def run(root: Path, share: int, tell: Callable[[str], None]) -> Found:
    """The demos, the sets and the refusals; a share of the images and of the demos."""
    problems = list[str]()

    def count(what: str, wrong: list[str]) -> None:
        tell(f"{what}: {len(wrong)} wrong")
        problems.extend(wrong)

    # All at once: what one holds is no matter of the others'.
    demos = {name: demo(name, root) for name in list(DEMOS)[: max(1, len(DEMOS) // share)]}
    sets = stream(root / "streamed", max(300, IMAGES // share))
    rooms = refuse(root / "refused", ROOMS_MB[:: min(share, 3)])
    grown, wrong = streamed(sets)
    count("sets larger than memory", wrong)
    ends, wrong = refused(rooms)
    count("memory refused", wrong)
    peaks = {name: peak_of(process) for name, process in demos.items()}
    count("demos", [f"{name}: {one.err[-600:]}" for name, one in peaks.items() if one.code])
    return Found("" if problems else section(peaks, grown, ends), tuple(problems))


def demo(name: str, root: Path) -> subprocess.Popen[str]:
    """Begin a shipped demo, with its budget in MACs; they do not disturb each other in what they hold."""
    text = (children.ROOT / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    for old, new in (
        ('"../calibration_data', f'"{children.ROOT}/calibration_data'),
        ('"weights/', f'"{children.ROOT}/recipes/weights/'),
        ("latency_reduction", "macs_reduction"),
    ):
        assert old in text
        text = text.replace(old, new)
    recipe = root / f"{name}.toml"
    recipe.write_text(text, encoding="utf-8")
    shorter = ["timing.budget_s=0.2", "timing.final_budget_s=0.2", "run.cache=false", *DEMOS[name]]
    words = ["run", str(recipe), "--out", str(root / name), "--quiet", *(f"--set={word}" for word in shorter)]
    return measuring(words, root)


# ---------------------------------------------------------------- sets larger than memory


@dataclass(frozen=True, slots=True)
class Grown:
    """What a run held at most with a smaller and a larger set, in MB, and what the sets' pixels take."""

    name: str
    few_mb: float
    many_mb: float
    few_pixels_mb: float
    many_pixels_mb: float

    @property
    def share(self) -> float:
        """How much of the additional pixels shows in what the process held."""
        return (self.many_mb - self.few_mb) / (self.many_pixels_mb - self.few_pixels_mb)


@dataclass(frozen=True, slots=True)
class Streaming:
    """Runs that were begun: of each kind one with sets of ``images``, and one with four times as many."""

    folder: Path
    images: int
    begun: dict[tuple[str, str], subprocess.Popen[str]]


KINDS = {
    "held": (None, "plain.npz"),
    "folder and plain `.npz`": (2**20, "plain.npz"),
    "folder and compressed `.npz`": (2**20, "packed.npz"),
}
"""How large a set is held, and where the calibration images are."""


def stream(folder: Path, images: int) -> Streaming:
    """Begin runs with sets that are held, or read from folders and archives of both kinds."""
    begun = {}
    for size, count in (("few", images), ("many", 4 * images)):
        home = make_sets(folder / size, count)
        for number, (kind, (most, calibration)) in enumerate(KINDS.items()):
            words = ["run", "small.toml", "--out", f"run-{number}", "--quiet", "--set", "run.cache=false"]
            words += ["--set", f'data.calibration.source="{calibration}"']
            begun[kind, size] = measuring(words, home, most=most)
    return Streaming(folder, images, begun)


def streamed(sets: Streaming) -> tuple[list[Grown], list[str]]:
    """What the runs held, and what is wrong with that or with what they came to."""
    peaks = {key: peak_of(process) for key, process in sets.begun.items()}
    failed = [f"{key}: exit code {one.code}: {one.err[-600:]}" for key, one in peaks.items() if one.code]
    if failed:
        return [], failed
    few, many = (2 * count * 3 * SIZE * SIZE / 2**20 for count in (sets.images, 4 * sets.images))
    grown = [
        Grown(kind, peaks[kind, "few"].peak_mb, peaks[kind, "many"].peak_mb, few, many) for kind in KINDS
    ]
    wrong = [
        f"{one.name}: {one.share:.0%} of the additional pixels are held"
        for one in grown[1:]
        if one.share > MOST_SHARE
    ]
    if grown[0].share < 0.5:
        wrong.append(f"held: only {grown[0].share:.0%} of the pixels show, so this measures nothing")
    for size in ("few", "many"):
        ends = [came(sets.folder / size / f"run-{number}") for number in range(len(KINDS))]
        wrong += [f"{size}: came to {other}, held to {ends[0]}" for other in ends if other != ends[0]]
    return grown, wrong


def make_sets(folder: Path, images: int) -> Path:
    """A recipe whose evaluation images are in a folder, its calibration images in archives."""
    folder.parent.mkdir(exist_ok=True)
    children.make(folder)
    rng = np.random.default_rng(images)
    for number in range(images):
        path = folder / "many" / f"class{number % 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    pixels = rng.integers(0, 256, (images, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(folder / "plain.npz", images=pixels)
    np.savez_compressed(folder / "packed.npz", images=pixels)
    recipe = folder / "small.toml"
    text = recipe.read_text(encoding="utf-8")
    for old, new in (("many.npz", "many"), ("photos", "plain.npz"), ("[16, 16]", f"[{SIZE}, {SIZE}]")):
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text, encoding="utf-8")
    return folder


# ---------------------------------------------------------------- memory that is refused


@dataclass(frozen=True, slots=True)
class Refusing:
    """Runs that were begun with so much memory left, in MB; None for one with all that there is."""

    folder: Path
    begun: dict[int | None, subprocess.Popen[str]]
    huge: subprocess.Popen[str]


def refuse(folder: Path, rooms_mb: tuple[int, ...]) -> Refusing:
    """Begin runs that are left little memory, and one with the largest batch."""
    children.make(folder)
    begun = {room: measuring(_words(room), folder, room_mb=room) for room in (None, *rooms_mb)}
    huge = ["run", "small.toml", "--out", "huge", "--quiet", "--set", "target.batch=65536"]
    return Refusing(folder, begun, measuring(huge, folder, room_mb=300))


def _words(room: int | None) -> list[str]:
    return ["run", "small.toml", "--out", f"run-{room}", "--quiet", "--set", "run.cache=false"]


def refused(rooms: Refusing) -> tuple[dict[int, str], list[str]]:
    """Each ends in a line or well, and given again comes to the end of one that was never refused."""
    folder = rooms.folder
    found = {room: peak_of(process) for room, process in rooms.begun.items()}
    plain, huge = found.pop(None), peak_of(rooms.huge)
    if plain.code:
        return {}, [plain.err[-600:]]
    ends, wrong = dict[int, str](), list[str]()
    again = {room: measuring(_words(room), folder) for room in found if room is not None}
    for room, process in again.items():
        first, second = found[room], peak_of(process)
        ends[room] = "finished" if first.code == 0 else "refused"
        if first.code not in {0, 4} or (first.code and not _is_clear(first.err)):
            wrong.append(f"{room} MB: exit code {first.code}: {first.err[-600:]!r}")
        if second.code:
            wrong.append(f"{room} MB, again: exit code {second.code}: {second.err[-600:]!r}")
        elif came(folder / f"run-{room}") != came(folder / "run-None"):
            wrong.append(f"{room} MB: came to another end")
    if huge.code != 4 or not _is_clear(huge.err):
        wrong.append(f"the largest batch: exit code {huge.code}: {huge.err[-600:]!r}")
    return ends, [*wrong, *torn(folder)]


def _is_clear(err: str) -> bool:
    lines = err.splitlines()
    return len(lines) == 1 and lines[0].startswith("Error: ") and "unexpected" not in lines[0]


TITLE = "## Memory"

INTRODUCTION = """\
`make faults CAMPAIGNS=memory` measures the most that a process ever held (`VmHWM`, in MB of 2^20 bytes), and
what becomes of a run that is refused memory.

What the shipped demos take. They are trained for an epoch of 256 images here and have their budgets in MACs,
and each candidate counts as a tenth faster, whatever the clock says on a busy machine; that does not change
what they hold:
"""

STREAMED = """\
A set of images is held in memory, as bytes at the network's resolution, where it takes at most an eighth of
the memory that the process may have: a run has up to three sets, one or two of them at a second size too, and
the rest is for the networks. A larger set is streamed: its files are decoded again, or its rows of an `.npz`
read again, batch by batch, each time that the set is looked at. A compressed `.npz` is unpacked once for it,
into a temporary file without a name that is gone with the process; save large ones with `np.savez`, which are
read where they lie. Digests, subsets, accuracies and weights are those of a set that is held. Each image is
compared with its sha256 of the first time, so that one that changes while a run is at work ends it in a line.

Below, sets are streamed from 1 MB on. The evaluation images are in a folder, the calibration images in an
`.npz`, random ones of {size} x {size}, {few:,} and {many:,} of each. Each run came to the same weights and
accuracies as the one that held its images.
"""

REFUSED = """\
The same small run was left only so much memory beyond its imports (`RLIMIT_DATA`); each that was refused more
ended in one line with exit code 4 and, given again with enough, came to the same weights and accuracy as one
that was never refused. The largest batch that a recipe may ask for, of 65,536 images, with 300 MB left, ends
in a line too.
"""

MENDED = """\
Found and mended by it:

- All images of a set were held, and those of an `.npz` twice.
- Memory that torch or ONNX Runtime could not have was an "unexpected" error with a text of theirs; it is the
  line now that Python's own lack of memory has.
"""


def section(demos: dict[str, Peak], grown: list[Grown], ends: dict[int, str]) -> str:
    """The section of the page, with all that was measured."""
    lines = [TITLE, "", INTRODUCTION, "| recipe | at most, MB | of which imports | its child processes |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for name, one in demos.items():
        others = f"{one.children_mb:,.0f}" if one.children_mb else "none"
        lines.append(f"| {name}.toml | {one.peak_mb:,.0f} | {one.imported_mb:,.0f} | {others} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "onnx", "numpy"))
    lines += ["", f"Python {platform.python_version()}, {versions}; {platform.system()}, one thread.", ""]
    lines.append(STREAMED.format(size=SIZE, few=IMAGES, many=4 * IMAGES))
    lines += ["| images | at most with the fewer, MB | with four times as many | pixels added | share held |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {one.name} | {one.few_mb:,.0f} | {one.many_mb:,.0f} | "
        f"{one.many_pixels_mb - one.few_pixels_mb:,.0f} | {one.share:.0%} |"
        for one in grown
    ]
    lines += ["", REFUSED, "| left, MB | the run |", "| ---: | --- |"]
    lines += [f"| {room:,} | {end} |" for room, end in ends.items()]
    return "\n".join([*lines, "", MENDED])
