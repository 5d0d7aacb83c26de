"""Running a search to its end, with what is stored answering again."""

from __future__ import annotations

from optpipe.lab.answers import Lab
from optpipe.types import Choice, Search


def drive(search: Search, lab: Lab) -> Choice:
    """Run a search to its end, answering what it yields."""
    try:
        requests = next(search)
        while True:
            requests = search.send(lab.answer(requests))
    except StopIteration as stop:
        choice = stop.value
        assert isinstance(choice, Choice)
        return choice
