"""Inputs that a generator makes: recipes by hypothesis, all other files by mutation of good ones.

No outcome is expected of one of them; but each must end with an exit code of its own, in one clear line where
it fails, and with every file as it was.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from faults import engines
from faults.cases import call, strange
from faults.images import encoded
from faults.recipes import CHECK
from faults.runs import COMPARE, GATE, LOAD, VERIFY
from faults.workspace import CLASSES, MANIFEST_PATH, recipe, wrote


@dataclass(frozen=True, slots=True)
class Campaign:
    """``quick`` inputs in the quick suite, ``whole`` of them in the whole campaign.

    ``spoil`` changes a fresh copy of ``touched``, the files that it may touch, with a generator of its own
    for each input, and says which call is made.
    """

    name: str
    quick: int
    whole: int
    touched: tuple[str, ...]
    spoil: Callable[[Path, np.random.Generator], tuple[str, ...]]


def run(campaign: Campaign, good: Path, folder: Path, count: int) -> list[str]:
    """What was wrong with the first ``count`` inputs, a line each."""
    shutil.copytree(good, folder, symlinks=True)
    problems = []
    for number in range(count):
        for name in campaign.touched:
            shutil.copyfile(good / name, folder / name)
        words = campaign.spoil(folder, np.random.default_rng(number))
        wrong = strange(call(words, folder))
        if wrong:
            problems.append(f"{campaign.name}, input {number}: {'; '.join(wrong)}")
    return problems


def recipes(good: Path, folder: Path, count: int) -> list[str]:
    """What was wrong with ``count`` recipes of hypothesis: one, made as small as it could be."""
    shutil.copytree(good, folder, symlinks=True)

    @seed(0)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(_recipes())
    def check(tables: dict[str, Any]) -> None:
        (folder / "small.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
        wrong = strange(call(CHECK, folder))
        assert not wrong, f"{tables}: {'; '.join(wrong)}"

    try:
        check()
    except AssertionError as error:
        return [f"recipes: {error}"]
    return []


# ---------------------------------------------------------------- recipes

_KEYS = {
    "model": ("name", "weights", "classes", "in_channels"),
    "data": ("calibration", "evaluation", "validation", "preprocess", "synthesize"),
    "target": ("backend", "precision", "batch", "device", "threads", "options"),
    "export": ("precisions", "quantize", "uncertainty"),
    "timing": ("tolerance", "budget_s", "final_budget_s", "drift"),
    "method": ("name", "scorer", "select", "criterion"),
    "recover": ("name", "steps", "epochs", "batch", "lr", "loss", "milestones", "augment", "views"),
    "budget": ("latency_reduction", "latency_ms", "macs_reduction", "drop_blocks", "sparsity"),
    "run": ("name", "seed", "cache", "checkpoint_every"),
    "report": ("curves",),
    "gate": ("max_accuracy_drop", "min_agreement", "strict", "precision"),
}


def _recipes() -> st.SearchStrategy[dict[str, Any]]:
    """The good recipe with some of its keys replaced, added or taken away."""
    return st.lists(_changes(), min_size=1, max_size=4).map(_changed)


def _changes() -> st.SearchStrategy[tuple[str, str, Any]]:
    pairs = [(table, key) for table, keys in _KEYS.items() for key in keys]
    known = st.sampled_from(pairs)
    unknown = st.tuples(st.sampled_from([*_KEYS, "extra"]), _words())
    return st.tuples(st.one_of(known, known, known, unknown), st.one_of(_values(), st.none())).map(
        lambda change: (*change[0], change[1])
    )


def _words() -> st.SearchStrategy[str]:
    # A lone half of a pair is no text that a TOML file can hold.
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def _values() -> st.SearchStrategy[Any]:
    names = (
        "practise",
        "ekg",
        "mine:network",
        "photos",
        "many.npz",
        "fp32",
        "int8",
        "cpu",
        "auto",
        "synthesize",
    )
    plain = st.one_of(
        st.sampled_from(names),
        _words(),
        st.integers(-3, 40),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.booleans(),
        st.just(datetime.date(1979, 5, 27)),
    )
    keys = st.one_of(
        _words(), st.sampled_from(("source", "count", "seed", "skip", "labels", "size", "mean", "std"))
    )
    return st.one_of(plain, st.recursive(plain, lambda inner: _nested(inner, keys), max_leaves=6))


def _nested(inner: st.SearchStrategy[Any], keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4))


def _changed(changes: list[tuple[str, str, Any]]) -> dict[str, Any]:
    source = {"source": "many.npz"}
    preprocess = {"size": [16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    tables: dict[str, Any] = {
        "model": {"name": "mine:network", "weights": "weights.pth", "classes": 4},
        "data": {"calibration": {"source": "photos"}, "evaluation": source, "preprocess": preprocess},
        "method": {"name": "practise"},
        "budget": {"drop_blocks": 1},
    }
    for table, key, value in changes:
        entries = tables.setdefault(table, {})
        if value is None:
            entries.pop(key, None)
        else:
            entries[key] = value
    return tables


# ---------------------------------------------------------------- bytes and values


def _mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with some of them changed, cut out, doubled or cut off."""
    found = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        if not found:
            break
        at = int(rng.integers(len(found)))
        length = int(rng.integers(1, 9))
        kind = int(rng.integers(6))
        if kind == 0:
            found[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            found[at : at + length] = rng.bytes(length)
        elif kind == 2:
            found[at : at + length] = b"\xff" * length
        elif kind == 3:
            del found[at : at + length]
        elif kind == 4:
            found[at:at] = found[at : at + length]
        else:
            del found[at:]
    return bytes(found)


def _file(name: str, *words: str) -> Callable[[Path, np.random.Generator], tuple[str, ...]]:
    def spoil(folder: Path, rng: np.random.Generator) -> tuple[str, ...]:
        path = folder / name
        path.write_bytes(_mutated(path.read_bytes(), rng))
        return words

    return spoil


def _photographs(folder: Path, rng: np.random.Generator) -> tuple[str, ...]:
    """Every photograph of a kind, each spoilt in its own way."""
    kind = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "GIF")[int(rng.integers(6))]
    for label in CLASSES:
        for number in range(3):
            path = folder / "photos" / label / f"{number}.png"
            path.write_bytes(_mutated(encoded(kind), rng))
    return CHECK


def _arrays(folder: Path, rng: np.random.Generator) -> tuple[str, ...]:
    recipe('"photos"', '"many.npz"')(folder)
    return _file("many.npz", *CHECK)(folder, rng)


def _bare_weights(folder: Path, rng: np.random.Generator) -> tuple[str, ...]:
    return _file("weights.pth", "inspect", "small.toml")(folder, rng)


ODD = (None, True, 0, -1, 1, 2**31, 2**63, -(2**70), 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "x")


def _json(name: str, *calls: tuple[str, ...]) -> Callable[[Path, np.random.Generator], tuple[str, ...]]:
    """One value of a JSON file replaced by an odd one, taken away, or doubled."""

    def spoil(folder: Path, rng: np.random.Generator) -> tuple[str, ...]:
        path = folder / name
        whole = json.loads(path.read_text(encoding="utf-8"))
        inside = whole
        while True:
            keys: list[Any] = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            key = keys[int(rng.integers(len(keys)))]
            deeper = inside[key]
            if isinstance(deeper, dict | list) and deeper and rng.integers(8):
                inside = deeper
                continue
            break
        odd: list[Any] = [*ODD, [], {}, [deeper], [deeper, deeper]]
        choice = int(rng.integers(len(odd) + 1))
        if choice == len(odd):
            del inside[key]
        else:
            inside[key] = odd[choice]
        wrote(name, json.dumps(whole))(folder)
        return calls[int(rng.integers(len(calls)))]

    return spoil


_PHOTOS = tuple(f"photos/{label}/{number}.png" for label in CLASSES for number in range(3))

CAMPAIGNS = (
    Campaign("ONNX files", 12, 1500, ("model.onnx",), _file("model.onnx", *engines.BENCH)),
    Campaign("images", 4, 600, _PHOTOS, _photographs),
    Campaign("data sets", 5, 600, ("many.npz", "small.toml"), _arrays),
    Campaign("weights", 8, 1500, ("weights.pth",), _bare_weights),
    Campaign("reports, by values", 8, 800, ("run/report.json",), _json("run/report.json", GATE, COMPARE)),
    Campaign("reports, by bytes", 6, 600, ("run/report.json",), _file("run/report.json", *GATE)),
    Campaign(
        "manifests, by values",
        20,
        1500,
        (MANIFEST_PATH,),
        _json(MANIFEST_PATH, VERIFY, LOAD, ("run_engine",)),
    ),
    Campaign("manifests, by bytes", 10, 1000, (MANIFEST_PATH,), _file(MANIFEST_PATH, *VERIFY)),
)

RECIPES = 8, 1500
"""How many recipes hypothesis makes in the quick suite, and in the whole campaign."""
