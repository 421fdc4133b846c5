"""Parts of a user's own: a Python file that registers a mapping, input VR, backbone or data set.

A plugin runs only where a command names it with ``--plugin FILE``: a run folder, which may come from anywhere, can
ask for one but never start it.
"""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

from tools.console import Parser

HELP = "the Python file of your own that the run was trained with"


def load_plugin(path):
    """Run a plugin; again in the same process where its file has changed, as in a notebook.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file, or it fails; in one line.
    """
    path = Path(os.path.realpath(path))  # never fails, as resolve() does where links form a loop
    name = f"plugin {path}"
    if not path.is_file():
        raise FileNotFoundError(f"--plugin {path}: no such file")
    content = plugin_fingerprint(path)
    if getattr(sys.modules.get(name), "content_when_run", None) == content:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ValueError(f"--plugin {path}: expected a Python file, with the suffix .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    module.content_when_run = content
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        del sys.modules[name]
        raise ValueError(f"--plugin {path} failed: {type(error).__name__}: {error}") from error


def plugin_fingerprint(path):
    """What a run remembers of its plugin, beside the other content that it reads; {} without one."""
    return {} if path is None else {"plugin": hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}


def load_plugin_of(argv):
    """Run the plugin that a command line names, before its other flags are read: it may declare some."""
    parser = Parser(add_help=False)
    parser.add_argument("--plugin")
    known, _ = parser.parse_known_args(argv)
    if known.plugin is not None:
        load_plugin(known.plugin)


def require_plugin(recorded, given, folder):
    """Run the plugin that ``folder`` was trained with, if the user named one.

    Parameters
    ----------
    recorded : str or None
        Of the run's ``config.json``.
    given : str or None
        Of the command line.

    Raises
    ------
    ValueError
        The run needs one and none is given.
    """
    if given is not None:
        load_plugin(given)
    elif recorded is not None:
        raise ValueError(f"{folder} was trained with --plugin {recorded}; give it again (its code will run)")
