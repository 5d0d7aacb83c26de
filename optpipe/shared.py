"""A place that all machines of a run reach, by fsspec, where its answers lie for the workers.

Whoever has computed an answer gives its files; whoever needs one that it does not have takes them. A file is
given under another name and moved to its own, so that nobody takes half of one; it never changes again.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe.errors import MissingError, OptpipeError, RunError, UsageError
from optpipe.files import replacing

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


class SharedStore:
    """The files of one run at an address such as ``s3://bucket/folder``, under the run's own name."""

    def __init__(self, address: str, run: str) -> None:
        """``run`` tells runs at one address apart.

        Raises:
            UsageError: there is no such kind of address.
            MissingError: the package for that kind is not installed.
        """
        self.address = address
        self.run = run
        self._files, root = _opened(address)
        self._root = f"{root.rstrip('/')}/{run}"

    def give(self, name: str, path: Path) -> None:
        """Let all have a file under a name, a relative path; the same name is the same content.

        Raises:
            RunError: it cannot be written there.
        """
        target = f"{self._root}/{name}"
        passing = f"{target}.{secrets.token_hex(6)}.tmp"
        with self._failing("written"):
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), passing)
            self._files.mv(passing, target)

    def take(self, name: str, path: Path) -> bool:
        """Fetch what was given under a name, if anything was; whether there is such a file.

        Raises:
            RunError: the address cannot be read, or the disk is full.
        """
        with self._failing("read"):
            if not self._files.exists(f"{self._root}/{name}"):
                return False
            with replacing(path) as temporary:
                self._files.get_file(f"{self._root}/{name}", str(temporary))
            return True

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Whatever a kind of address raises (of its own, too), in one line."""
        try:
            yield
        except OptpipeError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise RunError(
                f'[run] store = "{self.address}": cannot be {what}: {said}; run again once it can: it goes '
                "on from here"
            ) from error


def _opened(address: str) -> tuple[AbstractFileSystem, str]:
    from fsspec.core import url_to_fs

    try:
        found, root = url_to_fs(address)
    except ImportError as error:
        said = " ".join(str(error).split())
        raise MissingError(f'[run] store = "{address}": {said}; install that on all machines') from None
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise UsageError(f'[run] store = "{address}": {said}') from None
    return found, str(root)
