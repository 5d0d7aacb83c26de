"""``make faults``: run the whole catalogue and every campaign, and write what came out to the docs.

python -m faults            the whole campaigns
python -m faults --tenth    a tenth of each, and nothing is written
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from faults import campaigns, cases, report, workspace
from faults.catalogue import CATALOGUE


def main() -> None:
    share = 10 if "--tenth" in sys.argv[1:] else 1
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        good = root / "good"
        good.mkdir()
        workspace.make(good)
        for group, listed in CATALOGUE.items():
            wrong = [
                f"{case.name}: {'; '.join(found)}"
                for number, case in enumerate(listed)
                if (found := cases.faults(case, cases.run(case, good, root / f"{group}-{number}")))
            ]
            _tell(group, len(listed), wrong, problems)
        count = campaigns.RECIPES[1] // share
        _tell("recipes of a generator", count, campaigns.recipes(good, root / "recipes", count), problems)
        for one in campaigns.CAMPAIGNS:
            count = one.whole // share
            _tell(one.name, count, campaigns.run(one, good, root / one.name, count), problems)
    if problems:
        sys.exit(f"{len(problems)} inputs did not end as they should")
    if share == 1:
        report.write()


def _tell(what: str, count: int, wrong: list[str], problems: list[str]) -> None:
    print(f"{what}: {count} inputs, {len(wrong)} wrong", flush=True)
    for line in wrong:
        print(f"  {line}", flush=True)
    problems += wrong


main()
