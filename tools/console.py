"""What commands share: one-line errors and warnings, and CSV."""

import argparse
import csv
import difflib
import io
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager

VERSION = "2.0.0"  # as in CHANGELOG.md


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations whose errors are one line, with the closest flag, and exit code 2."""

    def __init__(self, *arguments, **options):
        options = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | options
        super().__init__(*arguments, **options)
        self.add_argument("--version", action="version", version=VERSION)

    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown.split()[0].split("=")[0], flags, n=1)
            message += f" (did you mean {close[0]}?)" if close else "; --help lists all"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


class MainProcessFailed(ValueError):
    """Process 0 could not do what the others waited for; it says why itself."""


@contextmanager
def no_traceback_when_stopped():
    """End quietly on Ctrl-C (exit code 130), and where stdout is a pipe that nobody reads, as of ``| head`` (141)."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # by tools/__init__.py, while it imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where the shell closed it, as by >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # but in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does with names that are not UTF-8
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # what is left in the buffer would fail at the end once more
            os.dup2(nowhere.fileno(), 1)
        sys.exit(128 + signal.SIGPIPE)


@contextmanager
def user_errors():
    """Turn errors that a user can fix into one line on stderr and exit code 2, and end quietly where stopped.

    Also a decorator for a whole command. Of several processes only process 0 prints the line, unless the error is
    another one's alone: that one waits, and is ended before it prints where process 0 has failed as well.
    """
    try:
        with no_traceback_when_stopped():
            yield
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)
        if not isinstance(error, MainProcessFailed):
            raw = isinstance(error, OSError) and error.strerror and error.filename
            text = f"{error.filename}: {error.strerror}" if raw else str(error)
            _print_line("error", text)
        sys.exit(2)


@contextmanager
def one_line_warnings(show=lambda text: print(text, file=sys.stderr)):
    """Hand each UserWarning to ``show`` as one line, once, in the first of several processes."""
    earlier, told = warnings.showwarning, set()

    def shown(message, category, *place, **where):
        if category is not UserWarning:
            earlier(message, category, *place, **where)
        elif os.environ.get("RANK", "0") == "0" and str(message) not in told:
            told.add(str(message))
            show(f"warning: {message}")

    warnings.showwarning = shown
    try:
        yield
    finally:
        warnings.showwarning = earlier


def warn(message):
    """Print a warning as one line on stderr."""
    _print_line("warning", message)


def as_csv(rows):
    """Rows of values as a CSV text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _print_line(kind, message):
    from data.files import printable  # not before there is something to say: the parser starts without torch

    print(f"{kind}: {printable(' '.join(str(message).split()))}", file=sys.stderr)
