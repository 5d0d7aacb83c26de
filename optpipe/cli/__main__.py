"""``python -m optpipe.cli``: the console script."""

from optpipe.cli import main

main()
