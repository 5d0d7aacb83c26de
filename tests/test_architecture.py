"""Who may import whom, and what the pure rooms may not touch; read from the source, nothing is run."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "optpipe"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room is a file or folder directly in optpipe/; "optpipe" is its __init__.py. Everything that a room may
# import of optpipe, at the top of a file or inside a function. The table has no circle (tested below), so
# neither have the imports.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "types": set(),
    "interruption": set(),
    "locks": set(),
    "files": {"interruption", "errors"},
    "seals": set(),
    "tensors": {"files", "seals", "errors"},
    # pure
    "losses": {"types", "errors"},
    "augment": {"types", "errors"},
    "graph": {"types", "errors"},
    "methods": {"graph", "losses", "types", "errors"},
    "landscape": {"graph", "types", "errors"},
    "synthesis": {"augment", "types", "errors"},
    "quality": {"types"},
    "uncertainty": {"types", "errors"},
    "ensemble": set(),
    # at the machine's edge
    "backends": {"files", "interruption", "types", "errors"},
    "shared": {"files", "errors"},
    "store": {"files", "interruption", "locks", "seals", "tensors", "shared", "types", "errors"},
    "timing": {"locks", "types", "errors"},
    "zoo": {"errors"},
    "models": {"zoo", "types", "errors"},
    "data": {"models", "types", "errors"},
    "leftovers": set(),
    "onnx_export": {"files", "leftovers", "types", "errors"},
    "program_export": {"files", "leftovers", "types", "errors"},
    "precision": {"files", "store", "types", "errors"},
    "tune": {"augment", "interruption", "losses", "graph", "types", "errors"},
    "bank": {"files", "seals", "tune", "types", "errors"},
    # names and recipes
    "plugins": {"types", "errors"},
    "selection": {"plugins", "types", "errors"},
    "recovery": {"types", "errors"},
    "recipe": {"recovery", "data", "models", "precision", "types", "errors"},
    "trust": {"recipe", "data", "models", "errors"},
    # what a run leaves behind
    "report": {"files", "seals", "store", "types", "errors"},
    "beginning": {"files", "plugins", "models", "data", "graph", "types", "errors"},
    "comparison": {"files", "report", "store", "types", "errors"},
    "deploy": {"files", "seals", "store", "data", "models", "graph", "types", "errors"},
    "environment": {"version", "plugins", "report", "types", "errors"},
    "inspection": {"recipe", "data", "models", "graph", "store", "types", "errors"},
    "rebuild": {
        "files",
        "building",
        "deploy",
        "plugins",
        "precision",
        "selection",
        "timing",
        "types",
        "errors",
    },
    "selftest": {
        "building",
        "data",
        "environment",
        "interruption",
        "onnx_export",
        "plugins",
        "precision",
        "timing",
        "types",
        "errors",
    },
    "bench": {
        "files",
        "interruption",
        "plugins",
        "selection",
        "deploy",
        "store",
        "timing",
        "types",
        "errors",
    },
    # from the search up to the command line
    "building": {"onnx_export", "program_export", "precision", "types", "errors"},
    "contest": {"building", "timing", "types", "errors"},
    "lab": {
        "files",
        "seals",
        "building",
        "quality",
        "bank",
        "tune",
        "timing",
        "data",
        "graph",
        "store",
        "types",
        "errors",
    },
    "preparation": {
        "recipe",
        "selection",
        "plugins",
        "building",
        "synthesis",
        "models",
        "data",
        "graph",
        "tune",
        "types",
        "errors",
    },
    "results": {"onnx_export", "types"},
    "pipeline": {
        "files",
        "interruption",
        "seals",
        "locks",
        "preparation",
        "recipe",
        "version",
        "results",
        "lab",
        "landscape",
        "synthesis",
        "building",
        "contest",
        "selection",
        "precision",
        "environment",
        "deploy",
        "report",
        "quality",
        "uncertainty",
        "ensemble",
        "tune",
        "bank",
        "timing",
        "onnx_export",
        "data",
        "graph",
        "shared",
        "store",
        "types",
        "errors",
    },
    "survey": {
        "files",
        "results",
        "recipe",
        "report",
        "deploy",
        "tune",
        "timing",
        "landscape",
        "models",
        "data",
        "graph",
        "store",
        "types",
        "errors",
    },
    "api": {
        *("pipeline", "preparation", "recipe", "report", "deploy", "models", "data", "store", "files"),
        *("types", "errors"),
    },
    "optpipe": {"api", "deploy", "version", "errors"},
    "console": {"store", "types"},
    "sweep": {
        "trust",
        "files",
        "interruption",
        "pipeline",
        "preparation",
        "comparison",
        "recipe",
        "selection",
        "report",
        "timing",
        "store",
        "types",
        "errors",
    },
    "cli": {
        "files",
        "interruption",
        "locks",
        "optpipe",
        "pipeline",
        "preparation",
        "recipe",
        "inspection",
        "beginning",
        "comparison",
        "sweep",
        "bench",
        "rebuild",
        "survey",
        "selftest",
        "trust",
        "environment",
        "console",
        "report",
        "deploy",
        "store",
        "errors",
    },
}

PURE_ROOMS = {
    "methods", "graph", "landscape", "losses.py", "augment.py", "uncertainty.py", "ensemble.py",
    "synthesis.py", "recovery.py",
}  # fmt: skip
PURE = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in PURE_ROOMS]
MOST_LINES = 450
LONGER = {PACKAGE / "deploy" / "run_engine.py": 504}  # travels alone, so it cannot be split


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, by its whole name; ``top`` where it happens when the file is imported."""

    name: str
    line: int
    top: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[Import]:
    """All that a file imports, without what stands under ``if TYPE_CHECKING``."""
    yield from _imports(parse(path), path, top=True)


def _imports(node: ast.AST, path: Path, *, top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, top)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}:{child.lineno}: relative import"
            assert child.module is not None
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield Import(whole if whole in MODULES else child.module, child.lineno, top)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _imports(other, path, top=top)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, path, top=top and not inside)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---------------------------------------------------------------- direction


def test_every_room_is_in_the_table() -> None:
    rooms = {room_of(module) for module in MODULES}
    assert rooms <= set(ALLOWED), "say in ALLOWED what a new room may import"


def test_the_table_has_no_circle() -> None:
    assert len(list(TopologicalSorter(ALLOWED).static_order())) == len(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_room_imports_only_what_lies_below_it(path: Path) -> None:
    room = room_of(module_name(path))
    wrong = [
        f"{name(path)}:{found.line}: {room} imports {found.name}"
        for found in imports(path)
        if found.name.split(".")[0] == "optpipe" and room_of(found.name) not in ALLOWED[room] | {room}
    ]
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        module: {found.name for found in imports(path) if found.top and found.name in MODULES}
        for module, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_the_command_line_imports_click(path: Path) -> None:
    found = [found.line for found in imports(path) if found.name.split(".")[0] == "click"]
    assert not found or path.parent == PACKAGE / "cli"


def test_engines_are_imported_by_their_backend_alone_and_late() -> None:
    sdks = {"onnxruntime", "openvino", "tensorrt", "polygraphy"}
    # ONNX Runtime also quantizes, and the runner of a bundle stands alone.
    others = {PACKAGE / "deploy" / "run_engine.py", *(PACKAGE / "precision").iterdir()}
    wrong = [
        f"{name(path)}:{found.line}: imports {found.name}"
        for path in FILES
        for found in imports(path)
        if found.name.split(".")[0] in sdks
        and ((path.parent.name != "backends" and path not in others) or found.top)
    ]
    assert wrong == []


# ---------------------------------------------------------------- purity

EFFECT_MODULES = {
    "time", "datetime", "subprocess", "random", "secrets", "os", "io", "shutil", "tempfile", "socket",
    "logging",
}  # fmt: skip
EFFECT_CALLS = {"open", "print", "input", "exec", "eval", "breakpoint"}
EFFECT_METHODS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink", "tofile"}
TORCH_EFFECTS = {"torch.save", "torch.load", "numpy.save", "numpy.load", "numpy.savez", "numpy.fromfile"}
GLOBAL_SEEDS = {
    "torch.manual_seed", "torch.seed", "torch.set_rng_state", "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all", "torch.random.manual_seed", "torch.random.seed",
}  # fmt: skip
# These draw from the global state unless a generator is passed.
DRAWS = {
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson",
    "uniform_", "normal_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_",
}  # fmt: skip
NUMPY_GENERATORS = {"default_rng", "Generator", "SeedSequence", "PCG64"}


def effects(tree: ast.Module) -> Iterator[str]:
    """Every use of a file, a clock, the console, another process or a global random state."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"{node.lineno}: import {a.name}" for a in node.names if _root(a.name))
        elif isinstance(node, ast.ImportFrom):
            if _root(node.module or ""):
                yield f"{node.lineno}: from {node.module} import"
            elif node.module in ("numpy", "torch"):
                yield from (
                    f"{node.lineno}: from {node.module} import random"
                    for a in node.names
                    if a.name == "random"
                )
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node).replace("np.", "numpy.", 1)
            parts = dotted.split(".")
            if dotted in GLOBAL_SEEDS | TORCH_EFFECTS:
                yield f"{node.lineno}: {dotted}"
            if parts[:2] == ["numpy", "random"] and len(parts) > 2 and parts[2] not in NUMPY_GENERATORS:
                yield f"{node.lineno}: {dotted}"
        elif isinstance(node, ast.Call):
            yield from _call_effects(node)


def _call_effects(node: ast.Call) -> Iterator[str]:
    if isinstance(node.func, ast.Name) and node.func.id in EFFECT_CALLS:
        yield f"{node.lineno}: {node.func.id}()"
    if isinstance(node.func, ast.Attribute):
        drawn = node.func.attr in DRAWS and ast.unparse(node.func.value).split(".")[0] not in (
            "rng",
            "np",
            "numpy",
        )
        if drawn and not any(keyword.arg == "generator" for keyword in node.keywords):
            yield f"{node.lineno}: {ast.unparse(node.func)}() without a generator"
        if node.func.attr in EFFECT_METHODS:
            yield f"{node.lineno}: {ast.unparse(node.func)}()"


def _root(module: str) -> bool:
    return module.partition(".")[0] in EFFECT_MODULES


@pytest.mark.parametrize("path", PURE, ids=name)
def test_pure_rooms_touch_no_file_clock_console_or_global_random_state(path: Path) -> None:
    assert [f"{name(path)}:{effect}" for effect in effects(parse(path))] == []


@pytest.mark.parametrize(
    "line",
    [
        "import time",
        "from subprocess import run",
        "import random",
        "from numpy import random",
        "open('file')",
        "print('done')",
        "Path('file').write_text('text')",
        "torch.save(state, path)",
        "torch.manual_seed(0)",
        "np.random.seed(0)",
        "np.random.shuffle(order)",
        "numpy.random.rand(3)",
        "torch.randn(3)",
        "nn.init.normal_(weight)",
    ],
)
def test_the_check_of_pure_rooms_finds(line: str) -> None:
    assert list(effects(ast.parse(line))) != []


@pytest.mark.parametrize(
    "line",
    [
        "np.random.default_rng(seed)",
        "torch.randn(3, generator=generator)",
        "rng.normal()",
        "timing(x)",
        "graph.trace(m)",
    ],
)
def test_the_check_of_pure_rooms_lets_pass(line: str) -> None:
    assert list(effects(ast.parse(line))) == []


# ---------------------------------------------------------------- size and weight


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_stays_readable_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    most = LONGER.get(path, MOST_LINES)
    assert lines <= most, f"{name(path)} has {lines} lines: split it into a folder of the same name"


def test_the_light_modules_import_no_torch() -> None:
    light = (
        *("types", "errors", "recipe", "models", "data", "store", "report.build", "deploy"),
        *("bench", "comparison", "cli"),
    )
    code = "import sys\n" + "\n".join(f"import optpipe.{module}" for module in light)
    done = run_python("-c", f"{code}\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys\nfrom optpipe.cli import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'onnx', 'pydantic', 'rich'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "Usage: optpipe" in done.stdout


def test_help_is_there_at_once() -> None:
    """Below 0.3 s of processor time on a quiet machine; twice that is allowed on a busy one."""
    took = []
    for _ in range(5):
        before = os.times()
        done = run_python("-m", "optpipe.cli", "--help")
        after = os.times()
        assert done.returncode == 0, done.stderr
        took.append(after.children_user - before.children_user)
    print(f"optpipe --help: {min(took):.2f} s of user time at best, {max(took):.2f} s at worst")
    assert min(took) < 0.6


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
