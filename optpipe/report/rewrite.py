"""A report made again from its report.json, when what renders it has changed or files of it are lost."""

from __future__ import annotations

from pathlib import Path

from optpipe.errors import UsageError
from optpipe.report import build


def rewrite(run: Path) -> Path:
    """Write all that shows a finished run's report anew, report.json left as it is; the page to look at.

    Raises:
        UsageError: the run has no report, or it is of another version.
        RunError: the folder cannot be written.
    """
    if run.is_file() and run.name != "report.json":
        raise UsageError(f"{run}: is no run; name its folder or the report.json in it")
    report = build.read(run)
    folder = run.parent if run.is_file() else run
    build.show(folder, report)
    return folder / "report.html"
