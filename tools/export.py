"""python -m tools.export results/vm/flowers102/efficientnet_lite0_padding_blm_seed0 --format both

Write a trained run as one network for use without this project: pattern, backbone and mapping ω together, from float
images in [0, 1], (n, 3, h, w), to downstream logits (n, T), for any n. A CLIP's text embeddings and ω are folded into
one (D, T) matrix on its D-dimensional image embedding.

model.pt2    for torch.export.load
model.onnx   for onnxruntime and others; needs the packages onnx, onnxscript and onnxruntime

Both carry, as JSON texts, "class_names" (a list in the order of the logits), "preprocessing" (how an image becomes the
input) and "run" (what was trained): in ONNX as metadata_props, in the .pt2 as extra files of these names with the
suffix .json. Each file is loaded again and compared with the run's own logits before it takes its final name.
"""

import json
import os
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from tools.console import Parser, one_line_warnings, user_errors
from tools.training.finished import add_run_arguments, load_run
from tools.training.run_folder import check_writable

TOLERANCE = 1e-4  # of the exported logits, relative to the largest logit where that is above 1


class ReprogrammedClassifier(nn.Module):
    """Images in [0, 1], (n, 3, h, w), to downstream logits (n, T): everything that was trained, as constants.

    Parameters
    ----------
    backbone : nn.Module
        Normalised canvases to outputs.
    input_vr : models.InputVR
    head : nn.Module
        Outputs of the backbone to downstream logits.
    """

    def __init__(self, backbone, input_vr, head):
        super().__init__()
        self.backbone, self.input_vr, self.head = backbone, input_vr, head
        self.register_buffer("pattern", input_vr.pattern().detach().clone())

    def forward(self, images):
        return self.head(self.backbone(self.input_vr.embed(images) + self.pattern))


@user_errors()
def main(argv=None):
    args = parse(argv)
    with one_line_warnings():
        out = Path(args.out or args.run)
        formats = list(FORMATS) if args.format == "both" else [args.format]
        if "onnx" in formats:
            missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
            if missing:
                raise ValueError(f"ONNX needs packages: pip install {' '.join(missing)}; or take --format torch")
        run = load_run(args.run, "cpu", None, args.weights, (), args.checkpoint, args.plugin)
        check_writable(out, "--out")
        for file, difference in export(run, out, formats):
            size = file.stat().st_size / 2**20
            print(f"{file}  {size:.1f} MiB  the run's logits within {difference:.1g}")


def parse(argv):
    parser = Parser(prog="python -m tools.export", description=__doc__)
    add_run_arguments(parser, data=False, device=False)
    parser.add_argument("--format", choices=("onnx", "torch", "both"), default="both", help="(default: both)")
    parser.add_argument("--out", metavar="FOLDER", help="where the files go (default: RUN)")
    return parser.parse_args(argv)


def export(run, out, formats):
    """Write a run's network.

    Parameters
    ----------
    run : tools.training.finished.FinishedRun
        On the CPU.
    out : Path
        Folder, made where it is missing.
    formats : list of str
        Keys of `FORMATS`.

    Yields
    ------
    (Path, float)
        Each file, and its largest difference from the run's own logits.

    Raises
    ------
    ValueError
        The backbone cannot be exported, or the exported network gives other logits.
    """
    size = run.system.presets[1].output_size
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    (expected,) = run.downstream_logits([images])
    program = _trace(run, images)
    out.mkdir(parents=True, exist_ok=True)
    for form in formats:
        write, load = FORMATS[form]
        # a folder of its own: a network above 2 GiB takes several ONNX files
        with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
            name = "model.onnx" if form == "onnx" else "model.pt2"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the exporters' own, about themselves
                write(program, Path(folder) / name, describe(run))
                difference = _compare(load(Path(folder) / name), images, expected, name)
            for file in sorted(Path(folder).iterdir(), reverse=True):
                os.replace(file, out / file.name)
        yield out / name, difference


def describe(run):
    """What a user of the network needs to know; {"class_names", "preprocessing", "run"} to JSON texts."""
    preset, settings = run.system.presets[1], run.settings
    resize = {"exact": "both sides to size", "shorter-side": "shorter side to size, then centre crop"}
    described = {
        "class_names": run.class_names,
        "preprocessing": {
            "color": "RGB",
            "layout": "NCHW",
            "range": [0, 1],
            "size": preset.output_size,
            "resize": resize[preset.resize],
            "interpolation": f"{preset.interpolation}, antialiased, on 8-bit pixels (PIL)",
            "normalization": "none: it is part of the network",
        },
        "run": {
            "kind": run.kind,
            "epoch": run.epoch,
            "test_accuracy": run.checkpoint["metrics"][-1]["test_accuracy"],
            **{key: getattr(settings, key) for key in ("dataset", "backbone", "reprogramming", "mapping", "seed")},
        },
    }
    return {key: json.dumps(value) for key, value in described.items()}


def _trace(run, images):
    system = run.system
    network = ReprogrammedClassifier(system.net, system.input_vr, system.readout.as_module()).eval()
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(network, (images,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # a network's control flow can stop the tracer in any way
        reason = " ".join(str(error).split())
        raise ValueError(f"backbone {run.settings.backbone} cannot be exported ({reason:.200})") from error


def _write_torch(program, file, description):
    torch.export.save(program, file, extra_files={f"{key}.json": text for key, text in description.items()})


def _write_onnx(program, file, description):
    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    onnx.model.metadata_props.update(description)
    onnx.save(file)


def _load_torch(file):
    return torch.export.load(file).module()


def _load_onnx(file):
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def _compare(network, images, expected, name):
    """The largest difference of the logits, of the batch and of a single image."""
    got = torch.cat([network(images), network(images[:1])])
    difference = float((got - torch.cat([expected, expected[:1]])).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(f"{name} gives other logits than the run, by up to {difference:.3g}; nothing was written")
    return difference


# name -> how to write a program, and how to load it again as a callable
FORMATS = {"torch": (_write_torch, _load_torch), "onnx": (_write_onnx, _load_onnx)}


if __name__ == "__main__":
    sys.exit(main())
