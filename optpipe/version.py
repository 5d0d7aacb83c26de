"""optpipe's version, for every room: importing this imports nothing."""

__version__ = "0.1.0"
