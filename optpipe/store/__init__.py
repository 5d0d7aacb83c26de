"""Run folders: atomic writes, full-digest keys, resume, and one process at a time.

A file that is written last, through a temporary file, fsync and ``os.replace``, says by its existence that
its stage or trial is done. Whatever else a killed process left behind is overwritten.
"""

from optpipe.store.answers import (
    digest,
    file_sha256,
    from_json,
    read_answer,
    source_of,
    to_json,
    to_sealed,
)
from optpipe.store.names import CACHE, RECIPE, SHARED, STAGES, WEIGHTS
from optpipe.store.opening import locked, move_aside, open_run, refuse_other
from optpipe.store.run import Run
from optpipe.tensors import DiskCheckpoint, load_tensors, save_tensors

__all__ = [
    "CACHE",
    "RECIPE",
    "SHARED",
    "STAGES",
    "WEIGHTS",
    "DiskCheckpoint",
    "Run",
    "digest",
    "file_sha256",
    "from_json",
    "load_tensors",
    "locked",
    "move_aside",
    "open_run",
    "read_answer",
    "refuse_other",
    "save_tensors",
    "source_of",
    "to_json",
    "to_sealed",
]
