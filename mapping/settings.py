"""What a setting is: its name, default, meaning, range and effect, described once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _anything(value):
    return True


@dataclass(frozen=True)
class Setting:
    """A setting that a user may change, on the command line or in Python.

    Attributes
    ----------
    name : str
        As in Python; the command line has it with dashes.
    default : object
    help : str
        What it means, in one line that needs no other.
    allowed : str
        The range in words, to follow "must be": "0 or more".
    valid : callable
        Whether a value is in the range; an exception from it counts as no.
    choices : tuple
        The values there are; empty if `valid` alone decides.
    type : callable
        Turns the text of a command line into a value (default: the type of `default`, of None: str).
    affects : {"result", "rounding", "place"}
        What another value changes: what comes out, its last digits only, or nothing but where the work is done.
    group : str
        Its heading in ``--help``.
    """

    name: str
    default: Any
    help: str
    allowed: str = ""
    valid: Callable[[Any], bool] = _anything
    choices: tuple = ()
    type: Callable[[str], Any] | None = None
    affects: str = "result"
    group: str = "output mapping"

    def __post_init__(self):
        assert self.affects in ("result", "rounding", "place"), self.affects
        if self.type is None:
            object.__setattr__(self, "type", str if self.default is None else type(self.default))

    @property
    def flag(self):
        """Its flag, ``--top-k``; that of a switch which is on by default turns it off, ``--no-top-k``."""
        return ("--no-" if self.default is True else "--") + self.name.replace("_", "-")

    def check(self, value):
        """Make sure that a value is allowed; None is where it is the default.

        Raises
        ------
        ValueError
            It is not; the message gives the flag, what is allowed and the value.
        """
        if value is None and self.default is None:
            return
        allowed, holds = self.allowed, False
        try:
            if isinstance(self.default, bool):
                allowed, holds = allowed or "True or False", isinstance(value, bool)
            elif self.choices:
                allowed, holds = allowed or f"one of {', '.join(map(str, self.choices))}", value in self.choices
            elif self.type in (int, float):  # a number, and a whole one where it must be
                holds = self.type(str(value)) == value
            else:
                holds = True
            holds = holds and bool(self.valid(value))
        except (TypeError, ValueError):
            holds = False
        if not holds:
            raise ValueError(f"{self.flag} must be {allowed}, got {value}")
