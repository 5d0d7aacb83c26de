"""``optpipe sweep``: several recipes at several latency budgets on one model, and what came of them together.

Every recipe at every budget is an ordinary run in a folder of its own. The runs have each other's answers by
one cache, and by it the ingest of their common original and what they have trained; what comes out is held
side by side, as ``optpipe compare`` does.
"""

from optpipe.sweep.planning import Entry, Sweep, plan, reductions
from optpipe.sweep.running import Outcome, begun, take, waiting
from optpipe.sweep.summary import Best, Line, Summary, summarise
from optpipe.sweep.telling import as_json, as_markdown, figure, told, write

__all__ = [
    "Best",
    "Entry",
    "Line",
    "Outcome",
    "Summary",
    "Sweep",
    "as_json",
    "as_markdown",
    "begun",
    "figure",
    "plan",
    "reductions",
    "summarise",
    "take",
    "told",
    "waiting",
    "write",
]
