"""A run taken up again from its folder: settings, checkpoint, and the reprogrammed network it describes.

Every tool that does something with a trained run starts here.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from data.files import read_json
from tools.console import torch_device
from tools.training.build import SPLITS, System, assemble, assemble_clip
from tools.training.run_folder import checkpoint_path, load_checkpoint, run_folder
from tools.training.trainer import pretrained_logits, set_up_arithmetic

_ASSEMBLE = {"vm": assemble, "vm_fast": assemble, "vlm": assemble_clip}


@dataclass(frozen=True)
class FinishedRun:
    """A run with its program and mapping in place.

    Attributes
    ----------
    folder : Path
    kind : str
        ``vm``, ``vlm`` or ``vm_fast``.
    settings : SimpleNamespace
        Of ``config.json``; paths, device and precision are those of here and now.
    checkpoint : dict
        Of ``last.pt`` or ``best.pt``, with ``program, mapping, metrics, class_names, source_names``.
    system : tools.training.build.System
    """

    folder: Path
    kind: str
    settings: SimpleNamespace
    checkpoint: dict
    system: System

    @property
    def class_names(self):
        """Names of the T downstream labels."""
        return self.checkpoint["class_names"]

    @property
    def source_names(self):
        """Names of the S pretrained labels; their numbers where the backbone came without names."""
        names = self.system.classifier.source_names
        return names or [f"label {s}" for s in range(self.system.classifier.num_source)]

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
        system = self.system
        with system.network.accumulate():
            for images in batches:
                source = pretrained_logits(system.network, images.to(system.device), self.settings.precision)
                yield source, system.mapping(source)


def load_run(folder, device="cpu", data_path=None, weights=None, splits=SPLITS, checkpoint="last"):
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
    kind, settings = _read_config(folder)
    path = checkpoint_path(folder, checkpoint)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {path.name}: the run was cut off before the end of its first epoch; start it again "
            "with the same training command"
        )
    state = load_checkpoint(path)
    missing = sorted(state["settings"].keys() - vars(settings).keys())
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks the setting {missing[0]!r} of {path.name}; restore that file")
    settings.device, device = str(device), torch_device(str(device))
    settings.results_path = _results_path(folder, kind, settings)
    if data_path is not None:
        settings.data_path = str(data_path)
    settings.weights = _find_weights(folder, settings.weights, weights)
    if device.type == "cpu" and settings.precision in ("tf32", "fp16"):  # which need a GPU
        settings.precision = "fp32"
    set_up_arithmetic(device, settings.precision, settings.deterministic)
    system = _ASSEMBLE[kind](settings, device, splits, state["class_names"])
    if kind == "vlm" and system.classifier.source_names != state["source_names"]:
        raise ValueError(f"{folder} was trained with other prompts than {settings.templates} makes; restore that file")
    _load_state(folder, path, system, state)
    return FinishedRun(folder, kind, settings, state, system)


def _read_config(folder):
    path = folder / "config.json"
    if not path.is_file():
        what = "holds no run" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(
            f"{folder} {what}: give the folder that a training script made (with config.json and last.pt), "
            "<results-path>/<vm|vlm|vm_fast>/<dataset>/<run>"
        )
    config = read_json(path)
    config = config if isinstance(config, dict) else {}
    if config.get("kind") not in _ASSEMBLE or not isinstance(config.get("settings"), dict):
        raise ValueError(f"{path} is no config.json of a training run; give the folder that a training script made")
    return config["kind"], SimpleNamespace(**config["settings"])


def _results_path(folder, kind, settings):
    """Where the run's caches are; the folder itself for a run that was taken out of its results path."""
    folder = folder.resolve()
    results = folder.parents[min(2, len(folder.parents) - 1)]
    return results if run_folder(results, kind, vars(settings)) == folder else folder


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
    """Add what tools that take up one run share: RUN, ``--checkpoint``, ``--weights``; and ``--device`` and
    ``--data-path``, unless they always run on the CPU or need no data set."""
    parser.add_argument("run", metavar="RUN", help="folder of a training run, with config.json and last.pt")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last",
                        help="state after the last epoch, or after the best on the test set (default: last)")
    if device:
        parser.add_argument("--device", default="auto", metavar="DEVICE",
                            help="cpu, cuda, cuda:N, or auto: cuda where there is one (default: auto)")
    parser.add_argument("--weights", metavar="FILE", help="the backbone's weights, where they are elsewhere by now")
    if data:
        parser.add_argument("--data-path", metavar="FOLDER", help="the data sets, where they are elsewhere by now")
