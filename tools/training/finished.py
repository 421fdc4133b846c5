"""A run taken up again from its folder: settings, checkpoint, and the reprogrammed network it describes.

Every tool that does something with a trained run starts here.
"""

import warnings
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.training.build import BUILDERS, SPLITS, System
from tools.training.numerics import choose_device, network_outputs, set_up_arithmetic
from tools.training.plugins import HELP, plugin_fingerprint, require_plugin
from tools.training.run_folder import checkpoint_path, load_checkpoint, read_config

ESSENTIAL = ("backbone", "reprogramming", "mapping", "seed", "epochs")  # config.json can't alter these


@dataclass(frozen=True, repr=False)
class FinishedRun:
    """A run with its program and mapping in place.

    Attributes
    ----------
    folder : Path
    kind : str
        ``vm``, ``vlm`` or ``vm_fast``.
    settings : namedtuple
        Of ``config.json``; paths and device are those of here and now.
    checkpoint : dict
        Of the last or best epoch, with ``program, mapping, metrics, class_names, source_names``.
    system : tools.training.build.System
    """

    folder: Path
    kind: str
    settings: tuple
    checkpoint: dict
    system: System

    def __repr__(self):  # a notebook shows what a cell ends in
        return f"FinishedRun({str(self.folder)!r}, {self.system.mapping}, after {self.state})"

    @property
    def class_names(self):
        """Names of the T downstream labels."""
        return self.checkpoint["class_names"]

    @property
    def source_names(self):
        """Names of what the mapping reads, most often the S pretrained labels: their numbers where the backbone came
        without names; ``embedding 17`` for a mapping of a CLIP's image embedding."""
        return self.system.source_names or [f"label {s}" for s in range(self.system.mapping.num_source)]

    @property
    def state(self):
        """What the checkpoint was kept after, as in ``epoch 3``; where nothing was trained, ``one estimate``."""
        return f"epoch {self.epoch + 1}" if self.settings.epochs else "one estimate"

    @property
    def epoch(self):
        """The epoch, from 0, that the checkpoint was kept after."""
        return self.checkpoint["metrics"][-1]["epoch"]

    @torch.no_grad()
    def logits(self, batches):
        """Logits of reprogrammed images, computed as the run's own evaluation does.

        Parameters
        ----------
        batches : iterable of Tensor (n, 3, h, w)
            Images in [0, 1], as the test preset leaves them; on any device.

        Yields
        ------
        (Tensor (n, S), Tensor (n, T)), float32: pretrained and downstream logits of one batch
        """
        readout = self.system.readout
        for outputs in self._outputs(batches):
            yield readout.pretrained(outputs), readout.downstream(outputs)

    @torch.no_grad()
    def downstream_logits(self, batches):
        """As `logits`, without the pretrained ones, of which a CLIP has very many."""
        for outputs in self._outputs(batches):
            yield self.system.readout.downstream(outputs)

    def _outputs(self, batches):
        system = self.system
        system.readout.hold()
        with system.network.accumulate():
            for images in batches:
                yield network_outputs(system.network, images.to(system.device))


def load_run(folder, device="cpu", data_path=None, weights=None, splits=SPLITS, checkpoint="last", plugin=None):
    """Take up a run from its folder.

    Parameters
    ----------
    folder : str or Path
        As the three scripts make it.
    device : str
        cpu, cuda, cuda:N or auto.
    data_path : str or Path, optional
        Where the data sets are now; default: where they were.
    weights : str or Path, optional
        Where the backbone's weights are now, likewise.
    splits : collection of str
        Which of ``train`` and ``test`` to load into ``system.task``; without any, no data set is needed.
    checkpoint : {"last", "best"}
    plugin : str or Path, optional
        The Python file with a mapping, input VR, backbone or data set of the user's own that the run was trained with.

    Returns
    -------
    FinishedRun

    Raises
    ------
    ValueError, FileNotFoundError, OSError
        In one line: the folder holds no run, or one without a finished epoch; the checkpoint is damaged; weights,
        data set or prompt templates have gone or are not those of the run.
    """
    folder = Path(folder)
    kind, saved, content = _read_settings(folder)
    require_plugin(saved["plugin"], plugin, folder)
    path = checkpoint_path(folder, checkpoint)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {path.name}: the run was cut off before the end of its first epoch; start it again "
            "with the same training command"
        )
    state = load_checkpoint(path)
    missing = sorted(state["settings"].keys() - saved.keys())
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks the setting {missing[0]!r} of {path.name}; restore that file")
    for name, value in state["settings"].items():
        elsewhere = name in ("plugin", "weights", "templates")  # files that may lie elsewhere by now
        types = (str, type(None)) if elsewhere else type(value)
        if not isinstance(saved[name], types) or (name in ESSENTIAL and saved[name] != value):
            raise ValueError(
                f"{folder / 'config.json'} has {name} {saved[name]!r}, but {path.name} {value!r}; restore that file"
            )
    target = choose_device(str(device))
    now = {
        "device": str(device),
        "results_path": _results_path(folder, kind),
        "precision": "fp32",  # nothing trains here
        "weights": _find_weights(folder, saved["weights"], weights),
    }
    if data_path is not None:
        now["data_path"] = str(data_path)
    settings = _frozen(saved | now, folder)
    set_up_arithmetic(target, saved["precision"], settings.deterministic)  # tf32 also rounds what is tested
    system = BUILDERS[kind](settings, target, splits, state["class_names"])
    if kind == "vlm" and system.source_names != state["source_names"]:
        raise ValueError(f"{folder} was trained with other prompts than {settings.templates} makes; restore that file")
    _compare(folder, content, system.content | plugin_fingerprint(plugin))
    _load_state(folder, path, system, state)
    return FinishedRun(folder, kind, settings, state, system)


def _read_settings(folder):
    path = folder / "config.json"
    if not path.is_file():
        what = "holds no run" if folder.is_dir() else "is no folder"
        below = next((found for depth in (1, 2, 3) for found in folder.glob("*/" * depth + path.name)), None)
        example = below.parent if below else "<results-path>/<vm|vlm|vm_fast>/<dataset>/<run>"
        raise FileNotFoundError(
            f"{folder} {what}: give the folder that a training script made (with config.json and "
            f"{checkpoint_path('').name}), such as {example}"
        )
    config = read_config(path)
    if config["kind"] not in BUILDERS:
        raise ValueError(f"{path} is of an unknown kind of run, {config['kind']!r}; known are {', '.join(BUILDERS)}")
    needed = ("plugin", "weights", "precision", "deterministic")
    lacking = [name for name in needed if name not in config["settings"]]
    if lacking:
        raise ValueError(f"{path} lacks the setting {lacking[0]!r}; restore that file")
    return config["kind"], config["settings"], config["content"]


def _compare(folder, then, now):
    """Refuse other weights than those of the run; only warn of what a user may want to try: images, a plugin."""
    for name, value in now.items():
        if then.get(name) not in (None, value) and name == "weights":
            raise ValueError(f"{folder} was trained with another weights file; pass the one of that time by --weights")
        if then.get(name) not in (None, value) and (name.endswith("images") or name == "plugin"):
            warnings.warn(
                f"{folder} was trained with {'another' if name == 'plugin' else 'other'} {name}", stacklevel=3
            )


def _frozen(settings, folder):
    """The settings with their names as attributes that nobody can set."""
    try:
        return namedtuple("Settings", settings)(**settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} holds something other than settings ({error})") from error


def _results_path(folder, kind):
    """Where the run's caches are; the folder itself for a run that was taken out of its results path."""
    folder = folder.resolve()
    return folder.parents[2] if len(folder.parents) > 2 and folder.parents[1].name == kind else folder


def _find_weights(folder, then, now):
    if now is not None:
        return str(now)
    if then is not None and Path(then).is_absolute() and not Path(then).is_file():
        raise FileNotFoundError(f"{folder} was trained with weights {then}, which have gone; pass --weights FILE")
    return then


@torch.no_grad()
def _load_state(folder, path, system, state):
    try:
        system.input_vr.load_state_dict({"program": state["program"]})
        system.mapping.load_state_dict(state["mapping"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} does not belong to the network of {folder / 'config.json'} and its weights ({reason:.200})"
        ) from error


def add_run_arguments(parser, data=True, device=True):
    """Add what tools that take up one run share: RUN, ``--checkpoint``, ``--weights``, ``--plugin``; and ``--device``
    and ``--data-path``, unless they always run on the CPU or need no data set."""
    parser.add_argument("run", metavar="RUN", help="folder of a training run, with config.json and its checkpoints")
    parser.add_argument(
        "--checkpoint",
        choices=("last", "best"),
        default="last",
        help="state after the last epoch, or after the best on the test set (default: last)",
    )
    if device:
        parser.add_argument(
            "--device",
            default="auto",
            metavar="DEVICE",
            help="cpu, cuda, cuda:N, or auto: cuda where there is one (default: auto)",
        )
    parser.add_argument("--weights", metavar="FILE", help="the backbone's weights, where they are elsewhere by now")
    if data:
        parser.add_argument("--data-path", metavar="FOLDER", help="the data sets, where they are elsewhere by now")
    parser.add_argument("--plugin", metavar="FILE", help=HELP)
