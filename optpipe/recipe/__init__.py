"""TOML recipes -> frozen dataclasses; whatever is unknown or ill-typed is an error of one line.

Only light modules are imported here, so that a recipe can be checked without loading torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import tomli_w
from pydantic import TypeAdapter, ValidationError

from optpipe.data import SYNTHESIZE, check_synthesis
from optpipe.errors import UsageError
from optpipe.models import ModelSpec
from optpipe.precision import check
from optpipe.recipe.tables import (
    WHO_COMPUTES,
    DataTable,
    ExportTable,
    ReportTable,
    RunTable,
    TargetTable,
    TimingTable,
)
from optpipe.recovery import check_recovery, without_unused
from optpipe.types import Budget, Limits, Tune

__all__ = [
    "TABLES",
    "DataTable",
    "ExportTable",
    "RawTable",
    "Recipe",
    "ReportTable",
    "RunTable",
    "TargetTable",
    "TimingTable",
    "Value",
    "bind",
    "from_tables",
    "load",
    "merge",
    "recovery",
]

T = TypeVar("T")
Value = str | int | float | bool | Sequence["Value"] | Mapping[str, "Value"]
RawTable = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe. ``method`` and ``recover`` stay raw until the method's module is loaded.

    ``recover_name`` names the method whose recovery ``recover`` departs from; None is the running one.
    """

    path: Path
    model: ModelSpec
    data: DataTable
    target: TargetTable
    export: ExportTable
    timing: TimingTable
    method_name: str
    method: RawTable
    recover_name: str | None
    recover: RawTable
    budget: Budget
    run: RunTable
    report: ReportTable = field(default_factory=ReportTable)
    gate: Limits = field(default_factory=Limits)

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self.path.parent

    def frozen(self, method: object, recover: object) -> str:
        """The whole recipe as TOML with every default written out, but for what changes nothing of the run.

        These are ``report`` and ``gate``, so that a finished run can still be asked for more, and be held
        against other limits, and who computes: a run may go on with other workers. ``trainer`` is left out
        where it is the target.
        """
        left_out = WHO_COMPUTES if self.run.trainer != "target" else (*WHO_COMPUTES, "trainer")
        tables = {
            "model": _plain(self.model),
            "data": _plain(self.data),
            "target": _plain(self.target),
            "export": _plain(self.export),
            "timing": _plain(self.timing),
            "method": {"name": self.method_name, **typing.cast(dict[str, object], _plain(method))},
            "recover": {
                **({} if self.recover_name is None else {"name": self.recover_name}),
                **typing.cast(dict[str, object], _plain(recover)),
            },
            "budget": _plain(self.budget),
            "run": _plain({key: value for key, value in _fields(self.run) if key not in left_out}),
        }
        return tomli_w.dumps(tables)


_WORKERS = re.compile(r"serial|ray|local:[1-9][0-9]{0,3}")

DEEPEST = 32
"""How deep tables and arrays may nest; no key takes more than three levels."""

MOST = 65536
"""Images in a batch, and threads."""

TABLES = (
    "model", "data", "target", "export", "timing", "method", "recover", "budget", "run", "report", "gate"
)  # fmt: skip


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    ``overrides`` are ``table.key=value`` strings; the value is TOML, or a plain string where it is not.

    Raises:
        UsageError: the file is missing or no TOML, a key is unknown or ill-typed, a value is out of range.
    """
    try:
        path = path.resolve()
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UsageError(f"{path}: there is no such recipe{hint}") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder; name the .toml file in it") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # numbers of 5000 digits are no TOMLDecodeError
        raise UsageError(f"{path}: is not valid TOML: {error}") from None
    except RuntimeError as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None  # a link to itself
    return from_tables(raw, path, overrides)


def from_tables(raw: dict[str, typing.Any], path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A checked recipe of its tables, which are taken over; relative paths start in ``path``'s folder.

    ``path`` names the recipe in messages and, unless ``[run] name`` does, its run; one in angle brackets is
    no file, and the run has its method's name.

    Raises:
        UsageError: as :func:`load`.
    """
    if isinstance(raw.get("recover"), str):
        raw["recover"] = {"name": raw["recover"]}
    for override in overrides:
        _override(raw, override)
    raw = typing.cast(dict[str, Value], _expand(raw, path, ()))
    for name, table in raw.items():
        if name not in TABLES:
            raise UsageError(f"{path}: [{name}]: unknown table{_nearest(name, TABLES)}")
        if not isinstance(table, Mapping):
            raise UsageError(f"{path}: {name} = {table!r}: is a table: write [{name}]")
    return _build(path, typing.cast(dict[str, RawTable], raw))


def _build(path: Path, raw: Mapping[str, RawTable]) -> Recipe:
    for name in ("model", "data", "method", "budget"):
        if name not in raw:
            raise UsageError(f"{path}: [{name}]: this table is missing")
    method = dict(raw["method"])
    method_name = method.pop("name", None)
    if not isinstance(method_name, str):
        raise UsageError(f'{path}: [method] name: must name a method, for example name = "practise"')
    recover = dict(raw.get("recover", {}))
    recover_name = recover.pop("name", None)
    if not isinstance(recover_name, str | None):
        raise UsageError(
            f"{path}: [recover] name = {json.dumps(recover_name, default=str)}: must name a method, for "
            'example name = "ekg"'
        )
    run = {"name": method_name if path.name.startswith("<") else path.stem, **raw.get("run", {})}
    recipe = Recipe(
        path=path,
        model=bind(ModelSpec, raw["model"], path, "model"),
        data=bind(DataTable, _with_defaults(raw["data"]), path, "data"),
        target=bind(TargetTable, raw.get("target", {}), path, "target"),
        export=bind(ExportTable, raw.get("export", {}), path, "export"),
        timing=bind(TimingTable, raw.get("timing", {}), path, "timing"),
        method_name=method_name,
        method=method,
        recover_name=recover_name,
        recover=recover,
        budget=bind(Budget, raw["budget"], path, "budget"),
        run=bind(RunTable, run, path, "run"),
        report=bind(ReportTable, raw.get("report", {}), path, "report"),
        gate=bind(Limits, raw.get("gate", {}), path, "gate"),
    )
    _check_ranges(recipe)
    return recipe


def _with_defaults(data: RawTable) -> RawTable:
    calibration = data.get("calibration")
    asked = isinstance(calibration, Mapping) and calibration.get("source") == SYNTHESIZE
    return {"preprocess": {}, **({"synthesize": {}} if asked else {}), **data}


def bind(cls: type[T], table: RawTable, path: Path, where: str) -> T:
    """A dataclass from a raw table.

    Raises:
        UsageError: in one line: file, table, key, value, and the nearest valid key.
    """
    _refuse_unknown(cls, table, path, where)
    try:
        return TypeAdapter(cls).validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        names = [part for part in first["loc"] if isinstance(part, str)]
        indices = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
        place, key = ".".join([where, *names[:-1]]), names[-1] + indices
        if first["type"] == "missing":
            raise UsageError(f"{path}: [{place}] {key}: is missing") from None
        shown = json.dumps(first["input"])
        message = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
        raise UsageError(f"{path}: [{place}] {key} = {shown}: {message}") from None


def merge(base: T, table: RawTable, path: Path, where: str) -> T:
    """``base`` with the keys of a raw table replaced; errors as :func:`bind`."""
    assert dataclasses.is_dataclass(base) and not isinstance(base, type)
    _refuse_unknown(type(base), table, path, where)
    return bind(type(base), {**dataclasses.asdict(base), **table}, path, where)


def _refuse_unknown(cls: type, table: RawTable, path: Path, where: str) -> None:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in table.items():
        if key not in names:
            shown = json.dumps(value, default=str)
            raise UsageError(f"{path}: [{where}] {key} = {shown}: unknown key{_nearest(key, names)}")
        for nested in typing.get_args(hints[key]) or (hints[key],):
            if dataclasses.is_dataclass(nested) and isinstance(nested, type) and isinstance(value, Mapping):
                _refuse_unknown(nested, value, path, f"{where}.{key}")


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; valid are {', '.join(words)}"


def _check_ranges(recipe: Recipe) -> None:
    budget = dataclasses.asdict(recipe.budget)
    given = {key: value for key, value in budget.items() if value is not None}
    if len(given) != 1:
        raise UsageError(
            f"{recipe.path}: [budget]: give exactly one of {', '.join(budget)}; given: "
            f"{', '.join(given) or 'none'}"
        )
    positive = "must be above 0 and finite"
    share = "must be between 0 and 1"
    for key, whole in (("batch", recipe.target.batch), ("threads", recipe.target.threads)):
        if whole is not None and whole > MOST:
            raise UsageError(f"{recipe.path}: [target] {key} = {whole}: must be at most {MOST}")
    checks: list[tuple[str, str, float | None, bool, str]] = [
        ("budget", "latency_reduction", recipe.budget.latency_reduction, True, share),
        ("budget", "latency_ms", recipe.budget.latency_ms, False, positive),
        ("budget", "macs_reduction", recipe.budget.macs_reduction, True, share),
        ("budget", "parameters_reduction", recipe.budget.parameters_reduction, True, share),
        ("budget", "sparsity", recipe.budget.sparsity, True, share),
        ("budget", "drop_blocks", recipe.budget.drop_blocks, False, positive),
        ("target", "batch", recipe.target.batch, False, positive),
        ("target", "threads", recipe.target.threads, False, positive),
        ("timing", "tolerance", recipe.timing.tolerance, True, share),
        ("timing", "budget_s", recipe.timing.budget_s, False, positive),
        ("timing", "final_budget_s", recipe.timing.final_budget_s, False, positive),
        ("timing", "drift", recipe.timing.drift, False, positive),
        ("run", "checkpoint_every", recipe.run.checkpoint_every, False, positive),
        ("run", "worker_cpus", recipe.run.worker_cpus, False, positive),
        ("run", "devices", recipe.run.devices, False, positive),
    ]
    unmeant = recipe.gate.problem()
    if unmeant is not None:
        raise UsageError(f"{recipe.path}: [gate] {unmeant[0]} = {unmeant[1]:g}: {unmeant[2]}")
    check(recipe.export.quantize, f"{recipe.path}: [export.quantize]")
    images = recipe.data
    check_synthesis(images.calibration, images.preprocess, images.synthesize, str(recipe.path))
    for table, key, value, below_one, message in checks:
        # Written so that nan fails too.
        if value is not None and not 0 < value < (1 if below_one else math.inf):
            raise UsageError(f"{recipe.path}: [{table}] {key} = {value}: {message}")
    name, seed = recipe.run.name, recipe.run.seed
    if not name or name.startswith(".") or "/" in name or not name.isprintable() or len(name.encode()) > 200:
        raise UsageError(f'{recipe.path}: [run] name = "{name}": must be a plain folder name')
    if seed < 0:
        raise UsageError(f"{recipe.path}: [run] seed = {seed}: must not be below 0")
    if not _WORKERS.fullmatch(recipe.run.workers):
        raise UsageError(
            f'{recipe.path}: [run] workers = "{recipe.run.workers}": must be "serial", "local:N" or "ray"'
        )
    if recipe.run.worker_gpus < 0:
        raise UsageError(f"{recipe.path}: [run] worker_gpus = {recipe.run.worker_gpus}: must not be below 0")


def recovery(base: Tune, table: RawTable, path: Path) -> Tune:
    """``base`` with the keys of ``[recover]`` replaced, checked; steps alone take the place of epochs.

    A loss that is given drops what ``base`` set for its own alone.

    Raises:
        UsageError: as :func:`bind`, or the settings make no training.
    """
    if "steps" in table and "epochs" not in table:
        base = dataclasses.replace(base, epochs=None)
    chosen = merge(base, table, path, "recover")
    if "stage_weight" not in table:
        chosen = without_unused(chosen)
    check_recovery(chosen, str(path))
    return chosen


_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<default>:-(?P<value>[^}]*))?\}")


def _expand(value: Value, path: Path, keys: tuple[str, ...], depth: int = 0) -> Value:
    """Every ``${NAME}`` or ``${NAME:-default}`` in the strings of a nested value replaced.

    UsageError for what no key takes and no reader of it need guard against: deep nesting, and integers
    beyond TOML's own 64 bits.
    """
    if depth > DEEPEST:
        raise UsageError(f"{path}: [{keys[0]}] {'.'.join(keys[1:4])}: is nested too deeply")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UsageError(f"{path}: [{'.'.join(keys[:-1])}] {keys[-1]}: an integer has at most 64 bits")
    if isinstance(value, str):

        def replacement(match: re.Match[str]) -> str:
            found = os.environ.get(match["name"])
            if found:
                return found
            if match["default"] is not None:
                return match["value"]
            place = f"[{'.'.join(keys[:-1])}] {keys[-1]}"
            shown, name = json.dumps(value), match["name"]
            raise UsageError(f"{path}: {place} = {shown}: environment variable {name} is not set")

        return _VARIABLE.sub(replacement, value)
    if isinstance(value, Mapping):
        return {key: _expand(inner, path, (*keys, key), depth + 1) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_expand(inner, path, keys, depth + 1) for inner in value]
    return value


def _override(raw: dict[str, typing.Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) < 2:
        raise UsageError(f"--set {override}: write table.key=value, for example budget.latency_reduction=0.3")
    value: object = text.strip()
    with contextlib.suppress(ValueError, RecursionError):
        found = tomllib.loads(f"value = {text}")
        value = found["value"] if len(found) == 1 else value
    table = raw
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override}: {part} is a value, not a table")
    table[path[-1]] = value


def _fields(value: object) -> list[tuple[str, object]]:
    """The fields of a dataclass that are not None."""
    assert dataclasses.is_dataclass(value) and not isinstance(value, type)
    items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    return [(key, inner) for key, inner in items if inner is not None]


def _plain(value: object) -> object:
    """A dataclass as nested TOML values, without the keys that are None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(inner) for key, inner in _fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(inner) for inner in value]
    return value
