"""A stand-in for the module ``tensorrt`` that has what the real bindings have, and nothing else.

It is made from the signatures in tensorrt_api/, which test_tensorrt_bindings.py compares with the real ones.
An attribute that they lack, a wrong number or type of arguments and an unknown keyword are a StrictError,
which no code under test catches. Each access is recorded. What the objects do is in fake_tensorrt_runtime.py:
here a behaviour (a plain object) is wrapped in the class that the signature says is returned.
"""

from __future__ import annotations

import importlib.machinery
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tensorrt_signatures import Signature, parse

API = Path(__file__).parent / "tensorrt_api"
RELEASES = ("10", "11")
_ALIASES = {"IParserError": "ParserError"}
_OVERRIDDEN = {"ILogger": "log", "IProfiler": "report_layer_time"}
"""Classes that are subclassed, and the method that TensorRT calls."""


class StrictError(AssertionError):
    """The code under test used something that TensorRT does not have."""


@dataclass(frozen=True, slots=True)
class Use:
    """One access, as tensorrt_signatures.absent takes it."""

    owner: str
    name: str
    kind: str
    positional: int = 0
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EnumValue:
    """A member of an enum. As in the bindings, ``int()`` gives its value and it is no int itself."""

    owner: str
    name: str
    value: int

    def __int__(self) -> int:
        return self.value


class EnumSpace:
    """An enum, whose members are recorded as they are named."""

    def __init__(self, owner: str, values: dict[str, int], record: Callable[[Use], None]) -> None:
        self._parts = owner, values, record

    def __getattr__(self, name: str) -> EnumValue:
        owner, values, record = self._parts
        if name not in values:
            raise StrictError(f"{owner} has no member {name}")
        record(Use(owner, name, "member"))
        return EnumValue(owner, name, values[name])


def load_api(release: str) -> dict[str, Any]:
    """The committed signatures of release "10" or "11"."""
    found: dict[str, Any] = json.loads((API / f"{release}.json").read_text(encoding="utf-8"))
    return found


class FakeTensorrt(ModuleType):
    """The module. ``behave`` makes the behaviour of a class whose constructor is called."""

    def __init__(self, release: str, behave: dict[str, Callable[..., object | None]]) -> None:
        super().__init__("tensorrt")
        api = load_api(release)
        self.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
        self.__version__ = str(api["version"])
        self.uses: set[Use] = set()
        self.classes: dict[str, type] = {}
        self._enums: dict[str, dict[str, int]] = api["enums"]
        for name, known in api["classes"].items():
            made = (
                _to_be_subclassed(self, name, _OVERRIDDEN[name])
                if name in _OVERRIDDEN
                else _strict_class(self, name, known, behave.get(name))
            )
            self.classes[name] = made
            setattr(self, name, made)
        for path, values in api["enums"].items():
            owner, _, nested = path.rpartition(".")
            holder = self.classes[owner] if owner else self
            setattr(holder, nested, EnumSpace(path, values, self.uses.add))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise StrictError(f"tensorrt has no {name}, or tensorrt_signatures.py does not list it")

    def member(self, owner: str, name: str) -> EnumValue:
        """A member of an enum for the behaviours, not recorded."""
        return EnumValue(owner, name, self._enums[owner][name])

    def fits(self, kind: str, value: object) -> bool:
        """Whether a value is of the type that a signature names. Nothing is converted but Dims."""
        plain: dict[str, type] = {
            "SupportsInt": int,
            "str": str,
            "bool": bool,
            "Buffer": bytes,
            "tuple": tuple,
        }
        if kind == "object":
            return True
        if kind in plain:
            return type(value) is plain[kind]
        if kind == "Dims":
            sizes = isinstance(value, tuple) and all(type(size) is int for size in value)
            return sizes or isinstance(value, self.classes["Dims"])
        if kind in self._enums:
            return isinstance(value, EnumValue) and value.owner == kind
        if kind in self.classes:
            return isinstance(value, self.classes[kind])
        return False

    def wrap(self, kind: str, value: Any) -> Any:
        """What the code under test gets for a behaviour's answer; None is how most methods fail."""
        kind = _ALIASES.get(kind, kind)
        if value is None or kind not in self.classes or kind in _OVERRIDDEN:
            return value
        made: Any = object.__new__(self.classes[kind])
        object.__setattr__(made, "behaviour", value)
        return made


def _strict_class(
    trt: FakeTensorrt, owner: str, known: dict[str, Any], behave: Callable[..., object | None] | None
) -> type:
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        if behave is None:
            raise StrictError(f"{owner} is not made by its constructor")
        made = _called(trt, owner, "__init__", known["methods"]["__init__"], behave, args, kwargs)
        if made is None:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        object.__setattr__(self, "behaviour", made)

    def unknown(self: Any, name: str) -> Any:
        raise StrictError(f"{owner} has no {name}")

    def assign(self: Any, name: str, value: Any) -> None:
        kind = known["writable"].get(name)
        if kind is None:
            raise StrictError(f"{owner}.{name} cannot be set")
        # Setters without a signature take what their getter gives.
        kind = known["readable"][name] if kind == "object" else kind
        if not trt.fits("SupportsInt" if kind == "int" else kind, value):
            raise StrictError(f"{owner}.{name} is {kind}, set to {value!r}")
        trt.uses.add(Use(owner, name, "set"))
        setattr(self.behaviour, name, _unwrapped(value))

    def content(self: Any) -> bytes:
        trt.uses.add(Use(owner, "", "buffer"))
        return bytes(self.behaviour.content)

    namespace: dict[str, Any] = {"__init__": construct, "__getattr__": unknown, "__setattr__": assign}
    if known["buffer"]:
        namespace["__bytes__"] = content
    for name, overloads in known["methods"].items():
        if name != "__init__":
            namespace[name] = _method(trt, owner, name, overloads)
    for name, kind in known["readable"].items():
        namespace[name] = _property(trt, owner, name, kind)
    return type(owner, (), namespace)


def _method(trt: FakeTensorrt, owner: str, name: str, overloads: list[str]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        behaviour = getattr(self.behaviour, name, None)
        if behaviour is None:
            raise StrictError(f"{owner}.{name} is not simulated")
        return _called(trt, owner, name, overloads, behaviour, args, kwargs)

    return method


def _property(trt: FakeTensorrt, owner: str, name: str, kind: str) -> property:
    def read(self: Any) -> Any:
        trt.uses.add(Use(owner, name, "get"))
        return trt.wrap(kind, getattr(self.behaviour, name))

    return property(read)


def _called(
    trt: FakeTensorrt,
    owner: str,
    name: str,
    overloads: list[str],
    behaviour: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    for signature in map(parse, overloads):
        given = _bound(trt, signature, args, kwargs)
        if given is not None:
            trt.uses.add(Use(owner, name, "call", len(args), tuple(sorted(kwargs))))
            return trt.wrap(signature.returns, behaviour(**given))
    raise StrictError(f"{owner}.{name} takes {' or '.join(overloads)}, got {args} {kwargs}")


def _bound(
    trt: FakeTensorrt, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The arguments by name, for the behaviour; None where the signature does not take them."""
    if not signature.takes(len(args), tuple(kwargs)):
        return None
    kinds = {argument.name: argument.type for argument in signature.arguments}
    given = dict(zip(kinds, args, strict=False)) | kwargs
    if not all(trt.fits(kinds[name], value) for name, value in given.items()):
        return None
    return {name: _unwrapped(value) for name, value in given.items()}


def _unwrapped(value: Any) -> Any:
    return getattr(value, "behaviour", value) if not isinstance(value, EnumValue) else value


def _to_be_subclassed(trt: FakeTensorrt, owner: str, overridden: str) -> type:
    """A class without behaviour; pybind11 refuses an object whose ``__init__`` was not called."""

    def construct(self: Any) -> None:
        trt.uses.add(Use(owner, "__init__", "call"))
        self.ready = True

    def refuse(self: Any, *_: Any) -> None:
        raise StrictError(f"{owner}.{overridden} must be overridden")

    return type(owner, (), {"__init__": construct, overridden: refuse})
