"""What every command shares: one-line errors and warnings."""

import argparse
import difflib
import os
import sys
import time
import warnings
from contextlib import contextmanager


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations whose errors are one line, with the closest flag, and exit code 2."""

    def __init__(self, *arguments, **options):
        options = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | options
        super().__init__(*arguments, **options)

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
def user_errors():
    """Turn errors that a user can fix into one line on stderr and exit code 2.

    Of several processes the first one prints; the end of any ends the others, so that another one prints only where
    process 0 has nothing to say.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)
        if not isinstance(error, MainProcessFailed):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def one_line_warnings(show=lambda text: print(text, file=sys.stderr)):
    """Hand each UserWarning to ``show`` as one line, in the first of several processes."""
    earlier = warnings.showwarning

    def shown(message, category, *place, **where):
        if category is not UserWarning:
            earlier(message, category, *place, **where)
        elif os.environ.get("RANK", "0") == "0":
            show(f"warning: {message}")

    warnings.showwarning = shown
    try:
        yield
    finally:
        warnings.showwarning = earlier
