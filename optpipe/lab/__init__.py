"""Answers a search's requests: applies the plan, tunes, exports, builds an engine, times it, stores it.

A search is driven by :func:`drive`; run again after a kill, it is replayed against the stored answers and
goes on where it was.
"""

from optpipe.lab.answers import Lab
from optpipe.lab.names import plan_name
from optpipe.lab.nesting import begin, further
from optpipe.lab.pool import Pool
from optpipe.lab.replay import drive
from optpipe.lab.subject import Clock, Resolutions, Subject, refuse_other_size

__all__ = [
    "Clock",
    "Lab",
    "Pool",
    "Resolutions",
    "Subject",
    "begin",
    "drive",
    "further",
    "plan_name",
    "refuse_other_size",
]
