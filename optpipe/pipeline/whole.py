"""Whether the files of a finished stage are still those that it left, and what a stage is made from.

A stage whose files were lost or damaged is done again, and so is one that was made from something else than
what the stages before it now say.
"""

from __future__ import annotations

from pathlib import Path

from optpipe import seals, store
from optpipe.deploy.bundle import MANIFEST, open_bundle
from optpipe.errors import UsageError
from optpipe.results import Analyzed, Benchmarked, Exported, Ingested, Pruned, Recovered
from optpipe.types import Choice

Result = Ingested | Analyzed | Pruned | Recovered | Exported | Benchmarked


def damaged(opened: store.Run, result: Result) -> Path | None:
    """The first file of a finished stage that is not as the stage left it; None where all are."""
    match result:
        case Analyzed(choice=choice):
            starts = [start for start in (choice.start, *(one.start for one in choice.members)) if start]
            paths = [opened.weights(start.key) for start in starts]
            return next((path for path in paths if not seals.is_whole(path)), None)
        case Pruned(weights_sha256=sha256):
            return _unless(opened.stage_folder("prune") / store.WEIGHTS, sha256)
        case Recovered(weights_sha256=sha256):
            return _unless(opened.stage_folder("recover") / store.WEIGHTS, sha256)
        case Exported():
            return _exported(opened, result)
        case _:
            return None


def _exported(opened: store.Run, exported: Exported) -> Path | None:
    folder = opened.folder / "deploy"
    try:
        _, manifest = open_bundle(folder)
    except UsageError:
        return folder / MANIFEST
    recorded = {name: file.sha256 for name, file in manifest.files.items()}
    if recorded != exported.sha256:
        return folder / MANIFEST
    found = (_unless(folder / name, sha256) for name, sha256 in exported.sha256.items())
    joined = exported.ensemble
    priced = None
    if joined is not None and joined.engine:
        priced = _unless(opened.folder / joined.engine, joined.engine_sha256)
    return next((path for path in found if path is not None), priced)


def _unless(path: Path, sha256: str) -> Path | None:
    """The path, unless its file has that sha256; an older optpipe recorded none."""
    if path.is_file() and (not sha256 or store.file_sha256(path) == sha256):
        return None
    return path


def logits_are_whole(opened: store.Run, ingested: Ingested) -> bool:
    """Whether the original's logits are those that were stored."""
    return _unless(opened.stage_folder("ingest") / "logits.npy", ingested.logits_sha256) is None


def ingest_is_whole(opened: store.Run, ingested: Ingested) -> bool:
    """Whether the original's engine is the one that was built, and the logits those that it gave."""
    engine = _unless(opened.folder / ingested.engine, ingested.engine_sha256)
    return engine is None and logits_are_whole(opened, ingested)


def of_choice(choice: Choice) -> str:
    """sha256 of what the stages after a search are made from; tables are but shown."""
    return store.digest(choice.plan, choice.recover, choice.start, *choice.interim, *choice.members)


def of_recovered(choice: Choice, recovered: Recovered) -> str:
    """sha256 of what an export is made from."""
    return store.digest(of_choice(choice), recovered.weights_sha256)


def of_exported(choice: Choice, exported: Exported) -> str:
    """sha256 of what a benchmark is made from."""
    joined = exported.ensemble
    return store.digest(of_choice(choice), exported.sha256, "" if joined is None else joined.engine_sha256)
