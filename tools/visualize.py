"""python -m tools.visualize results/vm/flowers102/resnet18_padding_blmpp_seed0 --label "english marigold"

Draw a run. Each figure is written as PDF and PNG, and what it shows as numbers into figures.json:

pattern     the pattern, and test images as the backbone sees them
labels      example images of some downstream labels, and the pretrained labels that these draw on
mapping     ω as a heat map, ordered so that its blocks show
curves      loss, accuracy and change of the mapping over the epochs
evolution   the weights of each chosen label's pretrained labels over the epochs
outputs     t-SNE of what the network says without pattern and mapping, and with them

Three more show what tools.evaluate measured of the run, where it did:

confusion   which labels are taken for which
classes     accuracy by class, and what each is most often taken for
reliability accuracy against confidence

What cannot be drawn is named with the reason, and left out.
"""

import csv
import difflib
import math
import textwrap
import warnings
from itertools import zip_longest
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.console import Parser, one_line_warnings, user_errors, warn
from data.files import printable, read_json, write_json
from data.image_set import take
from mapping import MAPPINGS
from tools.training.finished import add_run_arguments, load_run
from tools.training.run_folder import check_writable

STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "legend.frameon": False,
    "savefig.dpi": 300,
    "text.parse_math": False,
    "image.cmap": "magma_r",
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
}
# Told apart without colour: pairs of one darkness, of which a line is whole and one dashed; markers.
COLOURS = ("#000000", "#0b3d91", "#c4622d", "#2a8f8e", "#c09adb", "#adadad", "#d62728", "#2ca02c", "#e0a800", "#e377c2")
MARKERS = "osD^vP*Xh<"
BARS = {"color": "#9db4cc", "edgecolor": "#4a6a8a", "linewidth": 0.5}
LABELS_SHOWN, LABELS_IN_TSNE, IMAGES_IN_TSNE = 6, 10, 50
SOURCES_SHOWN, ROWS_SHOWN, BARS_SHOWN = 8, 120, 60
# From negative to positive, also in grey: the darker, the more negative.
DIVERGING = LinearSegmentedColormap.from_list("diverging", ["#08306b", "#4f77ad", "#adadad", "#ecb27c", "#fff6d0"])


class NotDrawn(Exception):
    """Why a figure cannot be drawn."""


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
    """[(pretrained label, weight), …] of the ``count`` weights of largest size, none of them 0, in a column of ω."""
    top = weights.abs().topk(min(count, len(weights))).indices.tolist()
    return [(s, w) for s, w in zip(top, weights[top].tolist(), strict=True) if w]


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
    """Share of samples whose nearest other sample is of the same class; outputs (n, D), labels (n,).

    Samples that are alone in their class don't count; None where all are.
    """
    distance = torch.cdist(outputs.double(), outputs.double())
    distance.fill_diagonal_(torch.inf)
    same = (labels[distance.argmin(1)] == labels)[labels.bincount()[labels] > 1]
    return float(same.double().mean()) if len(same) else None


class Drawing:
    """The figures of one run; each method draws one and returns it with its numbers."""

    def __init__(self, run, chosen, checkpoint="last"):
        self.run, self.chosen, self.checkpoint = run, chosen, checkpoint
        self.class_names, self.source_names = run.class_names, run.source_names
        self.metrics = run.checkpoint["metrics"]
        self.weights = run.system.mapping.weights.cpu()

    def _test_images(self, label, count):
        test = self.run.system.task.test
        index = (test.labels == label).nonzero()[:count, 0]
        return take(test.images, index).permute(0, 3, 1, 2).float() / 255

    @torch.no_grad()
    def _seen(self, images):
        """What the backbone sees of images (n, 3, h, w), undone its normalisation: (n, C, C, 3) in [0, 1]."""
        system, backbone = self.run.system, self.run.system.classifier
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
        seen = system.input_vr(images.to(system.device)).cpu() * std + mean
        return seen.clamp(0, 1).permute(0, 2, 3, 1)

    def pattern(self):
        """The pattern stretched and at its true strength, and reprogrammed test images with what is made of them."""
        vr = self.run.system.input_vr
        stretched, caption = vr.as_image()
        side = vr.image_size
        panels, numbers = [], []
        if vr.trainable:
            grey = self._seen(torch.full((1, 3, side, side), 0.5))[0].numpy()
            panels = [(stretched.numpy(), "pattern", "stretched"), (grey, "true strength", "on a grey image")]
        for label in self.chosen:
            image = self._test_images(label, 1)
            if not len(image):
                continue
            [logits] = self.run.downstream_logits([image])
            predicted = int(logits.argmax(1))
            name, said = (textwrap.fill(_short(self.class_names[t], 32), 18) for t in (label, predicted))
            verdict = "✓ recognised" if label == predicted else f"✗ taken for\n{said}"
            panels.append((self._seen(image)[0].numpy(), name, verdict))
            numbers.append({"label": self.class_names[label], "predicted": self.class_names[predicted]})
        if not panels:
            raise NotDrawn("there is no pattern, and no test image of the classes shown")
        figure = Figure(figsize=(1.25 * len(panels), 2.2), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)
        for axis, (image, above, below) in zip(axes[0], panels, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.set_title(above, fontsize=7)
            axis.set_xlabel(below, fontsize=7)
        if vr.trainable:
            figure.supxlabel(textwrap.fill(f"pattern: {caption}", 25 * len(panels)), fontsize=6.5)
        return figure, {"caption": caption, "images": numbers}

    def labels(self, examples=4):
        """Example images of the chosen labels, and bars for the pretrained labels of most weight."""
        tops = [heaviest(self.weights[:, t], SOURCES_SHOWN) for t in self.chosen]
        images = [self._test_images(label, examples) for label in self.chosen]
        across = max(map(len, images))
        height = max(0.25 + 0.12 * max(map(len, tops)), 1.0)
        figure = Figure(figsize=(7.2, height * len(self.chosen)), layout="constrained")
        axes = figure.subplots(
            len(self.chosen), across + 1, squeeze=False, gridspec_kw={"width_ratios": [1] * across + [6.4 - across]}
        )
        weights = [w for top in tops for _, w in top]
        limit, signed = 1.04 * max(map(abs, weights), default=1), min(weights, default=0) < 0
        for line, label, top, shown in zip(axes, self.chosen, tops, images, strict=True):
            *places, bars = line
            for axis, image in zip_longest(places, shown):
                axis.set_axis_off()
                if image is not None:
                    axis.imshow(image.permute(1, 2, 0).numpy())
            line[0].set_title(" ")  # takes up the height, and the name no width, which would push the images apart
            name, place = _short(self.class_names[label], 60), {"transform": line[0].transAxes, "in_layout": False}
            line[0].text(0, 1.06, name, fontweight="bold", **place)
            names = [_short(self.source_names[s], 40) for s, _ in top]
            drawn = bars.barh(range(len(top)), [w for _, w in top], color="#4a6a8a", edgecolor="black", lw=0.4)
            for bar, (_, w) in zip(drawn, top, strict=True):
                if w < 0:
                    bar.set(facecolor="white", edgecolor="#b4531f", hatch="/////")
            bars.axvline(0, color="black", linewidth=0.6)
            bars.set_yticks(range(len(top)), names, fontsize=6.5)
            bars.set(xlim=(-limit if signed else 0, limit), ylim=(max(map(len, tops)) - 0.4, -0.6))
            bars.tick_params(axis="y", length=0)
            bars.tick_params(axis="x", labelbottom=label == self.chosen[-1])
        bars.set_xlabel("weight ω\n(hatched: speaks against the label)" if signed else "weight ω")
        return figure, {
            self.class_names[t]: [{"label": s, "name": self.source_names[s], "weight": w} for s, w in top]
            for t, top in zip(self.chosen, tops, strict=True)
        }

    def mapping(self):
        """ω as a heat map of its heaviest rows, in diverging colours where it has negative weights."""
        weights = self.weights.numpy()
        signed = bool((weights < 0).any())
        rows, columns = block_order(np.abs(weights), min(max(20, 3 * weights.shape[1]), ROWS_SHOWN))
        table = weights[np.ix_(rows, columns)]
        if signed:
            limit = max(np.quantile(np.abs(table), 0.995), 1e-12)
            options = {"norm": Normalize(-limit, limit), "cmap": DIVERGING}
        else:
            options = {"norm": PowerNorm(0.5, 0, max(table.max(), 1e-12))}
        figure, axis, bar, every = self._heat_map(table, columns, rows, self.source_names, **options)
        bar.ax.set_title("ω", fontsize=9)
        embedded = self.run.kind == "vlm" and MAPPINGS[self.run.settings.mapping].embedded
        sources = "dimension of the image embedding" if embedded else "pretrained label"
        axis.set(xlabel="downstream label" + _named(every), ylabel=f"{sources} ({len(rows)} of {len(weights)})")
        return figure, {
            "rows": [self.source_names[s] for s in rows],
            "columns": [self.class_names[t] for t in columns],
        }

    def _heat_map(self, table, columns, rows, row_names, **options):
        """A table with its labels named, as many as can be read; figure, axis, colour bar, every which is named."""
        width, height = min(max(0.09 * len(columns), 5.2), 14), min(max(0.095 * len(rows), 2.5), 14)
        figure = Figure(figsize=(width + 2, height + 1.2), layout="constrained")
        axis = figure.subplots()
        mesh = axis.imshow(table, aspect="auto", interpolation="nearest", **options)
        bar = figure.colorbar(mesh, shrink=0.5, pad=0.01, extend="both" if "cmap" in options else "neither")
        names = [_short(self.class_names[t], 30) for t in columns], [_short(row_names[s], 40) for s in rows]
        steps = []
        for set_ticks, texts, inches in zip((axis.set_xticks, axis.set_yticks), names, (width, height), strict=True):
            points = 72 * inches / len(texts)
            steps.append(max(1, math.ceil(6.4 / points)))  # smaller ones nobody can read
            shown = range(0, len(texts), steps[-1])
            set_ticks(shown, [texts[i] for i in shown], fontsize=min(7, 0.9 * points * steps[-1]))
        axis.tick_params(length=2 if max(steps) > 1 else 0, pad=2)
        room = int(72 * width / len(columns) / 4.5)  # in characters
        if max(len(word) for name in names[0] for word in name.split()) < room:
            axis.set_xticklabels([textwrap.fill(name, room - 1) for name in names[0]])
        else:
            axis.tick_params(axis="x", rotation=90)
        return figure, axis, bar, steps[0]

    def curves(self):
        """Loss, accuracy and ‖Δω‖ over the epochs."""
        epochs = [line["epoch"] + 1 for line in self.metrics]
        panels = {
            "training loss": {"": "train_loss"},
            "accuracy, %": {"test": "test_accuracy", "training": "train_accuracy"},
            "change of the mapping, ‖Δω‖": {"": "mapping_change"},
        }
        figure = Figure(figsize=(7.2, 2.1), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, (title, lines) in zip(axes, panels.items(), strict=True):
            axis.set(title=title, xlabel="epoch")
            scale, drawn = 100 if "accuracy" in title else 1, []
            for i, (name, key) in enumerate(lines.items()):
                values = [np.nan if line[key] is None else scale * line[key] for line in self.metrics]
                if np.isfinite(values).any():
                    drawn += values
                    axis.plot(epochs, values, label=name, **_line(i, epochs))
            _epoch_axis(axis, epochs)
            if drawn:
                axis.set_ylim(0, 1.08 * max(np.nanmax(drawn), 1e-9))
            else:
                axis.set_yticks([])
                why = "it never changed" if len(epochs) > 1 else "there is none before\nthe second epoch"
                axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", va="center", color="#56616f")
        if axes[1].lines:
            axes[1].legend()
        keys = [key for lines in panels.values() for key in lines.values()]
        return figure, {key: [line[key] for line in self.metrics] for key in keys}

    def evolution(self, sources=6):
        """The pretrained labels that ever weighed most in each chosen label, over the epochs."""
        history = self.run.checkpoint.get("history")
        if not history:
            raise NotDrawn("the checkpoint kept no weights of earlier epochs")
        epochs = [entry["epoch"] + 1 for entry in history]
        across = min(2, len(self.chosen))
        down = -(-len(self.chosen) // across)
        figure = Figure(figsize=(3.6 * across, 1.9 * down + 0.3), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharex=True)
        numbers, bounded = {}, False
        for axis, label in zip(axes.flat, self.chosen, strict=False):
            entries = [
                dict(zip(*(entry[key][label].tolist() for key in ("labels", "weights")), strict=True))
                for entry in history
            ]
            # What is not among an epoch's kept labels weighs 0 where one of these does, and else at most as the least.
            least = np.array([0.0 if len(entry) == 1 else min(map(abs, entry.values())) for entry in entries])
            absent = np.where(least > 0, np.nan, 0.0)
            lines = {
                s: np.array([entry.get(s, other) for entry, other in zip(entries, absent, strict=True)])
                for s in {s for entry in entries for s, w in entry.items() if w}
            }
            shown = sorted(lines, key=lambda s: (-np.nanmax(np.abs(lines[s])), s))[:sources]
            for i, s in enumerate(shown):
                unknown = np.isnan(lines[s])
                if unknown.any():
                    near = np.convolve(unknown, [1, 1, 1])[1:-1] > 0
                    bounded, bound = True, np.where(unknown, least, np.where(near, lines[s], np.nan))
                    axis.plot(epochs, bound, color=COLOURS[i], linestyle=(0, (1, 2)), clip_on=False)
                axis.plot(epochs, lines[s], label=_short(self.source_names[s], 30), **_line(i, epochs))
            axis.set_title(textwrap.fill(_short(self.class_names[label], 60), 42), loc="left", fontweight="bold")
            values = [v for s in shown for v in lines[s] if not np.isnan(v)]
            axis.set_ylim(1.08 * min([*values, 0.0]), 1.08 * max([*values, 1e-9]))
            axis.set_ylabel("weight ω")
            _epoch_axis(axis, epochs)
            if shown:
                axis.legend(loc="upper left", bbox_to_anchor=(1, 1.05), fontsize=6.5, handlelength=2.6)
            weights = {s: [None if np.isnan(w) else w for w in lines[s].tolist()] for s in shown}
            numbers[self.class_names[label]] = [
                {"label": s, "name": self.source_names[s], "weights": weights[s]} for s in shown
            ]
        for axis in axes.flat[len(self.chosen) :]:
            axis.set_axis_off()
        for axis in axes[-1]:
            axis.set_xlabel("epoch")
        if bounded:
            kept = history[-1]["labels"].shape[1]
            figure.supxlabel(
                f"dotted: not among the {kept} heaviest of that epoch, hence of no larger weight", fontsize=6.5
            )
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
            raise NotDrawn(f"t-SNE needs at least 4 test images of the classes shown, and there are {len(images)}")
        chunks, classifier, embed = images.to(system.device).split(32), system.classifier, system.input_vr.embed
        with torch.inference_mode():
            plain = torch.cat([classifier(embed(chunk)).float().cpu() for chunk in chunks])
            after = torch.cat([logits.cpu() for logits in self.run.downstream_logits(chunks)])
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.subplots(1, 2)
        numbers = {"labels": [self.class_names[t] for t in labels.tolist()]}
        titles = {"before": "pretrained logits", "after": "downstream logits, with the mapping"}
        if system.input_vr.trainable:
            titles = {"before": "pretrained logits, no pattern", "after": "downstream logits, with pattern and mapping"}
        for axis, (name, title), outputs in zip(axes, titles.items(), (plain, after), strict=True):
            perplexity = min(30, (len(outputs) - 1) / 3)
            places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(outputs.numpy())
            share = same_class_neighbours(outputs, labels)
            for i, (t, _) in enumerate(groups):
                here, look = places[(labels == t).numpy()], {"marker": MARKERS[i], "edgecolor": COLOURS[i]}
                look["facecolor"] = "none" if i % 2 else COLOURS[i]
                axis.scatter(*here.T, s=16, linewidth=0.7, label=_short(self.class_names[t], 24), **look)
            said = "" if share is None else f"\nnearest neighbour of the same class: {share:.0%}"
            axis.set(title=title + said, xticks=[], yticks=[])
            axis.spines[:].set_visible(True)
            numbers[name] = {"same_class_neighbours": share, "places": places.tolist()}
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=6.5)
        return figure, numbers

    # ---- what tools.evaluate measured ----

    def _evaluation(self):
        """(evaluation, counts): what evaluation.json and confusion.csv hold of this checkpoint."""
        suffix = "" if self.checkpoint == "last" else f"-{self.checkpoint}"
        measured, table = (self.run.folder / name for name in (f"evaluation{suffix}.json", f"confusion{suffix}.csv"))
        if not measured.is_file() or not table.is_file():
            raise NotDrawn(f"not measured yet; python -m tools.evaluate {self.run.folder} does")
        try:
            evaluation = read_json(measured)
            with open(table, newline="", encoding="utf-8") as file:
                head, *rows = csv.reader(file)
            counts = np.array([[int(entry) for entry in row[1:]] for row in rows])
            names = [c["name"] for c in evaluation["classes"]]
            if evaluation["epoch"] != self.run.epoch or not names == head[1:] == self.class_names:
                raise NotDrawn(f"{measured} is of another state of the run; run tools.evaluate again")
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise NotDrawn(f"{measured} or {table.name} is damaged ({error}); run tools.evaluate again") from error
        return evaluation, counts

    def confusion(self):
        """Of each true label, the shares of its test images by predicted label."""
        _, counts = self._evaluation()
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        everything = list(range(len(counts)))
        figure, axis, bar, every = self._heat_map(
            shares, everything, everything, self.class_names, norm=PowerNorm(0.5, 0, 1)
        )
        bar.set_label("share of the true label's images")
        axis.set(xlabel="predicted label" + _named(every), ylabel="true label" + _named(every))
        return figure, {"shares": shares.round(4).tolist()}

    def classes(self):
        """Accuracy by class, from the best to the worst; of many classes both ends."""
        evaluation, _ = self._evaluation()
        classes = sorted((c for c in evaluation["classes"] if c["accuracy"] is not None), key=lambda c: -c["accuracy"])
        half = BARS_SHOWN // 2
        parts = {f"{len(classes)} classes": classes}
        if len(classes) > BARS_SHOWN:
            parts = {f"the best {half} of {len(classes)}": classes[:half], f"the worst {half}": classes[-half:]}
        most = max(map(len, parts.values()))
        figure = Figure(figsize=(4.4 * len(parts), 0.13 * most + 0.8), layout="constrained")
        for axis, (title, shown) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
            axis.barh(range(len(shown)), [100 * c["accuracy"] for c in shown], **BARS)
            axis.set_yticks(range(len(shown)), [_short(c["name"], 30) for c in shown], fontsize=6.5)
            for place, c in enumerate(shown):
                if c["confused_with"] is not None:
                    axis.text(102, place, f"taken for {_short(c['confused_with'], 24)}", fontsize=5.5, va="center")
            overall = 2 * [100 * evaluation["accuracy"]]  # with a mark, as the line may lie on the frame
            axis.plot(overall, (-0.6, most - 0.4), "k--v", markevery=[0], linewidth=0.8, clip_on=False)
            axis.set(
                title=title, xlabel="accuracy, % (▼ and dashed: of all images)", xlim=(0, 100), ylim=(most - 0.4, -0.6)
            )
            axis.tick_params(axis="y", length=0)
        return figure, {c["name"]: c["accuracy"] for c in classes}

    def reliability(self):
        """Accuracy against confidence in bins, and how many images fall into each."""
        evaluation, _ = self._evaluation()
        bins = evaluation["calibration"]
        left = np.arange(len(bins)) / len(bins)
        confidence, accuracy = (np.array([b[key] for b in bins], float) for key in ("confidence", "accuracy"))
        figure = Figure(figsize=(3.4, 4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
        upper.bar(left, accuracy, 1 / len(bins), align="edge", label="accuracy", **BARS)
        upper.plot(confidence, accuracy, "ko", clip_on=False, label="at the bin's mean confidence")
        upper.plot([0, 1], [0, 1], color="#b4531f", linestyle="--", label="calibrated")
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=f"calibration error {evaluation['ece']:.1%}")
        look = {"ncols": 3, "fontsize": 6.5, "columnspacing": 1, "handlelength": 1.5}
        figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", **look)
        lower.bar(left, [b["num_samples"] for b in bins], 1 / len(bins), align="edge", **BARS)
        lower.set(xlabel="confidence", ylabel="images")
        return figure, {"ece": evaluation["ece"], "bins": bins}


def _short(name, length):
    name = printable(" ".join(name.split()))
    tail = length // 2  # prompts differ in their ends, too
    return name if len(name) <= length else f"{name[: length - 1 - tail].rstrip()}…{name[-tail:].lstrip()}"


def _named(every):
    return "" if every == 1 else f" (every {every}{'nd' if every == 2 else 'rd' if every == 3 else 'th'} is named)"


def _line(i, epochs):
    """The look of the ``i``-th line: marks at some dozen epochs, of each line at others, whole also at the edge."""
    every = max(1, len(epochs) // 10)
    look = {"color": COLOURS[i], "linestyle": ("-", "--")[i % 2], "marker": MARKERS[i], "zorder": 3 - i / 10}
    face = "white" if i % 2 else COLOURS[i]
    return look | {"markerfacecolor": face, "markevery": (i * every // 6 % every, every), "clip_on": False}


def _epoch_axis(axis, epochs):
    """All panels over the same whole epochs, those without a value too."""
    margin = max(0.5 if len(epochs) < 3 else 0, 0.02 * (epochs[-1] - epochs[0]))
    axis.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    if len(epochs) < 6:
        axis.set_xticks(epochs)
    else:
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


FIGURES = ("pattern", "labels", "mapping", "curves", "evolution", "outputs", "confusion", "classes", "reliability")


def draw(run, chosen, folder, checkpoint="last"):
    """Draw all figures of a run.

    Parameters
    ----------
    run : tools.training.finished.FinishedRun
        With its test images.
    chosen : list of int
        The downstream labels that the figures about single labels show.
    folder : Path
        Made where it is not there.
    checkpoint : {"last", "best"}
        Whose evaluation is drawn.

    Yields
    ------
    (str, str or None)
        Name of each figure once it is written, and None; or why it is left out.
    """
    drawing, numbers = Drawing(run, chosen, checkpoint), {}
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font lacks shows as boxes
        for name in FIGURES:
            if not run.settings.epochs and name in ("curves", "evolution"):
                yield name, "nothing was trained: there is one estimate and no epoch"
                continue
            try:
                figure, numbers[name] = getattr(drawing, name)()
            except NotDrawn as reason:
                yield name, str(reason)
                continue
            figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
            figure.savefig(folder / f"{name}.png")
            yield name, None
    write_json(folder / "figures.json", numbers)


@user_errors()
def main(argv=None):
    parser = Parser(prog="python -m tools.visualize", description=__doc__)
    add_run_arguments(parser)
    text = f"a downstream label to show; may be repeated (default: {LABELS_SHOWN} across the task)"
    parser.add_argument("--label", action="append", default=[], metavar="NAME", help=text)
    parser.add_argument("--out", metavar="FOLDER", help="where the figures go (default: RUN/figures)")
    args = parser.parse_args(argv)
    with one_line_warnings():
        run = load_run(args.run, args.device, args.data_path, args.weights, ("test",), args.checkpoint, args.plugin)
        chosen = find_labels(dict.fromkeys(args.label), run.class_names) or spread(LABELS_SHOWN, len(run.class_names))
        folder = Path(args.out or run.folder / "figures")
        check_writable(folder, "--out")
        for name, left_out in draw(run, chosen, folder, args.checkpoint):
            if left_out:
                warn(f"{name} is left out: {left_out}")
            else:
                print(f"{folder / name}.pdf, .png", flush=True)


if __name__ == "__main__":
    main()
