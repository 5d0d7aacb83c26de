"""The command line: parses, calls, prints. The only room that imports click; torch is imported late.

Exit codes: 0 fine, 1 gate not met, 2 bad usage or recipe, 3 something missing on this machine, 4 the run
failed, 130 interrupted, 143 ended by SIGTERM. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from optpipe import __version__, interruption, locks
from optpipe.cli import finished, machine, recipes, sweeping
from optpipe.cli.interrupted import last_words
from optpipe.errors import OptpipeError, lacks_memory

LONGEST = 1200
"""Characters of an error; what is left out is in its middle."""


class Commands(click.Group):
    """A group whose unknown commands name the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; an unknown word gets a suggestion."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not near or near[0] in error.message:
                raise
            raise click.UsageError(f"{error.message} Did you mean '{near[0]}'?", ctx) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="optpipe")
def cli() -> None:
    """Make a trained vision network faster on your device, and know what it costs in accuracy.

    Exit codes: 0 fine, 1 gate not met, 2 bad usage or recipe, 3 something missing on this machine,
    4 the run failed, 130 interrupted, 143 ended by SIGTERM.
    """


for command in (
    *(recipes.run, sweeping.sweep, recipes.init, recipes.inspect),
    *(finished.gate, finished.compare, finished.rewrite_report, finished.verify, finished.landscape),
    *(machine.bench, machine.rebuild, machine.doctor),
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: runs a command and turns every failure into one line and its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Training threads that wait by spinning take the processor from the engines that are timed, and, on a
    # machine that others use too, from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    watching = interruption.Watch(lambda: last_words(words, interruption.folder()))
    with watching as watch, locks.telling(lambda line: click.echo(line, err=True)):
        try:
            _carry_out(words)
        except BaseException:
            # Libraries turn an interrupt into errors of their own.
            if watch.signal is None:
                raise
            click.echo(last_words(words, interruption.folder()), err=True)
            if arguments is None:
                watch.end()
            sys.exit(watch.exit_code)


def _carry_out(words: Sequence[str]) -> None:
    """Run a command; it ends by an exit code for whatever goes wrong."""
    try:
        cli.main(args=list(words), prog_name="optpipe", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except OptpipeError as error:
        _fail(f"Error: {error}", error.exit_code, words)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _fail(_unforeseen(error), 4, words)


def _unforeseen(error: Exception) -> str:
    """What is said of an error that is none of optpipe's own."""
    if lacks_memory(error):
        return "Error: this takes more memory than there is; --debug shows where"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"Error: {where}{error.strerror or error}"
    text = " ".join(str(error).split())[:300]
    return f"Error: unexpected {type(error).__name__}: {text} (--debug shows where)"


def _fail(message: str, code: int, words: Sequence[str]) -> None:
    if "--debug" in words:
        traceback.print_exc()
    click.echo(_one_line(message), err=True)
    sys.exit(code)


def _one_line(message: str) -> str:
    """A message as a terminal can show it, whatever names and values of a user's files are in it."""
    joined = " ".join(message.split())
    shown = "".join(one if one.isprintable() else repr(one)[1:-1] for one in joined)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 2 :]}"
