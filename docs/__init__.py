"""The documentation, and what makes its generated parts: run as ``python -m docs.MODULE``."""
