"""From the settings of `cfg` to a command line, and back."""

import argparse

from tools.console import Parser
from tools.training.plugins import load_plugin_of


def build_parser(config, description):
    """The argparse parser of a config class; flags that are not given stay out of its namespace."""
    parser = Parser(description=description, usage="%(prog)s [options]", argument_default=argparse.SUPPRESS)
    groups = {}
    for setting in config.settings_of_all().values():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        groups[setting.group].add_argument(setting.flag, **_argument(setting))
    return parser


def _argument(setting):
    shown = setting.help + (f", {setting.allowed}" if setting.allowed else "")
    if setting.default is False:
        return {"action": "store_true", "help": shown}
    if setting.default is True:  # ablations: on unless switched off
        return {"action": "store_false", "dest": setting.name, "help": shown}
    if setting.default is not None:
        shown += f" (default: {setting.default})"
    if setting.choices:
        return {"choices": setting.choices, "help": shown}
    return {"type": _reader(setting), "metavar": setting.flag[2:].replace("-", "_").upper(), "help": shown}


def _reader(setting):
    def read(text):
        try:
            return setting.type(text)
        except ValueError as error:
            if setting.type in (int, float):
                kind = "a whole number" if setting.type is int else "a number"
                raise argparse.ArgumentTypeError(f"expected {kind}, got {text!r}") from None
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def parse(config, description, argv=None):
    """Read a command line into ``config``: defaults, then the data set's recipe, then what was typed.

    Parameters
    ----------
    config : type
        A subclass of `cfg.Config`.
    description : str
        Head of ``--help``.
    argv : list of str, optional
        Instead of ``sys.argv[1:]``.

    Raises
    ------
    ValueError
        For a value out of range; a malformed command line ends the process with one line and exit code 2.
    """
    load_plugin_of(argv)
    return config.of(**vars(build_parser(config, description).parse_args(argv)))
