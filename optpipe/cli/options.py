"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)
RECIPE = click.argument("recipe", type=PATH)
RUN = click.argument("run", type=PATH)
SET = click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Replace a value of the recipe."
)
DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
