"""The six stages, straight-line: ingest, analyze, prune, recover, export, benchmark.

Each stage is a function of the prepared :class:`~optpipe.preparation.Setup` and of the results before it;
what it returns is stored when it is complete and read back when the run is resumed.
"""

from optpipe.pipeline.run import check, run

__all__ = ["check", "run"]
