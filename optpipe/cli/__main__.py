"""``python -m optpipe.cli``: the console script."""

from optpipe.cli import main

if __name__ == "__main__":
    main()
