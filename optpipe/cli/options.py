"""Arguments and options that several commands have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click


class Finite(click.FloatRange):
    """A number in a range, and none without an end or that is no number."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As click does; nan is in no range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


MOST = 65536
"""Images in a batch, and threads."""

PATH = click.Path(path_type=Path)
RECIPE = click.argument("recipe", type=PATH)
RUN = click.argument("run", type=PATH)
SET = click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Replace a value of the recipe."
)
NO_CODE = click.option(
    "--no-code", is_flag=True, help="Refuse a network or images of a module:function; import nothing."
)
DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
