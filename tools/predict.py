"""python -m tools.predict results/vm/flowers102/efficientnet_lite0_padding_blm_seed0 photo.jpg more-photos/

Predict the downstream labels of images with a trained run, and say which pretrained labels carried the decision.

A downstream logit is a weighted sum of pretrained logits z, y[t] = Σ_s ω[s,t] z[s]. How far the winning label w stands
above the average of all T downstream labels (with lda: of those it was trained on) is therefore a sum over pretrained
labels,

    y[w] − mean_t y[t]  =  Σ_s (ω[s,w] − mean_t ω[s,t]) (z[s] − mean(z))  +  rest,

whose terms are the contributions; those above 0 are shown. ω enters relative to its mean: a pretrained label that
speaks for all downstream labels alike decides nothing. z enters relative to its mean: adding a constant to all
pretrained logits changes no decision where the columns of ω have equal sums, as they do in rlm, flm, ilm, blm and
blmpp. There the rest is 0; for lda and linear it holds the bias and what unequal columns make of mean(z). A
contribution can be positive because an active pretrained label weighs more for the winner than on average, or an
inactive one less. Of labels with equal logits the smallest wins.

An image that cannot be read is left out with a warning; the exit code is then 1, and 2 where no image is left.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import torch

from tools.console import Parser, as_csv, one_line_warnings, user_errors, warn
from data import BatchLoader, ImageSet
from data.files import printable
from data.sources import IMAGE_SUFFIXES, FileSource
from tools.training.finished import add_run_arguments, load_run

BATCH_SIZE, THREADS = 32, 4
_NEVER = -1e29  # no logit's bias but that of a label that the training set lacked


@user_errors()
def main(argv=None):
    args = parse(argv)
    with one_line_warnings():
        if args.top_k < 1:
            raise ValueError(f"--top-k must be 1 or more, got {args.top_k}")
        files = image_files(args.images)
        run = load_run(args.run, args.device, None, args.weights, (), args.checkpoint, args.plugin)
        for group in run.system.mapping.indistinct_labels():
            names = ", ".join(run.class_names[t] for t in group)
            warn(f"the mapping cannot tell {names} apart: only the first is ever predicted")
        predictions, unreadable = predict(run, files, args.top_k)
        for reason in unreadable:
            warn(f"left out: {reason}")
        if args.json:
            print(json.dumps(predictions, indent=2))
        else:
            print(as_csv(as_rows(predictions)) if args.csv else as_table(predictions), end="")
    if unreadable:
        sys.exit(1 if predictions else 2)


def parse(argv):
    parser = Parser(prog="python -m tools.predict", description=__doc__)
    add_run_arguments(parser, data=False)
    add = parser.add_argument
    add("images", metavar="IMAGE|FOLDER", nargs="+", help="image files; of a folder, all image files in it and below")
    add("--top-k", type=int, default=5, metavar="K", help="labels of either kind to show per image (default: 5)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list, an object per image")
    text = "print CSV: a row for the k-th label and the k-th pretrained one behind the first"
    form.add_argument("--csv", action="store_true", help=text)
    return parser.parse_args(argv)


def image_files(paths):
    """The image files that are named or lie in named folders, in order.

    Raises
    ------
    OSError
        A path is not there, or a folder holds no image file or can't be read.
    """
    files = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            below = (Path(folder, name) for folder, _, names in os.walk(path, onerror=_stop) for name in names)
            images = (f for f in below if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != ".")
            found = sorted(f for f in images if f.is_file() or f.is_symlink())  # a dead link is named, not passed over
            if not found:
                raise FileNotFoundError(f"{path} holds no image file; looked for {' '.join(IMAGE_SUFFIXES)}")
        elif not path.exists():
            raise FileNotFoundError(f"{path}: no such image or folder")
        files += found
    return files


def _stop(error):
    raise error


def predict(run, files, top_k=5):
    """The most likely downstream labels of image files, and why.

    Parameters
    ----------
    run : tools.training.finished.FinishedRun
    files : list of Path
    top_k : int, >= 1

    Returns
    -------
    predictions : list of dict
        One per readable image, with
        ``image``: its path;
        ``predictions``: min(top_k, T) of {label, name, probability}, descending;
        ``why``: ``margin`` of the first above the mean downstream logit = ``pro`` (sum of the contributions above
        0) + ``contra`` (of those below) + ``rest``; ``sources``: at most top_k of {label, name, contribution,
        weight} with a contribution above 0, descending; weight is ω[s, winner].
    unreadable : list of str
        Of each other image, what is wrong with it.
    """
    weights, bias = run.system.mapping.weights, run.system.mapping.bias
    known = slice(None) if bias is None else bias > _NEVER  # a label that lda never saw would swamp the mean
    centred_weights = weights - weights[:, known].mean(1, keepdim=True)
    predictions, readable, unreadable = [], [], []
    for source_logits, target_logits in run.logits(_batches(run.system, files, readable, unreadable)):
        for z, y in zip(source_logits, target_logits, strict=True):
            why = _explain(z, y, known, weights, centred_weights, run.source_names, top_k)
            likely = _most_likely(y, run.class_names, top_k)
            predictions.append({"image": readable[len(predictions)], "predictions": likely, "why": why})
    return predictions, unreadable


def _batches(system, files, readable, unreadable):
    """Test images of the run as its evaluation would load them; each file's path or fault is noted on the way."""
    preset, source = system.presets[1], FileSource("images", Path.cwd(), files, [0] * len(files))

    def stored(i):
        try:
            return torch.tensor(preset.store(source.image(i), source.where(i)))
        except (ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(files), BATCH_SIZE):
            numbers = range(start, min(start + BATCH_SIZE, len(files)))
            images = []
            for i, image in zip(numbers, pool.map(stored, numbers), strict=True):
                if isinstance(image, Exception):
                    unreadable.append(str(image))
                else:
                    readable.append(str(files[i]))
                    images.append(image)
            if images:
                labels = torch.zeros(len(images), dtype=torch.int64)
                chunk = ImageSet(torch.stack(images), labels, readable[-len(images) :], "image files")
                loader = BatchLoader(chunk, preset, BATCH_SIZE, system.device, shuffle=False, seed=0, purpose="predict")
                yield from (batch.images for batch in loader.epoch(0))


def _most_likely(y, names, top_k):
    probabilities = y.double().softmax(0)
    top = y.sort(descending=True, stable=True).indices[:top_k]
    return [{"label": t, "name": names[t], "probability": float(probabilities[t])} for t in top.tolist()]


def _explain(z, y, known, weights, centred_weights, names, top_k):
    winner = int(y.argmax())
    contributions = contributions_to(centred_weights[:, winner], z)
    margin = float(y[winner].double() - y[known].double().mean())
    pro, contra = float(contributions.clamp(min=0).sum()), float(contributions.clamp(max=0).sum())
    top = contributions.topk(min(top_k, len(z)))
    sources = [
        {"label": s, "name": names[s], "contribution": c, "weight": float(weights[s, winner])}
        for c, s in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        if c > 0
    ]
    return {"margin": margin, "pro": pro, "contra": contra, "rest": margin - pro - contra, "sources": sources}


def contributions_to(centred_weights, z):
    """What each pretrained label adds to a downstream label's margin above the mean downstream logit.

    Parameters
    ----------
    centred_weights : Tensor (S,)
        ω[s,w] − mean_t ω[s,t].
    z : Tensor (S,)
        Pretrained logits.

    Returns
    -------
    Tensor (S,), float64
    """
    z = z.double()
    return centred_weights.double() * (z - z.mean())


def as_rows(predictions):
    """For CSV: a head, and a row for each image and rank."""
    yield "image", "rank", "label", "probability", "because", "contribution"
    for p in predictions:
        for rank, (label, source) in enumerate(zip_longest(p["predictions"], p["why"]["sources"], fillvalue={}), 1):
            said = label.get("name"), label.get("probability"), source.get("name"), source.get("contribution")
            yield p["image"], rank, *said


def as_table(predictions):
    """For people: what it is, and below it why, as a sum that adds up."""
    blocks = []
    for p in predictions:
        labels, why = p["predictions"], p["why"]
        rows = [(row["name"], row["contribution"], f"  weight {row['weight']:+.4f}") for row in why["sources"]]
        others = why["pro"] - sum(contribution for _, contribution, _ in rows)
        parts = {
            "(others that raise it)": others,
            "(all that lower it)": why["contra"],
            "(due to no single one)": why["rest"],
        }
        rows += [(name, value, "") for name, value in parts.items() if abs(value) > 5e-4]
        rows.append(("(total)", why["margin"], ""))
        width = max(len(printable(name)) for name in [*(row["name"] for row in labels), *(name for name, _, _ in rows)])
        lines = [
            printable(p["image"]),
            *(f"  {printable(row['name']):{width}}  {row['probability']:9.2%}" for row in labels),
            f"why {printable(labels[0]['name'])}: how far its score is above the average of all labels, as a sum over "
            "the pretrained network's outputs",
            *(f"  {printable(name):{width}}  {value:+9.3f}{weight}" for name, value, weight in rows),
        ]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


if __name__ == "__main__":
    sys.exit(main())
