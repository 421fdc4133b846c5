"""Settings of the three scripts: one frozen dataclass each, filled from defaults, then recipe, then command line."""

import argparse
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from data import check_dataset_name
from mapping import check_mapping_name
from models import SWITCHES
from tools.console import Parser, torch_device

# What the paper sets for single data sets: DTD and OxfordPets are small, with 256 an epoch is a dozen steps. The
# digits, which are not the paper's, are smaller still: with 256 an epoch would be four steps.
RECIPES = {"dtd": {"batch_size": 64}, "oxfordpets": {"batch_size": 64}, "digits": {"batch_size": 16}}

# Settings that are for some mappings only: with another one they may not differ from their defaults.
USED_BY = {
    "laplace": ("blm", "blmpp"), "topk_ratio": ("blmpp",), "linear_variant": ("linear",), "bayes": ("blm", "blmpp"),
    "topk": ("blmpp",), "iteration": ("ilm", "blm", "blmpp"),
}

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


def option(default, group, text, **argument):
    """A setting with its default, its group in ``--help``, its meaning, and further argparse arguments."""
    return field(default=default, metadata={"group": group, "help": text, **argument})


def _engine(text):
    """``all``, ``plain``, or some of `SWITCHES` separated by commas, put into their fixed order."""
    names = {"all": set(SWITCHES), "plain": set()}.get(text, set(text.split(",")))
    unknown = sorted(names - set(SWITCHES))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown part {unknown[0]!r}; choose all, plain, or some of {','.join(SWITCHES)}"
        )
    return ",".join(name for name in SWITCHES if name in names) or "plain"


@dataclass(frozen=True)
class Config:
    """What all three scripts share. Every range is checked when an object is made."""

    dataset: str = option(
        "sun397", "data", "one of the paper's twelve, digits, synthetic, or folder:PATH", type=str
    )
    data_path: str = option("datasets", "data", "folder that holds the data sets", type=str)
    train_fraction: float = option(1.0, "data", "share of the training set to use, (0, 1], by class", type=float)
    workers: int = option(0, "data", "decoding threads, 0 for one a core; results do not depend on it", type=int)

    mapping: str = option("blmpp", "output mapping", "rlm, flm, ilm, blm, blmpp (alias blmp) or linear", type=str)
    laplace: float = option(1.0, "output mapping", "Laplace smoothing λ of blm and blmpp, 0 or more", type=float)
    topk_ratio: float = option(0.15, "output mapping", "α of blmpp: K = max(1, ⌊αT⌋), (0, 1]", type=float)
    linear_variant: str = option(
        "none", "output mapping", "linear: with bias, without, or weights through a sigmoid",
        choices=("none", "nobias", "sigmoid"),
    )
    bayes: bool = option(True, "output mapping", "ablation: ω from P(s|t) in place of P(t|s)")
    topk: bool = option(True, "output mapping", "ablation: blmpp with all S probabilities")
    iteration: bool = option(True, "output mapping", "ablation: estimate ω once, before epoch 0")

    reprogramming: str = option("padding", "input VR", "how θ meets the image", choices=("padding", "watermarking"))
    canvas_size: int | None = option(
        None, "input VR", "side of the square that the backbone sees, in pixels (default: its own)", type=int
    )

    backbone: str = option("resnet18", "backbone", "", type=str)
    weights: str | None = option(None, "backbone", "", type=str)

    epochs: int = option(200, "training", "passes over the training set", type=int)
    batch_size: int = option(256, "training", "images a step (dtd, oxfordpets: 64; digits: 16)", type=int)
    lr: float = option(0.01, "training", "learning rate of θ", type=float)
    seed: int = option(0, "training", "seed of every draw", type=int)
    on_nonfinite: str = option(
        "stop", "training", "at a loss, gradient or ω not finite: stop (exit code 3), or skip the step and count it",
        choices=("stop", "skip"),
    )

    device: str = option("auto", "machine", "cpu, cuda, cuda:N, or auto: cuda where there is one", type=str)
    precision: str = option("fp32", "machine", "tf32 and fp16 need a GPU", choices=PRECISIONS)
    engine: str = option(
        ",".join(SWITCHES), "machine", "parts of the fast path, separated by commas; all; or plain: none", type=_engine
    )
    deterministic: bool = option(False, "machine", "same bits twice on a GPU too (a CPU always gives them)")

    results_path: str = option("results", "run", "where run folders and caches go", type=str)
    overwrite: bool = option(False, "run", "start anew where the run folder holds a run")
    tensorboard: bool = option(False, "run", "also write TensorBoard event files into the run folder")

    def __post_init__(self):
        check_dataset_name(self.dataset)
        check_mapping_name(self.mapping)
        _require(self.epochs >= 1, "--epochs", self.epochs, "1 or more")
        _require(self.batch_size >= 1, "--batch-size", self.batch_size, "1 or more")
        _require(0 < self.lr < float("inf"), "--lr", self.lr, "above 0")
        _require(0 <= self.laplace < float("inf"), "--laplace", self.laplace, "0 or more")
        _require(0 < self.topk_ratio <= 1, "--topk-ratio", self.topk_ratio, "in (0, 1]")
        _require(0 < self.train_fraction <= 1, "--train-fraction", self.train_fraction, "in (0, 1]")
        _require(0 <= self.seed < 2**63, "--seed", self.seed, "in [0, 2^63)")
        _require(0 <= self.workers <= 256, "--workers", self.workers, "in [0, 256]")
        _require(self.canvas_size is None or self.canvas_size >= 1, "--canvas-size", self.canvas_size, "1 or more")
        self._check_use()
        self._check_machine()

    def _check_use(self):
        """No setting is silently without effect."""
        mapping = check_mapping_name(self.mapping)
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name, mappings in USED_BY.items():
            if getattr(self, name) != defaults[name] and mapping not in mappings:
                flag = ("--no-" if defaults[name] is True else "--") + name.replace("_", "-")
                raise ValueError(f"{flag} is for {' and '.join(mappings)}, but the mapping is {mapping}; leave it out")

    def _check_machine(self):
        device = self.torch_device
        if device.type == "cpu" and self.precision in ("tf32", "fp16"):
            raise ValueError(f"--precision {self.precision} needs a GPU; on a CPU take fp32 or bf16")

    @property
    def torch_device(self):
        """The device to run on, with ``auto`` resolved."""
        return torch_device(self.device)

    @property
    def settings(self):
        """Every setting as plain values, the way ``config.json`` keeps them."""
        return asdict(self)


_BACKBONE = "resnet18, resnet50, resnext101_32x8d, efficientnet_lite0, vit_b_32 or timm:<name>"
_WEIGHTS = "checkpoint file in place of the published weights; none: random, for smoke tests"


@dataclass(frozen=True)
class VMConfig(Config):
    """train_vm.py: Adam, lr 0.01, ×0.1 at 50 % and at 72 % of the epochs."""

    kind = "vm"
    backbone: str = option("resnet18", "backbone", _BACKBONE, type=str)
    weights: str | None = option(None, "backbone", _WEIGHTS, type=str)


@dataclass(frozen=True)
class VMFastConfig(VMConfig):
    """train_vm_fast.py: the settings of train_vm.py."""

    kind = "vm_fast"


@dataclass(frozen=True)
class VLMConfig(Config):
    """train_vlm.py: SGD, lr 40, momentum 0.9, cosine to 0 over all steps; watermarking with border 30."""

    kind = "vlm"
    reprogramming: str = option(
        "watermarking", "input VR", "how θ meets the image", choices=("padding", "watermarking")
    )
    backbone: str = option("ViT-B-32-quickgelu", "backbone", "an open_clip model name", type=str)
    weights: str | None = option(
        "openai", "backbone", "an open_clip tag or a checkpoint file; none: random, for smoke tests", type=str
    )
    templates: str | None = option(
        None, "backbone", "text file with a prompt template a line, each with {} (default: the paper's 81)", type=str
    )
    lr: float = option(40.0, "training", "learning rate of θ", type=float)


def _require(holds, flag, value, allowed):
    if not holds:
        raise ValueError(f"{flag} must be {allowed}, got {value}")


def build_parser(config, description):
    """The argparse parser of a config class; flags that are not given stay out of its namespace."""
    parser = Parser(description=description, usage="%(prog)s [options]", argument_default=argparse.SUPPRESS)
    groups = {}
    for setting in fields(config):
        arguments = dict(setting.metadata)
        group = arguments.pop("group")
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        flag = "--" + setting.name.replace("_", "-")
        if setting.default is False:
            arguments["action"] = "store_true"
        elif setting.default is True:  # ablations: on unless switched off
            flag, arguments["action"], arguments["dest"] = f"--no-{flag[2:]}", "store_false", setting.name
        else:
            if setting.default is not None:
                arguments["help"] += f" (default: {setting.default})"
            if "choices" not in arguments:
                arguments["metavar"] = flag[2:].replace("-", "_").upper()
        groups[group].add_argument(flag, **arguments)
    return parser


def parse(config, description, argv=None):
    """Read a command line into ``config``: defaults, then the data set's recipe, then what was typed.

    Parameters
    ----------
    config : type
        A subclass of `Config`.
    description : str
        Head of ``--help``.
    argv : list of str, optional
        Instead of ``sys.argv[1:]``.

    Raises
    ------
    ValueError
        For a value out of range; a malformed command line ends the process with one line and exit code 2.
    """
    typed = vars(build_parser(config, description).parse_args(argv))
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    dataset = typed.get("dataset", defaults["dataset"])
    merged = {**defaults, **RECIPES.get(dataset, {}), **typed}
    merged["engine"] = _engine(merged["engine"])
    merged["mapping"] = check_mapping_name(merged["mapping"])
    if merged["weights"] not in (None, "none") and Path(merged["weights"]).is_file():
        merged["weights"] = str(Path(merged["weights"]).resolve())
    return config(**merged)
