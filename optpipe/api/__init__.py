"""The calls that Python programs make; the package ``optpipe`` itself hands them on.

Both calls are the command line's own pipeline, with the recipe's words: what they write, how they resume and
what they refuse is the same.
"""

from optpipe.api.inputs import Images
from optpipe.api.optimizing import optimize
from optpipe.api.result import Result
from optpipe.api.running import run

__all__ = ["Images", "Result", "optimize", "run"]
