"""From a grid of settings to cells: the runs that it asks for, each with its command line and run folder.

A grid maps settings of the scripts to a value or a list of values; its cells are all combinations. ``script`` names
one or several of the scripts, and ``variants`` is a list of smaller grids, each of which is joined with the rest::

    script: train_vm.py
    dataset: [flowers102, dtd]
    seed: [0, 1, 2]
    variants:
      - mapping: [blm, blmpp]
      - {mapping: blmpp, topk: false}
"""

import difflib
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from cfg import CONFIGS, Config
from tools.training.command_line import parse
from tools.training.numerics import choose_device, choose_precision

ROOT = Path(__file__).parents[2]
SCRIPTS = {f"train_{config.kind}.py": config for config in CONFIGS}


def known_settings():
    """The settings of all scripts together, a dict of name to `mapping.Setting`; those of a plugin included."""
    described = {}
    for setting in (setting for config in CONFIGS for setting in config.settings_of_all().values()):
        known = described.get(setting.name, setting)
        both = known.help if known.help == setting.help else f"{known.help}; CLIP: {setting.help}"
        described[setting.name] = replace(setting, help=both)
    return described


@dataclass(frozen=True)
class Cell:
    """One run of a script.

    Attributes
    ----------
    script : str
    arguments : tuple of str
        Its command line.
    cfg : cfg.Config
        Its settings.
    """

    script: str
    arguments: tuple[str, ...]
    cfg: Config

    @property
    def folder(self):
        """The run folder."""
        return self.cfg.folder

    @property
    def name(self):
        """Run folder below the results path: unique within a grid."""
        return self.folder.relative_to(self.cfg.results_path).as_posix()

    @property
    def log(self):
        """Where the output of the script goes."""
        return Path(self.cfg.results_path) / "logs" / f"{self.name}.log"

    @property
    def command(self):
        return [sys.executable, str(ROOT / self.script), *self.arguments]


class _Loader(yaml.SafeLoader):
    """Safe YAML that does not take a key twice."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        double = next((key for key in keys if keys.count(key) > 1), None)
        if double is not None:
            raise yaml.MarkedYAMLError(problem=f"key {double!r} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_grid(path):
    """The grid in a YAML file, a dict of setting to list of values.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file, or no grid; an unknown setting is named with the closest one.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; expected a YAML file such as those in tools/sweep/grids")
    try:
        grid = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{path}{place} is no valid YAML ({reason})") from None
    try:
        return normalise(grid)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def normalise(grid, allow_variants=True):
    """A grid with underscores in its keys and lists for values; ValueError where something in it is unknown."""
    if not isinstance(grid, dict):
        raise ValueError(f"expected settings and their values, got {type(grid).__name__}")
    settings, result = known_settings(), {}
    known = ["script", *settings, *(["variants"] if allow_variants else [])]
    for key, value in grid.items():
        name = str(key).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(known)}"
            raise ValueError(f"unknown setting {str(key)!r}; {hint}")
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ValueError(f"{key} has no values")
        if name == "variants":
            result[name] = [normalise(variant, allow_variants=False) for variant in values]
            continue
        if any(isinstance(each, (dict, list)) for each in values):
            raise ValueError(f"{key} takes a value or a list of values, got {value!r}")
        if name == "script":
            for script in values:
                if script not in SCRIPTS:
                    raise ValueError(f"unknown script {script!r}; allowed are {', '.join(SCRIPTS)}")
        elif settings[name].affects != "result" and len(values) > 1:
            raise ValueError(f"{key} takes one value: it does not tell runs apart")
        elif isinstance(settings[name].default, bool) and any(not isinstance(each, bool) for each in values):
            raise ValueError(f"{key} takes true or false, got {value!r}")
        result[name] = values
    return result


def override(grid, values):
    """The grid with ``values`` (a grid as well) in place of its own, also within its variants."""
    variants = [{k: v for k, v in variant.items() if k not in values} for variant in grid.get("variants", [{}])]
    return {**grid, **values, "variants": variants}


def expand(grid, elsewhere=False):
    """The cells of a grid, in its order, each once.

    Parameters
    ----------
    grid : dict
        As `read_grid` gives it.
    elsewhere : bool
        The runs are for another machine, whose devices this one need not have.

    Returns
    -------
    list of Cell

    Raises
    ------
    ValueError
        A value is not allowed. A value that a script's command line would refuse ends the process as it does there.
    """
    rest = {key: values for key, values in grid.items() if key != "variants"}
    cells = {}
    for variant in grid.get("variants", [{}]):
        axes = {"script": ["train_vm.py"], **rest, **variant}
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            cell = _cell(chosen.pop("script"), chosen)
            if not elsewhere:
                choose_precision(cell.cfg.precision, choose_device(cell.cfg.device))
            first = cells.setdefault(cell.folder, cell)
            ours, theirs = cell.cfg.that_affect("result"), first.cfg.that_affect("result")
            for name in ours:
                if ours[name] != theirs.get(name):
                    raise ValueError(
                        f"{name} {theirs.get(name)} and {ours[name]} share the run folder {cell.folder}; give "
                        "them names of their own, or each a --results-path"
                    )
    return list(cells.values())


def _cell(script, chosen):
    """One run of a script, its settings read as the script will read them."""
    known = SCRIPTS[script].settings_of_all()
    other = sorted(chosen.keys() - known.keys())
    if other:
        raise ValueError(f"{script} has no setting {other[0]!r}")
    arguments = []
    for name, value in chosen.items():  # None stands for the script's own default
        flag, default = known[name].flag, known[name].default
        if isinstance(default, bool):
            arguments += [flag] if value is not None and value != default else []
        elif value is not None:
            arguments += [flag, str(value)]
    return Cell(script, tuple(arguments), parse(SCRIPTS[script], "", arguments))
