"""Settings of the three scripts: one frozen dataclass each; every setting is described once, on its field.

``python cfg.py`` prints the page of all flags, docs/flags.md.
"""

import hashlib
import os
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from keyword import iskeyword
from pathlib import Path

from data import check_dataset_name
from mapping import MAPPINGS, Setting, check_mapping_name, mapping_settings
from models import BACKBONES, REPROGRAMMING, SWITCHES, check_reprogramming_name

# What the paper sets for single data sets: DTD and OxfordPets are small, with 256 an epoch is a dozen steps. The
# digits, which are not the paper's, are smaller still: with 256 an epoch would be four steps.
RECIPES = {"dtd": {"batch_size": 64}, "oxfordpets": {"batch_size": 64}, "digits": {"batch_size": 16}}

# These are parts of every run folder's name; the others join it where they differ from the recipe.
NAMED = ("dataset", "backbone", "reprogramming", "mapping", "seed")
BUILT_FROM = {"num_source", "num_target", "image_size", "border", "mean", "std"}  # what parts are given beside settings
LONGEST_NAME = 200  # bytes of the names of a run folder and that above it, which file systems limit to 255

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")


def option(default, group, text, allowed="", valid=lambda value: True, **more):
    """A field with all that there is to say of a setting: see `mapping.Setting`."""
    more = {"type": type(default)} | more
    return field(default=default, metadata={"group": group, "help": text, "allowed": allowed, "valid": valid, **more})


def at_least(number):
    return f"{number} or more", lambda value: value >= number


def share(value):
    return 0 < value <= 1


def _engine(text):
    """``auto``, ``plain``, or some of `SWITCHES` separated by commas, put into their fixed order."""
    if text in ("auto", "plain"):
        return text
    names = set(str(text).split(","))
    unknown = sorted(names - set(SWITCHES))
    if unknown:
        raise ValueError(f"--engine: unknown part {unknown[0]!r}; choose auto, plain, or some of {','.join(SWITCHES)}")
    return ",".join(name for name in SWITCHES if name in names)


@dataclass(frozen=True)
class Config:
    """What all three scripts share. Made by `of`, which adds the settings of the chosen mapping and input VR.

    Each setting affects the ``result`` (it tells runs apart), only its ``rounding``, or only the ``place`` and manner
    of work.
    """

    dataset: str = option("sun397", "data", "one of the paper's twelve, digits, synthetic, or folder:PATH")
    data_path: str = option("datasets", "data", "folder that holds the data sets", affects="place")
    train_fraction: float = option(1.0, "data", "share of the training set to use, by class", "in (0, 1]", share)
    shots: int | None = option(
        None, "data", "training images of each class to use, drawn with the seed (default: all)", *at_least(1), type=int
    )
    test_fraction: float | None = option(
        None,
        "data",
        "share of the images of each class to test on, drawn with the seed, for folder:PATH without test images",
        "in (0, 1)",
        lambda tested: 0 < tested < 1,
        type=float,
    )
    validation_fraction: float = option(
        0.0,
        "data",
        "share of the training images, by class, to hold out for choosing the best epoch",
        "in [0, 1)",
        lambda held_out: 0 <= held_out < 1,
    )
    workers: int = option(
        0, "data", "decoding threads, 0 for one per core", "in [0, 256]", lambda n: 0 <= n <= 256, affects="place"
    )

    mapping: str = option("blmpp", "output mapping", f"{', '.join(MAPPINGS)}, or that of a plugin")

    reprogramming: str = option("padding", "input VR", f"how θ meets the image: {', '.join(REPROGRAMMING)}")
    canvas_size: int | None = option(
        None,
        "input VR",
        "side of the square that the backbone sees, in pixels (default: its own)",
        *at_least(1),
        type=int,
    )

    backbone: str = option("resnet18", "backbone", "")
    weights: str | None = option(None, "backbone", "", type=str)

    epochs: int = option(
        200,
        "training",
        "passes over the training set; 0: one estimate and one evaluation with θ as it starts, which "
        "is all there is where nothing is trained",
        *at_least(0),
    )
    batch_size: int = option(256, "training", "images per step (dtd, oxfordpets: 64; digits: 16)", *at_least(1))
    lr: float = option(0.01, "training", "learning rate of θ", "above 0", lambda lr: 0 < lr < float("inf"))
    seed: int = option(0, "training", "seed of every draw", "in [0, 2^63)", lambda seed: 0 <= seed < 2**63)
    on_nonfinite: str = option(
        "stop",
        "training",
        "at a loss, gradient or ω that is not finite: stop (exit code 3), or skip the step and count it",
        choices=("stop", "skip"),
        affects="place",
    )

    device: str = option("auto", "machine", "cpu, cuda, cuda:N, or auto: cuda where there is one", affects="place")
    threads: int = option(
        0,
        "machine",
        "threads of a CPU's arithmetic, 0 for torch's own choice; other numbers round otherwise",
        "in [0, 1024]",
        lambda n: 0 <= n <= 1024,
        affects="rounding",
    )
    precision: str = option(
        "auto",
        "machine",
        "of the frozen network in training; auto: fp32 on a CPU, fp16 on a GPU; tf32 and fp16 need a GPU",
        choices=PRECISIONS,
    )
    engine: str = option(
        "auto",
        "machine",
        f"auto: the whole fast network; plain: none of it; or some of {', '.join(SWITCHES)}, separated by commas",
        affects="rounding",
    )
    deterministic: bool = option(
        False, "machine", "same bits twice on a GPU too (a CPU always gives them)", affects="rounding"
    )

    results_path: str = option("results", "run", "where run folders and caches go", affects="place")
    overwrite: bool = option(False, "run", "start from scratch where the run folder holds a run", affects="place")
    tensorboard: bool = option(False, "run", "also write TensorBoard event files into the run folder", affects="place")
    plugin: str | None = option(
        None,
        "run",
        "Python file that registers a mapping, input VR, backbone or data set of your own",
        type=str,
        affects="place",
    )

    @classmethod
    def settings_of_all(cls):
        """Every setting that a command line may name, a dict of name to `Setting`: those of all parts included."""
        return {f.name: Setting(f.name, f.default, **f.metadata) for f in fields(cls)} | {
            name: replace(setting, help=f"{setting.help} (for {', '.join(users)})")
            for name, (setting, _, users) in settings_of_parts().items()
        }

    @classmethod
    def of(cls, **given):
        """The settings of one run: defaults, then the data set's recipe, then what is ``given``.

        Raises
        ------
        ValueError
            A value out of range, or one for a mapping or input VR that is not chosen.
        """
        common = {f.name: f.default for f in fields(cls)}
        chosen = common | given
        check_dataset_name(chosen["dataset"])
        check_reprogramming_name(chosen["reprogramming"])
        chosen["mapping"] = check_mapping_name(chosen["mapping"])
        values = common | recipe(chosen) | {name: chosen[name] for name in ("mapping", *given)}
        values["engine"] = _engine(values["engine"])
        _refuse_settings_of_training(values, common)
        if values["shots"] is not None and values["train_fraction"] < 1:
            raise ValueError("--shots and --train-fraction exclude each other; give one of them")
        if values["dataset"].startswith("folder:"):
            if values["data_path"] != common["data_path"]:
                raise ValueError(
                    f"--data-path is for data sets by name, but {values['dataset']} says where its images "
                    "are; leave it out"
                )
            # as tools find them from any folder, and elsewhere by a --data-path of theirs
            values["dataset"] = "folder:" + os.path.realpath(
                os.path.expanduser(values["dataset"].removeprefix("folder:"))
            )
            values["data_path"] = ""
        parts = {"mapping": MAPPINGS[values["mapping"]], "reprogramming": REPROGRAMMING[values["reprogramming"]]}
        own = {s.name: s for part in parts.values() for s in part.settings}
        _refuse_settings_without_effect({k: v for k, v in given.items() if k not in common and k not in own}, values)
        for name in ("weights", "templates", "plugin"):  # a run is found again from any folder
            if values.get(name) not in (None, "none") and Path(values[name]).is_file():
                values[name] = str(Path(values[name]).resolve())
        extra = [(s.name, object, field(default=s.default, metadata=_metadata(s))) for s in own.values()]
        complete = make_dataclass(cls.__name__, extra, bases=(cls,), frozen=True, namespace={"__doc__": cls.__doc__})
        return complete(**{name: value for name, value in values.items() if name in common or name in own})

    def __post_init__(self):
        for f in fields(self):
            Setting(f.name, f.default, **f.metadata).check(getattr(self, f.name))

    @property
    def settings(self):
        """Every setting as plain values, the way ``config.json`` keeps them."""
        return asdict(self)

    def that_affect(self, what):
        """The settings that affect ``what``: ``result``, ``rounding`` or ``place``; a dict."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("affects", "result") == what}

    @property
    def distinct(self):
        """The settings that affect the result and differ from the recipe, beside those of every name; a dict."""
        usual = {f.name: f.default for f in fields(self)} | recipe(vars(self))
        values = self.that_affect("result")
        return {name: value for name, value in values.items() if name not in NAMED and value != usual[name]}

    @property
    def folder(self):
        """The run folder, ``<results-path>/<kind>/<dataset>/<backbone>_<reprogramming>_<mapping>_seed<seed>…``."""
        parts = [f"{name}={_as_file_name(value)}" for name, value in self.distinct.items()]
        names = [_as_file_name(getattr(self, name)) for name in ("backbone", "reprogramming", "mapping")]
        name = "_".join([*names, f"seed{self.seed}", *parts])
        return Path(self.results_path) / self.kind / _shortened(_as_file_name(self.dataset)) / _shortened(name)


def recipe(chosen):
    """What differs from the defaults for the chosen data set, mapping and input VR; a dict."""
    found = RECIPES.get(chosen["dataset"], {})
    return found if _trains(chosen) else found | {"epochs": 0}


def _trains(chosen):
    return REPROGRAMMING[chosen["reprogramming"]].trained or MAPPINGS[chosen["mapping"]].trained


def _refuse_settings_of_training(values, common):
    epochs, reprogramming = values["epochs"], values["reprogramming"]
    if epochs and not _trains(values):
        raise ValueError(
            f"--epochs {epochs}: there is nothing to train with --reprogramming {reprogramming} "
            f"and --mapping {values['mapping']}, which is estimated once; leave it out"
        )
    if values["lr"] != common["lr"] and not (epochs and REPROGRAMMING[reprogramming].trained):
        raise ValueError(
            f"--lr {values['lr']}: no pattern is trained with --reprogramming {reprogramming} and {epochs} epochs; "
            "leave it out"
        )
    if not epochs and values.get("iteration") is False:
        raise ValueError("--no-iteration: with 0 epochs the mapping is estimated once anyway; leave it out")


def settings_of_parts():
    """The settings that single mappings and input VRs declare; a dict of name to (`Setting`, kind of part, users)."""
    found = {name: (setting, "mapping", users) for name, (setting, users) in mapping_settings().items()}
    for part, entry in REPROGRAMMING.items():
        for setting in entry.settings:
            known, _, users = found.setdefault(setting.name, (setting, "reprogramming", []))
            if known is not setting:
                raise ValueError(f"two parts declare a setting {setting.name!r}; rename that of the plugin")
            users.append(part)
    for name, (_, _, users) in found.items():
        usable = name.isidentifier() and not iskeyword(name) and not name.startswith("_")
        if not usable or name in BUILT_FROM or any(hasattr(config, name) for config in CONFIGS):
            raise ValueError(f"{users[0]} declares a setting {name!r}, a name that is taken or none; rename it")
    return found


def _refuse_settings_without_effect(given, values):
    known = settings_of_parts()
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"unknown setting {name!r}")
        setting, kind, users = known[name]
        if value != setting.default:
            raise ValueError(
                f"{setting.flag} is for {' and '.join(users)}, but the {kind} is {values[kind]}; leave it out"
            )


def _metadata(setting):
    return {key: value for key, value in vars(setting).items() if key not in ("name", "default")}


def _shortened(name):
    """A name that file systems take: where it is too long, its beginning and a digest of all of it."""
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name.encode()[: LONGEST_NAME - 9].decode(errors="ignore") + "-" + digest


def _as_file_name(value):
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if text.startswith("folder:"):
        text = "folder-" + os.path.basename(os.path.realpath(text.removeprefix("folder:")))
    elif Path(text).is_absolute():
        text = Path(text).name
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in text)


_BACKBONE = f"{', '.join(BACKBONES)} or timm:<name>"
_WEIGHTS = "checkpoint file in place of the published weights; none: random, for smoke tests"


@dataclass(frozen=True)
class VMConfig(Config):
    """train_vm.py: Adam, lr 0.01, ×0.1 at 50 % and at 72 % of the epochs."""

    kind = "vm"
    backbone: str = option("resnet18", "backbone", _BACKBONE)
    weights: str | None = option(None, "backbone", _WEIGHTS, type=str)


@dataclass(frozen=True)
class VMFastConfig(VMConfig):
    """train_vm_fast.py: the settings of train_vm.py."""

    kind = "vm_fast"


@dataclass(frozen=True)
class VLMConfig(Config):
    """train_vlm.py: SGD, lr 40, momentum 0.9, cosine to 0 over all steps; watermarking with border 30."""

    kind = "vlm"
    reprogramming: str = option("watermarking", "input VR", f"how θ meets the image: {', '.join(REPROGRAMMING)}")
    backbone: str = option("ViT-B-32-quickgelu", "backbone", "an open_clip model name")
    weights: str | None = option(
        "openai", "backbone", "an open_clip tag or a checkpoint file; none: random, for smoke tests"
    )
    templates: str | None = option(
        None, "backbone", "text file with a prompt template per line, each with {} (default: the paper's 81)", type=str
    )
    lr: float = option(40.0, "training", "learning rate of θ", "above 0", lambda lr: 0 < lr < float("inf"))


CONFIGS = (VMConfig, VMFastConfig, VLMConfig)


def flags_page():
    """docs/flags.md: every flag of the three scripts, by group."""
    vm, vlm = VMConfig.settings_of_all(), VLMConfig.settings_of_all()
    lines = [
        "# Flags",
        "",
        "Written by `python cfg.py`. The same for the three scripts; *CLIP* marks where "
        "`train_vlm.py` differs. `--help` prints them, too.",
        "",
    ]
    for group in dict.fromkeys(setting.group for setting in vlm.values()):
        lines += [
            f"## {group[0].upper()}{group[1:]}",
            "",
            "| flag | default | meaning | range | affects |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, clip in vlm.items():
            if clip.group != group:
                continue
            vision = vm.get(name, clip)
            default, meaning = (_both(of(vision), of(clip)) for of in (_shown_default, lambda setting: setting.help))
            allowed = clip.allowed or ", ".join(f"`{choice}`" for choice in clip.choices)
            cells = [f"`{clip.flag}`", default, meaning, allowed, clip.affects]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _shown_default(setting):
    if isinstance(setting.default, bool):
        return "off"
    return "" if setting.default is None else f"`{setting.default}`"


def _both(vision, clip):
    return vision if vision == clip else f"{vision}; *CLIP*: {clip}"


if __name__ == "__main__":
    print(flags_page(), end="")
