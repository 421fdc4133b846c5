"""python -m tools.visualize results/vm/flowers102/resnet18_padding_blmpp_seed0 --label "english marigold"

Draw a run. Each figure is written as PDF and PNG, and what it shows as numbers into figures.json:

pattern     the pattern, and test images as the backbone sees them
labels      example images of some downstream labels, and the pretrained labels that these draw on
mapping     ω as a heat map, ordered so that its blocks show
curves      loss, accuracy and change of the mapping over the epochs
evolution   the weights of each chosen label's pretrained labels over the epochs
outputs     t-SNE of what the network says without pattern and mapping, and with them
"""

import difflib
import json
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from data.image_set import take
from tools.console import Parser, one_line_warnings, user_errors
from tools.training.finished import add_run_arguments, load_run
from tools.training.pattern_image import pattern_picture

STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42,
    "legend.frameon": False, "savefig.dpi": 300, "text.parse_math": False,
    "image.cmap": "magma_r", "lines.linewidth": 1.2, "lines.markersize": 4,
}
# Told apart without colour: dark and light, line style, marker.
COLOURS = ("#000000", "#0b559f", "#c4622d", "#4aa3a2", "#9467bd", "#8c8c8c", "#d62728", "#2ca02c", "#e0a800", "#e377c2")
MARKERS = "osD^vP*Xh<"
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (7, 3)), (0, (2, 2)), (0, (9, 2)))
LABELS_SHOWN, LABELS_IN_TSNE, IMAGES_IN_TSNE = 6, 10, 50
SOURCES_SHOWN, ROWS_SHOWN = 8, 120


def spread(count, total):
    """``count`` numbers spread evenly over ``range(total)``; all of them where there are no more."""
    return list(range(total)) if count >= total else [(2 * i + 1) * total // (2 * count) for i in range(count)]


def find_labels(names, class_names):
    """Numbers of the downstream labels ``names``.

    Raises
    ------
    ValueError
        For a name that the task lacks.
    """
    for name in names:
        if name not in class_names:
            close = difflib.get_close_matches(name, class_names, n=3, cutoff=0.4) or class_names[:3]
            raise ValueError(f"--label {name!r}: the task has no such label; close to it: {', '.join(close)}")
    return [class_names.index(name) for name in names]


def heaviest(weights, count):
    """[(pretrained label, weight), …] of the ``count`` largest weights above 0 in a column of ω, (S,)."""
    top = weights.topk(min(count, len(weights)))
    return [(s, w) for s, w in zip(top.indices.tolist(), top.values.tolist(), strict=True) if w > 0]


def block_order(weights, rows):
    """An order of ω's rows and columns that brings what belongs together side by side.

    Columns (downstream labels) are ordered as the leaves of a hierarchical clustering (average linkage of
    normalised columns); a row (pretrained label) goes to the column of its largest weight.

    Parameters
    ----------
    weights : array (S, T), 0 or more
    rows : int
        At most so many rows are kept: those of the largest weight, which must be above 0.

    Returns
    -------
    rows, columns : int arrays
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    largest = weights.max(1)
    kept = np.sort(np.argsort(-largest, kind="stable")[: min(rows, max(1, np.count_nonzero(largest)))])
    table = weights[kept]
    columns = np.arange(table.shape[1])
    if len(columns) > 2:
        unit = table / np.maximum(np.linalg.norm(table, axis=0), 1e-12)
        columns = leaves_list(linkage(unit.T, "average", optimal_ordering=True))
    table = table[:, columns]
    return kept[np.lexsort((-table.max(1), table.argmax(1)))], columns


def same_class_neighbours(outputs, labels):
    """Share of samples whose nearest other sample is of the same class; outputs (n, D), labels (n,)."""
    distance = torch.cdist(outputs.double(), outputs.double())
    distance.fill_diagonal_(torch.inf)
    return float((labels[distance.argmin(1)] == labels).double().mean())


class Drawing:
    """The figures of one run; each method draws one and returns it with its numbers."""

    def __init__(self, run, chosen):
        self.run, self.chosen = run, chosen
        self.class_names, self.source_names = run.class_names, run.source_names
        self.metrics = run.checkpoint["metrics"]
        self.weights = run.system.mapping.weights.cpu()

    def _test_images(self, label, count):
        test = self.run.system.task.test
        index = (test.labels == label).nonzero()[:count, 0]
        return take(test.images, index).permute(0, 3, 1, 2).float() / 255

    def pattern(self):
        """The pattern beside reprogrammed test images, titled with their class and what is made of them."""
        system, clip = self.run.system, self.run.system.classifier
        picture, caption = pattern_picture(vars(self.run.settings), self.run.checkpoint["program"])
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (clip.mean, clip.std))
        shown, numbers = [], []
        for label in self.chosen:
            image = self._test_images(label, 1)
            if not len(image):
                continue
            [(_, logits)] = self.run.logits([image])
            predicted = int(logits.argmax(1))
            with torch.no_grad():
                seen = (system.input_vr(image.to(system.device)).cpu() * std + mean).clamp(0, 1)[0].permute(1, 2, 0)
            shown.append((seen, label, predicted))
            numbers.append({"label": self.class_names[label], "predicted": self.class_names[predicted]})
        figure = Figure(figsize=(1.25 * (1 + len(shown)), 1.75), layout="constrained")
        axes = figure.subplots(1, 1 + len(shown), squeeze=False)
        axes[0, 0].imshow(picture.numpy())
        axes[0, 0].set_title("pattern")
        for axis, (seen, label, predicted) in zip(axes[0, 1:], shown, strict=True):
            axis.imshow(seen.numpy())
            axis.set_title(_short(self.class_names[label], 20))
            right = "✓" if label == predicted else "✗ " + _short(self.class_names[predicted], 16)
            axis.set_xlabel(right, fontsize=7)
        for axis in axes[0]:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        return figure, {"caption": caption, "images": numbers}

    def labels(self, examples=4):
        """Example images of the chosen labels, and bars for the pretrained labels of most weight."""
        tops = [heaviest(self.weights[:, t], SOURCES_SHOWN) for t in self.chosen]
        height = max(0.25 + 0.12 * max(map(len, tops)), 1.0)
        figure = Figure(figsize=(7.2, height * len(self.chosen)), layout="constrained")
        axes = figure.subplots(
            len(self.chosen), examples + 1, squeeze=False, gridspec_kw={"width_ratios": [1] * examples + [2.4]}
        )
        limit = max((w for top in tops for _, w in top), default=1)
        for line, label, top in zip(axes, self.chosen, tops, strict=True):
            images = self._test_images(label, examples)
            for axis, image in zip(line[:-1], images, strict=False):
                axis.imshow(image.permute(1, 2, 0).numpy())
            for axis in line[:-1]:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            line[0].set_title(_short(self.class_names[label], 60), loc="left", fontweight="bold")
            names = [_short(self.source_names[s], 40) for s, _ in top]
            line[-1].barh(range(len(top)), [w for _, w in top], color="#4a6a8a", edgecolor="black", linewidth=0.4)
            line[-1].set_yticks(range(len(top)), names, fontsize=6.5)
            line[-1].set(xlim=(0, limit * 1.02), ylim=(max(map(len, tops)) - 0.4, -0.6))
            line[-1].tick_params(axis="y", length=0)
            line[-1].tick_params(axis="x", labelbottom=label == self.chosen[-1])
        axes[-1, -1].set_xlabel("weight ω")
        return figure, {
            self.class_names[t]: [{"label": s, "name": self.source_names[s], "weight": w} for s, w in top]
            for t, top in zip(self.chosen, tops, strict=True)
        }

    def mapping(self):
        """ω, or |ω| of a learned mapping, as a heat map of its heaviest rows."""
        signed = bool((self.weights < 0).any())
        weights = self.weights.abs().numpy()
        rows, columns = block_order(weights, min(max(20, 3 * weights.shape[1]), ROWS_SHOWN))
        table = weights[np.ix_(rows, columns)]
        height = min(max(0.075 * len(rows), 2.5), 9)
        figure = Figure(figsize=(7.2, height + 1), layout="constrained")
        axis = figure.subplots()
        norm = matplotlib.colors.PowerNorm(0.5, 0, max(table.max(), 1e-12))
        mesh = axis.imshow(table, norm=norm, aspect="auto", interpolation="nearest")
        bar = figure.colorbar(mesh, shrink=0.5, pad=0.01)
        bar.set_label("|ω|" if signed else "ω")
        names = [_short(self.class_names[t], 30) for t in columns], [_short(self.source_names[s], 40) for s in rows]
        inches = 5.5 / len(columns), height / len(rows)
        for set_ticks, texts, space, options in zip(
            (axis.set_xticks, axis.set_yticks), names, inches, ({"rotation": 90}, {}), strict=True
        ):
            if space * 72 >= 3:  # below three points nobody can read them
                set_ticks(range(len(texts)), texts, fontsize=min(7, 0.85 * space * 72), **options)
        axis.tick_params(length=0, pad=2)
        axis.set(xlabel="downstream label", ylabel=f"pretrained label ({len(rows)} of {len(weights)})")
        return figure, {
            "rows": [self.source_names[s] for s in rows], "columns": [self.class_names[t] for t in columns],
        }

    def curves(self):
        """Loss, accuracy and ‖Δω‖ over the epochs."""
        epochs = [line["epoch"] + 1 for line in self.metrics]
        every = max(1, len(epochs) // 10)
        panels = {
            "training loss": {"": "train_loss"},
            "accuracy, %": {"test": "test_accuracy", "training": "train_accuracy"},
            "change of the mapping, ‖Δω‖": {"": "mapping_change"},
        }
        figure = Figure(figsize=(7.2, 2.1), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, (title, lines) in zip(axes, panels.items(), strict=True):
            for i, (name, key) in enumerate(lines.items()):
                scale = 100 if "accuracy" in key else 1
                values = [np.nan if line[key] is None else scale * line[key] for line in self.metrics]
                axis.plot(epochs, values, color=COLOURS[i], linestyle=DASHES[i], marker=MARKERS[i], markevery=every,
                          markerfacecolor="white" if i else None, label=name)
            axis.set(title=title, xlabel="epoch")
            axis.set_ylim(0, 1.08 * max(axis.get_ylim()[1], 1e-9))
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[1].legend()
        keys = [key for lines in panels.values() for key in lines.values()]
        return figure, {key: [line[key] for line in self.metrics] for key in keys}

    def evolution(self, sources=6):
        """The pretrained labels that ever weighed most in each chosen label, over the epochs."""
        history = self.run.checkpoint["history"]
        epochs = [entry["epoch"] + 1 for entry in history]
        across = min(2, len(self.chosen))
        down = -(-len(self.chosen) // across)
        figure = Figure(figsize=(3.6 * across, 1.9 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharex=True)
        every, numbers = max(1, len(epochs) // 10), {}
        for axis, label in zip(axes.flat, self.chosen, strict=False):
            # What is not among an epoch's kept labels weighs 0 where one of these does, and little elsewhere: a gap.
            entries = [dict(zip(*(entry[key][label].tolist() for key in ("labels", "weights")), strict=True))
                       for entry in history]
            rest = [0.0 if len(entry) == 1 or min(entry.values()) == 0 else np.nan for entry in entries]
            ever = {s for entry in entries for s, w in entry.items() if w > 0}
            lines = {s: np.array([entry.get(s, r) for entry, r in zip(entries, rest, strict=True)]) for s in ever}
            shown = sorted(lines, key=lambda s: (-np.nanmax(lines[s]), s))[:sources]
            for i, s in enumerate(shown):
                axis.plot(epochs, lines[s], color=COLOURS[i], linestyle=DASHES[i], marker=MARKERS[i], markevery=every,
                          markerfacecolor="white" if i % 2 else None, label=_short(self.source_names[s], 30))
            axis.set_title(_short(self.class_names[label], 60), fontweight="bold")
            axis.set_ylim(bottom=0)
            axis.set_ylabel("weight ω")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1.05), fontsize=6.5, handlelength=2.6)
            numbers[self.class_names[label]] = [
                {"label": s, "name": self.source_names[s],
                 "weights": [None if np.isnan(w) else float(w) for w in lines[s]]} for s in shown
            ]
        for axis in axes.flat[len(self.chosen):]:
            axis.set_axis_off()
        for axis in axes[-1]:
            axis.set_xlabel("epoch")
        return figure, {"epochs": [entry["epoch"] for entry in history], "weights": numbers}

    def outputs(self):
        """t-SNE of test images of some classes: pretrained logits without pattern, downstream logits with it."""
        from sklearn.manifold import TSNE

        system = self.run.system
        others = [t for t in spread(LABELS_IN_TSNE, len(self.class_names)) if t not in self.chosen]
        candidates = (self.chosen + others)[:LABELS_IN_TSNE]
        groups = [(t, self._test_images(t, IMAGES_IN_TSNE)) for t in sorted(candidates)]
        images = torch.cat([group for _, group in groups])
        labels = torch.tensor([t for t, group in groups for _ in group])
        if len(images) < 4:
            raise ValueError(f"t-SNE needs at least 4 test images of the classes shown, found {len(images)}")
        chunks = images.split(32)
        with torch.inference_mode():
            plain = torch.cat([
                system.classifier(system.input_vr.embed(chunk.to(system.device))).float().cpu() for chunk in chunks
            ])
            after = torch.cat([logits.cpu() for _, logits in self.run.logits(chunks)])
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.subplots(1, 2)
        numbers = {"labels": [self.class_names[t] for t in labels.tolist()]}
        titles = {"before": "pretrained logits, no pattern", "after": "downstream logits, with pattern and mapping"}
        for axis, (name, title), outputs in zip(axes, titles.items(), (plain, after), strict=True):
            perplexity = min(30, (len(outputs) - 1) / 3)
            places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(outputs.numpy())
            share = same_class_neighbours(outputs, labels)
            for i, (t, _) in enumerate(groups):
                here = places[(labels == t).numpy()]
                axis.scatter(*here.T, s=16, marker=MARKERS[i], facecolor=COLOURS[i] if i % 2 == 0 else "none",
                             edgecolor=COLOURS[i], linewidth=0.7, label=_short(self.class_names[t], 24))
            axis.set(title=f"{title}\nnearest neighbour of the same class: {share:.0%}", xticks=[], yticks=[])
            axis.spines[:].set_visible(True)
            numbers[name] = {"same_class_neighbours": share, "places": places.tolist()}
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=6.5)
        return figure, numbers


def _short(name, length):
    name = " ".join(name.split())
    tail = length // 2  # prompts differ in their ends, too
    return name if len(name) <= length else f"{name[: length - 1 - tail].rstrip()}…{name[-tail:].lstrip()}"


def draw(run, chosen, folder):
    """Draw all figures of a run.

    Parameters
    ----------
    run : tools.training.finished.FinishedRun
        With its test images.
    chosen : list of int
        The downstream labels that the figures about single labels show.
    folder : Path
        Made where it is not there.

    Yields
    ------
    str
        Name of each figure, once it is written.
    """
    drawing, numbers = Drawing(run, chosen), {}
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font lacks shows as boxes
        for name in ("pattern", "labels", "mapping", "curves", "evolution", "outputs"):
            if name == "evolution" and "history" not in run.checkpoint:
                continue
            figure, numbers[name] = getattr(drawing, name)()
            figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
            figure.savefig(folder / f"{name}.png")
            yield name
    (folder / "figures.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")


@user_errors()
def main(argv=None):
    parser = Parser(prog="python -m tools.visualize", description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--label", action="append", default=[], metavar="NAME",
                        help=f"a downstream label to show; may be repeated (default: {LABELS_SHOWN} across the task)")
    parser.add_argument("--out", metavar="FOLDER", help="where the figures go (default: RUN/figures)")
    arguments = parser.parse_args(argv)
    with user_errors(), one_line_warnings():
        run = load_run(arguments.run, arguments.device, arguments.data_path, arguments.weights, ("test",),
                       arguments.checkpoint, arguments.plugin)
        names = run.class_names
        chosen = find_labels(dict.fromkeys(arguments.label), names) or spread(LABELS_SHOWN, len(names))
        folder = Path(arguments.out or run.folder / "figures")
        for name in draw(run, chosen, folder):
            print(f"{folder / name}.pdf, .png", flush=True)


if __name__ == "__main__":
    main()
