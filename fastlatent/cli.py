"""What every command line of the package shares: how errors end it, and how its words are told apart.

`python -m fastlatent.<command>` ends in `run_command(main)`. A UserError is one sentence on stderr and exit code 2, a Failed is
one and exit code 1.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NoReturn

from fastlatent import __version__
from fastlatent.config.layers import is_override, recipes
from fastlatent.errors import Failed, UserError
from fastlatent.output import Output

USAGE = "python -m fastlatent.{command} RECIPE | FILE.yaml ... [key=value ...]"


def run_command(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Call `main` with the command's words and exit with what it returns: 2 after a UserError, 1 after a Failed and 130 after
    Ctrl-C.

    A reader of its output who has seen enough (`| head`) stops nothing; an output that takes nothing more is a UserError.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a run must not end because its log cannot spell a character
    output = None if sys.stdout is None else Output(sys.stdout)  # None where the process was started without one
    try:
        with redirect_stdout(output):
            try:
                code = _call(main, argv)
            finally:
                if output is not None:
                    output.flush()  # what is left would be written when Python exits
        if output is not None and output.error is not None and not isinstance(output.error, BrokenPipeError):
            raise UserError(f"the output cannot be written ({output.error.strerror})")
    except (UserError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _call(main: Callable[[list[str]], int | None], argv: Sequence[str] | None) -> int | str | None:
    """What the command exits with, if it says so itself as for --help or returns it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if odd := next((word for word in argv if not _is_text(word)), None):
        raise UserError(f"{odd!r}: wanted words in UTF-8")
    try:
        return main(argv)
    except SystemExit as exit_:
        return exit_.code


def _is_text(word: str) -> bool:
    """False where bytes of a word could not be decoded."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_writable(what: str, path: Path) -> None:
    """UserError unless a file or folder can be made at `path`. Leaves nothing behind but the folders above it."""
    if path.is_dir():
        raise UserError(f"{what}: {path} is a folder, wanted a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be written ({error.strerror})") from None


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, like everybody else's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_args(argv: Sequence[str], command: str = "train") -> tuple[list[str], list[str]]:
    """The layers (recipes, files) and the overrides of a training command, train or sft.

    Prints and exits for --help and --version; without any words prints usage and recipes to stderr and exits with 2.
    """
    parser = Parser(prog=f"python -m fastlatent.{command}", add_help=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="version", version=f"fastlatent {__version__}")
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}; options are written without dashes, as in optim.lr=1e-6")
    if args.help:
        from fastlatent.config.helptext import help_text  # imports every family member

        print(f"{usage(command)}\n{help_text()}")
        sys.exit(0)
    if not args.words:
        print(usage(command), file=sys.stderr)
        sys.exit(2)
    return [w for w in args.words if not is_override(w)], [w for w in args.words if is_override(w)]


def usage(command: str = "train") -> str:
    """How to call it, and what recipes there are."""
    known = recipes()
    width = max(map(len, known))
    lines = [f"  {name:{width}}  {description}" for name, description in known.items()]
    return "\n".join([f"usage: {USAGE.format(command=command)}", "", "recipes:", *lines, "", "--help lists every option."])
