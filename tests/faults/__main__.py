"""``make faults``: run the campaigns, and write what each came to into the docs.

python -m faults                 all campaigns
python -m faults inputs          those that are named
python -m faults --tenth         a tenth of each, and nothing is written
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from pathlib import Path
from typing import cast

from faults import report

CAMPAIGNS = (
    "inputs",
    "kills",
    "rot",
    "disk",
    "crowd",
    "memory",
    "soak",
)
"""Modules of this package that have ``run``, in the order of the page."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"of {', '.join(CAMPAIGNS)}")
    parser.add_argument("--tenth", action="store_true", help="a tenth of each, and nothing is written")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.campaigns if name not in CAMPAIGNS]
    if unknown:
        parser.error(f"no campaign {unknown[0]}: there are {', '.join(CAMPAIGNS)}")
    wrong = 0
    for name in arguments.campaigns or CAMPAIGNS:
        campaign = cast(report.Campaign, importlib.import_module(f"faults.{name}"))
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = campaign.run(Path(folder).resolve(), 10 if arguments.tenth else 1, _tell)
        for problem in found.problems:
            _tell(f"  {problem}")
        _tell(f"{name}: {len(found.problems)} wrong, {time.monotonic() - begun:.0f} s")
        wrong += len(found.problems)
        if not found.problems and not arguments.tenth:
            report.write(found.section)
    if wrong:
        raise SystemExit(f"{wrong} cases did not end as they should")


def _tell(line: str) -> None:
    print(line, flush=True)


main()
