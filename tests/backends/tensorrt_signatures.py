"""What TensorRT's Python bindings offer, read from their docstrings.

Run as a script where the real module ``tensorrt_bindings`` can be imported:

    python tensorrt_signatures.py dump             prints the names and signatures that tensorrt_api/ holds
    python tensorrt_signatures.py check USES.json  prints what of the uses does not exist, one in a line

A signature is written without self and without module names, a default as "...", an enum with its values:
those moved between releases 10 and 11, and code that stored one would be wrong under the other.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLASSES = (
    "Builder",
    "Dims",
    "EngineInspector",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProfiler",
    "ITensor",
    "ITimingCache",
    "OnnxParser",
    "ParserError",
    "Runtime",
)
ENUMS = (
    "BuilderFlag",
    "DataType",
    "ILogger.Severity",
    "LayerInformationFormat",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "ProfilingVerbosity",
    "TensorIOMode",
)
_PREFIXES = re.compile(
    r"\b(?:tensorrt_bindings\.tensorrt|typing|typing_extensions|collections\.abc)\.|\bnv\w+::(?:v_1_0::)?"
)


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a signature, self left out."""

    name: str
    type: str
    optional: bool


@dataclass(frozen=True, slots=True)
class Signature:
    """One overload."""

    arguments: tuple[Argument, ...]
    returns: str

    def takes(self, positional: int, keywords: tuple[str, ...]) -> bool:
        """Whether it can be called with so many positional arguments and these keywords."""
        names = [argument.name for argument in self.arguments]
        if positional > len(names) or not set(keywords) <= set(names[positional:]):
            return False
        given = {*names[:positional], *keywords}
        return all(argument.optional or argument.name in given for argument in self.arguments)


def parse(text: str) -> Signature:
    """The signature of "(flags: SupportsInt = ...) -> INetworkDefinition"."""
    inside, returns = re.fullmatch(r"\((.*)\) -> (.*)", text).groups()  # type: ignore[union-attr]
    arguments = []
    for part in _split(inside):
        name, _, kind = part.partition(": ")
        kind, default, _ = kind.partition(" = ")
        arguments.append(Argument(name, kind, bool(default)))
    return Signature(tuple(arguments), returns)


def dump(module: Any) -> dict[str, Any]:
    """The names and signatures of the classes and enums that the backend uses."""
    return {
        "version": module.__version__,
        "classes": {name: _class(_resolve(module, name)) for name in CLASSES},
        "enums": {name: _values(_resolve(module, name)) for name in ENUMS},
    }


def absent(api: dict[str, Any], uses: list[dict[str, Any]]) -> list[str]:
    """Which uses do not exist: ``{"owner", "name", "kind", "positional", "keywords"}``.

    ``kind`` is "get", "set", "call", "member" (of an enum) or "buffer" (the object's bytes are taken).
    """
    return [f"{use['owner']}.{use['name']} ({use['kind']})" for use in uses if not _exists(api, use)]


def _exists(api: dict[str, Any], use: dict[str, Any]) -> bool:
    owner, name, kind = use["owner"], use["name"], use["kind"]
    if kind == "member":
        return name in api["enums"].get(owner, {})
    known = api["classes"].get(owner)
    if known is None:
        return False
    if kind == "buffer":
        return bool(known["buffer"])
    if kind == "call":
        overloads = known["methods"].get(name, [])
        return any(parse(text).takes(use["positional"], tuple(use["keywords"])) for text in overloads)
    return name in known["readable" if kind == "get" else "writable"]


def _class(cls: type) -> dict[str, Any]:
    methods, readable, writable = {}, {}, {}
    for name in sorted(dir(cls)):
        if not _is_wanted(name):
            continue
        member = getattr(cls, name)
        if isinstance(member, property):
            readable[name] = _returns(member.fget)
            if member.fset is not None:
                writable[name] = _written(member.fset)
        elif callable(member) and (found := _overloads(name, member.__doc__ or "")):
            methods[name] = found
    return {"methods": methods, "readable": readable, "writable": writable, "buffer": _has_buffer(cls)}


def _is_wanted(name: str) -> bool:
    if name.startswith("_"):
        return name in ("__init__", "__len__", "__getitem__")
    # A network's layers are the parser's to add.
    return not name.startswith("add_") or name == "add_optimization_profile"


def _overloads(name: str, documentation: str) -> list[str]:
    pattern = rf"^(?:\d+\. )?{re.escape(name)}\((?!\*args)(.*)\) -> (.*)$"
    found = re.findall(pattern, documentation, re.MULTILINE)
    return [_plain(f"({inside}) -> {returns}") for inside, returns in found]


def _plain(signature: str) -> str:
    inside, returns = re.fullmatch(r"\((.*)\) -> (.*)", _PREFIXES.sub("", signature)).groups()  # type: ignore[union-attr]
    kept = [re.sub(r" = .*", " = ...", part) for part in _split(inside)]
    return f"({', '.join(kept[1:])}) -> {returns}"


def _split(inside: str) -> list[str]:
    """The parts between the commas that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(inside):
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append(inside[start:place].strip())
            start = place + 1
    return [part for part in (*parts, inside[start:].strip()) if part]


def _returns(getter: Any) -> str:
    found = re.search(r"\(.*\) -> (.*)", getter.__doc__ or "")
    return _PREFIXES.sub("", found[1]) if found else "object"


def _written(setter: Any) -> str:
    found = re.search(r"arg1: (.*)\) -> None", setter.__doc__ or "")
    return _PREFIXES.sub("", found[1]) if found else "object"


def _has_buffer(cls: type) -> bool:
    """Whether ``bytes(object)`` reads the object's memory."""
    if sys.version_info >= (3, 12):
        return hasattr(cls, "__buffer__")
    # Until Python 3.12 only the C structure of the type says so: tp_as_buffer, then its bf_getbuffer.
    table = ctypes.c_void_p.from_address(id(cls) + 20 * ctypes.sizeof(ctypes.c_void_p)).value
    return table is not None and ctypes.c_void_p.from_address(table).value is not None


def _values(enum: Any) -> dict[str, int]:
    return {name: int(member) for name, member in sorted(enum.__members__.items())}


def _resolve(module: Any, path: str) -> Any:
    found = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


if __name__ == "__main__":
    real = dump(importlib.import_module("tensorrt_bindings"))
    if sys.argv[1] == "dump":
        print(json.dumps(real, indent=1, sort_keys=True))
    else:
        uses = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        print("\n".join(absent(real, uses)))
