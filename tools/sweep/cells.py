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
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from cfg import VLMConfig, VMConfig, VMFastConfig, parse
from tools.training.run_folder import FREE_SETTINGS, run_folder

ROOT = Path(__file__).parents[2]
SCRIPTS = {f"train_{config.kind}.py": config for config in (VMConfig, VLMConfig, VMFastConfig)}
FIELDS = {field.name: field for config in SCRIPTS.values() for field in fields(config)}  # of all scripts together
MACHINE = ("device", "precision")  # what can be checked only on the machine that a run is for


@dataclass(frozen=True)
class Cell:
    """One run of a script.

    Attributes
    ----------
    script : str
    arguments : tuple of str
        Its command line.
    settings : dict
        Every setting, as the run's ``config.json`` will have them.
    base : Path
        ``--results-path`` of the grid; that of the cell is in its settings, and may lie below.
    """

    script: str
    arguments: tuple[str, ...]
    settings: dict
    base: Path

    @property
    def kind(self):
        return SCRIPTS[self.script].kind

    @property
    def folder(self):
        """The run folder."""
        return run_folder(self.settings["results_path"], self.kind, self.settings)

    @property
    def name(self):
        """Run folder below the grid's results path: unique within a grid."""
        return self.folder.relative_to(self.base).as_posix()

    @property
    def log(self):
        """Where the output of the script goes."""
        return self.base / "logs" / f"{self.name}.log"

    @property
    def command(self):
        return [sys.executable, str(ROOT / self.script), *self.arguments]


class _Loader(yaml.SafeLoader):
    """Safe YAML that does not take a key twice."""


def _mapping_without_doubles(loader, node):
    keys = [key.value for key, _ in node.value]
    double = next((key for key in keys if keys.count(key) > 1), None)
    if double is not None:
        raise yaml.MarkedYAMLError(problem=f"key {double!r} is there twice", problem_mark=node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_doubles)


def read_grid(path):
    """The grid in a YAML file, a dict of setting to list of values.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file, or no grid; an unknown setting is named with the closest one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a YAML file such as those in tools/sweep/grids")
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
    known, result = ["script", *FIELDS, *(["variants"] if allow_variants else [])], {}
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
        if name in FREE_SETTINGS and len(values) > 1:
            raise ValueError(f"{key} takes one value: it does not tell runs apart")
        if name == "script":
            _check_scripts(values)
        elif isinstance(FIELDS[name].default, bool) and any(not isinstance(each, bool) for each in values):
            raise ValueError(f"{key} takes true or false, got {value!r}")
        result[name] = values
    return result


def override(grid, values):
    """The grid with ``values`` (a grid as well) in place of its own, also within its variants."""
    variants = [{k: v for k, v in variant.items() if k not in values} for variant in grid.get("variants", [{}])]
    return {**grid, **values, "variants": variants}


def _check_scripts(values):
    for script in values:
        if script not in SCRIPTS:
            raise ValueError(f"unknown script {script!r}; allowed are {', '.join(SCRIPTS)}")


def expand(grid, elsewhere=False):
    """The cells of a grid, in its order, each once.

    Where several would share a run folder, since they differ in a setting that is no part of its name, each gets a
    results path of its own: ``<results-path>/<setting>=<value>`` for every such setting, but for values that are the
    default, so that such runs are found where other grids look for them.

    Parameters
    ----------
    grid : dict
        As `read_grid` gives it.
    elsewhere : bool
        The runs are for another machine: ``device`` and ``precision`` are taken without looking at this one.

    Returns
    -------
    cells : list of Cell
    separated : list of str
        The settings that made for results paths of their own.

    Raises
    ------
    ValueError
        A value is not allowed, or two cells can't be told apart by their folders. A value that a script's command line
        would refuse ends the process as it does there.
    """
    rest = {key: values for key, values in grid.items() if key != "variants"}
    planned, seen = [], set()
    for variant in grid.get("variants", [{}]):
        axes = {"script": ["train_vm.py"], **rest, **variant}
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            script = chosen.pop("script")
            settings = _settings(script, chosen, elsewhere)
            key = script, *(repr(v) for k, v in settings.items() if k not in FREE_SETTINGS - {"results_path"})
            if key not in seen:
                seen.add(key)
                planned.append((script, chosen, settings))
    return _separate(planned)


def _settings(script, chosen, elsewhere):
    """Every setting of a run, as its script will read them."""
    config = SCRIPTS[script]
    other = sorted(chosen.keys() - {field.name for field in fields(config)})
    if other:
        raise ValueError(f"{script} has no setting {other[0]!r}")
    aside = {name: chosen[name] for name in MACHINE if elsewhere and chosen.get(name) is not None}
    settings = parse(config, "", _arguments({k: v for k, v in chosen.items() if k not in aside})).settings
    for name, value in aside.items():
        allowed = FIELDS[name].metadata.get("choices", (value,))
        if value not in allowed:
            raise ValueError(f"--{name} {value}: allowed are {', '.join(allowed)}")
    return settings | aside


def _arguments(chosen):
    """A script's command line for settings; None stands for the script's own default."""
    arguments = []
    for name, value in chosen.items():
        flag = name.replace("_", "-")
        default = FIELDS[name].default
        if isinstance(default, bool):
            if value is not None and value != default:
                arguments.append(f"--no-{flag}" if default else f"--{flag}")
        elif value is not None:
            arguments += [f"--{flag}", str(value)]
    return arguments


def _separate(planned):
    groups = defaultdict(list)
    for script, _, settings in planned:
        groups[run_folder(settings["results_path"], SCRIPTS[script].kind, settings)].append(settings)
    cells, separated, owners = [], set(), {}
    for script, chosen, settings in planned:
        config, base = SCRIPTS[script], Path(settings["results_path"])
        group = groups[run_folder(base, config.kind, settings)]
        own = base
        if len(group) > 1:
            defaults = parse(config, "", ["--dataset", settings["dataset"]]).settings | {"dataset": None}
            for name, value in settings.items():
                if name in FREE_SETTINGS or len({repr(each[name]) for each in group}) == 1:
                    continue
                separated.add(name)
                if value != defaults[name]:
                    own = own / f"{name}={_as_file_name(value)}"
        arguments = _arguments(chosen | {"results_path": str(own)})
        cell = Cell(script, tuple(arguments), settings | {"results_path": str(own)}, base)
        if owners.setdefault(cell.folder, cell) is not cell:
            raise ValueError(f"two cells of the grid share the run folder {cell.folder}; give them --results-path s")
        cells.append(cell)
    return cells, sorted(separated)


def _as_file_name(value):
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return "".join(c if c.isalnum() or c in "._,-" else "-" for c in text)
