"""python -m tools.evaluate results/vm/flowers102/efficientnet_lite0_padding_blm_seed0

Measure a trained run on its test set: accuracy, top-5 accuracy, calibration, accuracy and confusions of each class.

Writes evaluation.json and confusion.csv (rows: true labels, columns: predicted ones, entries: test images) into the
run folder or --out; for --checkpoint best they are called evaluation-best.json and confusion-best.csv. On the machine
that trained the run the accuracy is that of result.json to the last digit.

Calibration is the expected calibration error (Guo et al., 2017): over 15 bins of equal width of the winning
probability, the mean distance of accuracy from confidence, weighted by the bins' shares of the images.
"""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from tools.console import Parser, as_csv, one_line_warnings, user_errors, warn
from data import BatchLoader
from data.files import printable, write_json, write_text
from tools.training.finished import add_run_arguments, load_run
from tools.training.run_folder import check_writable

CALIBRATION_BINS = 15


@user_errors()
def main(argv=None):
    args = parse(argv)
    with one_line_warnings():
        out = Path(args.out or args.run)
        run = load_run(args.run, args.device, args.data_path, args.weights, ("test",), args.checkpoint, args.plugin)
        check_writable(out, "--out")
        logits, labels = test_logits(run)
        groups = [[run.class_names[t] for t in group] for group in run.system.mapping.indistinct_labels()]
        evaluation = {
            "kind": run.kind,
            **{key: getattr(run.settings, key) for key in ("dataset", "backbone", "reprogramming", "mapping", "seed")},
            "checkpoint": args.checkpoint,
            "epoch": run.epoch,
            "indistinct_labels": groups,
            **measure(logits, labels, run.class_names),
        }
        for group in groups:
            warn(f"the mapping cannot tell {', '.join(group)} apart: only the first is ever predicted")
        recorded = run.checkpoint["metrics"][-1]["test_accuracy"]
        if evaluation["accuracy"] != recorded:
            warn(
                f"accuracy {evaluation['accuracy']:.4%} is not the {recorded:.4%} measured in training: another "
                "device, library version, data set or weights file than then"
            )
        out.mkdir(parents=True, exist_ok=True)
        suffix = "" if args.checkpoint == "last" else f"-{args.checkpoint}"
        measured, table = out / f"evaluation{suffix}.json", out / f"confusion{suffix}.csv"
        write_json(measured, evaluation)
        counts = confusion(ranking(logits)[:, 0], labels, len(run.class_names))
        rows = ([name, *row] for name, row in zip(run.class_names, counts.tolist(), strict=True))
        write_text(table, as_csv([["true \\ predicted", *run.class_names], *rows]))
        written = f"\n\nwritten: {measured}, {table}"
        print(json.dumps(evaluation, indent=2) if args.json else as_table(evaluation, run.state) + written)


def parse(argv):
    parser = Parser(prog="python -m tools.evaluate", description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--out", metavar="FOLDER", help="where the two files go (default: RUN)")
    parser.add_argument("--json", action="store_true", help="print evaluation.json in place of the table")
    return parser.parse_args(argv)


def test_logits(run):
    """Downstream logits (n, T) and labels (n,) of a run's test set, on the CPU.

    Parameters
    ----------
    run : tools.training.finished.FinishedRun
        Loaded with its test set.
    """
    system, size, how = run.system, run.settings.batch_size, {"shuffle": False, "seed": 0, "purpose": "test"}
    loader, labels = BatchLoader(system.task.test, system.presets[1], size, system.device, **how), []

    def images():
        for batch in tqdm(loader.epoch(0), "test", len(loader), leave=False, disable=not sys.stderr.isatty()):
            labels.append(batch.labels.cpu())
            yield batch.images

    logits = [target.cpu() for target in run.downstream_logits(images())]
    return torch.cat(logits), torch.cat(labels)


def ranking(logits):
    """Labels from the largest logit to the smallest, (n, T); of equal logits the smaller label comes first."""
    return logits.sort(dim=1, descending=True, stable=True).indices


def measure(logits, labels, class_names):
    """What a test set says about a classifier.

    Parameters
    ----------
    logits : Tensor (n, T)
    labels : Tensor (n,), int64 in [0, T)
    class_names : list of str
        T of them.

    Returns
    -------
    dict with ``num_samples, accuracy, top5_accuracy`` (of the T highest where there are fewer than 5), ``log_loss``,
    ``ece``, ``calibration`` (see `calibration`) and ``classes``: a dict for each with ``name, num_samples, accuracy``
    (None without a sample) and ``confused_with``, the label it is most often taken for (None without an error).
    Fractions of 1.
    """
    num_target = len(class_names)
    top = ranking(logits)[:, :5]
    predicted = top[:, 0]
    counts = confusion(predicted, labels, num_target)
    bins = calibration(logits, labels)
    distances = [b["num_samples"] * abs(b["accuracy"] - b["confidence"]) for b in bins if b["num_samples"]]
    return {
        "num_samples": len(labels),
        "accuracy": int((predicted == labels).sum()) / len(labels),
        "top5_accuracy": int((top == labels[:, None]).sum()) / len(labels),
        "log_loss": float(torch.nn.functional.cross_entropy(logits.double(), labels)),
        "ece": sum(distances) / len(labels),
        "calibration": bins,
        "classes": [_class(counts[t], t, class_names) for t in range(num_target)],
    }


def _class(row, t, class_names):
    total, wrong = int(row.sum()), row.clone()
    wrong[t] = 0
    return {
        "name": class_names[t],
        "num_samples": total,
        "accuracy": int(row[t]) / total if total else None,
        "confused_with": class_names[int(wrong.argmax())] if wrong.any() else None,
    }


def confusion(predicted, labels, num_target):
    """``counts[t, p]``: samples of true label t predicted as p, (T, T) int64."""
    return torch.bincount(labels * num_target + predicted, minlength=num_target**2).view(num_target, num_target)


def calibration(logits, labels, num_bins=CALIBRATION_BINS):
    """Confidence against accuracy.

    Bin b holds the samples whose highest softmax probability is in (b / num_bins, (b + 1) / num_bins].

    Returns
    -------
    list of dict with ``num_samples``, mean ``confidence`` and ``accuracy``; those are None in an empty bin
    """
    confidence, predicted = logits.double().softmax(1).amax(1), ranking(logits)[:, 0]
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    correct = (predicted == labels).double()
    sums = (torch.bincount(bins, values, num_bins).tolist() for values in (None, confidence, correct))
    return [
        {"num_samples": n, "confidence": c / n if n else None, "accuracy": h / n if n else None}
        for n, c, h in zip(*sums, strict=True)
    ]


def as_table(evaluation, state):
    """For people: the measures of a run in a ``state``, then the classes from the best to the worst."""
    e, classes = evaluation, evaluation["classes"]
    width = max(len("class"), *(len(printable(c["name"])) for c in classes))
    lines = [
        f"{printable(e['dataset'])}, {e['backbone']}, {e['reprogramming']}, {e['mapping']}, seed {e['seed']}: "
        f"{e['num_samples']} test images, after {state} ({e['checkpoint']} checkpoint)",
        "",
        f"accuracy                      {e['accuracy']:8.2%}",
        f"top-5 accuracy                {e['top5_accuracy']:8.2%}",
        f"calibration error ({CALIBRATION_BINS} bins)   {e['ece']:8.2%}",
        f"log-loss                      {e['log_loss']:8.4f}",
        "",
        f"{'class':{width}}  images  accuracy  most often taken for",
    ]
    for c in sorted(classes, key=lambda c: -1 if c["accuracy"] is None else c["accuracy"], reverse=True):
        accuracy = "-" if c["accuracy"] is None else f"{c['accuracy']:.2%}"
        name, confused_with = printable(c["name"]), printable(c["confused_with"] or "-")
        lines.append(f"{name:{width}}  {c['num_samples']:6}  {accuracy:>8}  {confused_with}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
