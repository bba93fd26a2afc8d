"""One self-contained HTML page about a comparison: what was run, findings, tables and plots.

Everything it says is computed from ``results.json``, and holds whatever came out: where two results differ
by less than their spread over seeds, it says that.
"""

from __future__ import annotations

import html
import importlib.util
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from captioner.files import write_atomically

METRICS = ("CIDEr", "METEOR", "BLEU-4")
GROUPS = 4
"""Into so many groups of about equal size validation pictures are put by the length of their captions."""
_FADED = 0.1
"""A gradient counts as faded below this share of what it is at its own step."""


class ReportError(ValueError):
    """A report that cannot be written; the message says what to do."""


def check_matplotlib() -> None:
    """See that plots can be drawn, before hours of training.

    Raises:
        ReportError: if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError(
            'the report needs matplotlib, which is not installed: pip install "captioner[figures]"'
        )


# --------------------------------------------------------------------------------------------------
# numbers


@dataclass(frozen=True)
class Variant:
    """The runs of one combination of settings, one for each seed."""

    settings: dict[str, str]
    runs: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """What distinguishes it."""
        return ", ".join(self.settings.values()) or "the only one"

    def scores(self, metric: str) -> list[float]:
        """Return each seed's score times 100."""
        return [100 * run["scores"][metric] for run in self.runs]

    def per_epoch(self, key: str) -> list[list[float]]:
        """Return for each epoch that all runs have the values of all runs."""
        lines = [[epoch[key] for epoch in run["epochs"]] for run in self.runs]
        return [list(values) for values in zip(*lines, strict=False)]

    def seconds(self) -> list[float]:
        """Return each run's median time of an epoch of training, validation left out."""
        return [_median([epoch["seconds"] for epoch in run["epochs"]]) for run in self.runs]

    def gradients(self, when: str, part: str = "state") -> list[float]:
        """Return the mean norms over the runs, relative to k = 0; empty if there are none."""
        lines = [
            [value / run["gradients"][when][part][0] for value in run["gradients"][when][part]]
            for run in self.runs
            if run["gradients"] and run["gradients"][when][part][0] > 0
        ]
        return [mean(values) for values in zip(*lines, strict=True)]


def variants_of(results: Mapping[str, Any]) -> list[Variant]:
    """Group the runs by their settings, in the grid's order."""
    found = []
    for values in itertools.product(*results["vary"].values()):
        settings = dict(zip(results["vary"], values, strict=True))
        runs = sorted(
            (run for run in results["runs"] if run["settings"] == settings), key=lambda run: run["seed"]
        )
        if runs:
            found.append(Variant(settings, runs))
    return found


def spread(values: Sequence[float]) -> float:
    """Return the sample standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def length_groups(results: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return the bounds (low, high] of groups of validation pictures by the mean length of their captions.

    The bounds are quantiles, so that the groups are about equal; fewer if many pictures share a length.
    """
    words = sorted(picture["words"] for picture in results["runs"][0]["by_picture"])
    bounds = sorted({words[max(0, math.ceil(len(words) * i / GROUPS) - 1)] for i in range(1, GROUPS + 1)})
    return list(zip([-math.inf, *bounds[:-1]], bounds, strict=True))


def by_length(variant: Variant, groups: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Return for each group each run's mean CIDEr times 100 over the pictures in it."""
    return [
        [
            100 * mean([p["CIDEr"] for p in run["by_picture"] if low < p["words"] <= high])
            for run in variant.runs
        ]
        for low, high in groups
    ]


@dataclass(frozen=True)
class Pairing:
    """Two values of one key, over all pairs of runs that differ in nothing else."""

    key: str
    first: str
    second: str
    differences: list[float]
    """In CIDEr times 100: second minus first."""


def pairings(results: Mapping[str, Any]) -> list[Pairing]:
    """Pair the runs for every two values of every key."""
    found = []
    for key, values in results["vary"].items():
        for first, second in itertools.combinations(values, 2):
            differences = []
            for run in results["runs"]:
                if run["settings"][key] != first:
                    continue
                wanted = {**run["settings"], key: second}
                for other in results["runs"]:
                    if other["settings"] == wanted and other["seed"] == run["seed"]:
                        differences.append(100 * (other["scores"]["CIDEr"] - run["scores"]["CIDEr"]))
            if differences:
                found.append(Pairing(key, first, second, differences))
    return found


def fades_at(norms: Sequence[float]) -> int | None:
    """Return the first k at which a gradient is below a tenth of that at k = 0, if there is one."""
    return next((k for k, norm in enumerate(norms) if norm < _FADED), None)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


# --------------------------------------------------------------------------------------------------
# words


def findings(results: Mapping[str, Any]) -> list[str]:
    """Return sentences about the outcome, each computed from the data."""
    variants = variants_of(results)
    said = []
    ranked = sorted(variants, key=lambda v: -mean(v.scores("CIDEr")))
    best = ranked[0]
    sentence = f"The highest mean CIDEr is that of {best.name}: {_with_spread(best.scores('CIDEr'))}."
    if len(ranked) > 1:
        second = ranked[1]
        sentence = sentence[:-1] + f", before {second.name} with {_with_spread(second.scores('CIDEr'))}."
        gap = mean(best.scores("CIDEr")) - mean(second.scores("CIDEr"))
        noise = max(spread(best.scores("CIDEr")), spread(second.scores("CIDEr")))
        if min(len(best.runs), len(second.runs)) < 2:
            sentence += " With one run of each nobody can say whether that is more than chance."
        elif gap <= noise:
            sentence += f" The difference of {gap:.1f} is within the spread over seeds: take them as equal."
        else:
            sentence += f" The difference of {gap:.1f} is larger than the spread over seeds."
    said.append(sentence)
    for pair in pairings(results):
        low, high = pair.first, pair.second
        change, count = mean(pair.differences), len(pair.differences)
        higher = sum(d > 0 for d in pair.differences)
        direction = "above" if change >= 0 else "below"
        text = f"{pair.key}: {high} is {abs(change):.1f} CIDEr {direction} {low}"
        if count > 1:
            text += (
                f" on average over {count} pairs of runs that differ in nothing else (standard deviation "
                f"{spread(pair.differences):.1f}; higher in {higher} of {count})"
            )
            if higher not in (0, count):
                text += "; not in all of them, so look at the plot"
        said.append(text + ".")
    sizes = {v.name: v.runs[0]["parameters"]["decoder"] for v in variants}
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[small] != sizes[large]:
        said.append(
            f"The variants are not of one size: the decoder of {large} has {sizes[large]:,} parameters, "
            f"{sizes[large] / sizes[small]:.2f} times as many as that of {small} ({sizes[small]:,})."
        )
    times = {v.name: mean(v.seconds()) for v in variants}
    quick, slow = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
    if times[quick] > 0 and quick != slow:
        said.append(
            f"An epoch of {slow} takes {times[slow] / times[quick]:.1f} times as long as one of {quick} "
            f"({times[slow]:.0f} and {times[quick]:.0f} seconds)."
        )
    for when in ("untrained", "trained"):
        phrases = []
        for value, norms in _gradients_by_first_key(variants, when):
            k = fades_at(norms)
            phrases.append(
                f"{value} {_step(k)}" if k is not None else f"{value} not within {len(norms) - 1} steps"
            )
        if phrases:
            said.append(
                f"{when.capitalize()}, the gradient falls below a tenth of what it is at its own step "
                f"{'; '.join(phrases)} (mean over all else)."
            )
    return said


def _step(k: int) -> str:
    return f"{k} step{'' if k == 1 else 's'} back"


def _gradients_by_first_key(variants: Sequence[Variant], when: str) -> Iterator[tuple[str, list[float]]]:
    """Yield each value of the first key, with the mean gradient norms of all variants that have it."""
    first = next(iter(variants[0].settings), None)
    values = dict.fromkeys(v.settings[first] if first else v.name for v in variants)
    for value in values:
        lines = [v.gradients(when) for v in variants if not first or v.settings[first] == value]
        lines = [line for line in lines if line]
        if lines:
            yield value, [mean(points) for points in zip(*lines, strict=True)]


def _with_spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f} (one run)"
    return f"{mean(values):.1f} ± {spread(values):.1f}"


def phrase_data(fact: Mapping[str, Any]) -> str:
    """Return a line for people about one set."""
    part = "all" if fact["pictures"] == fact["of"] else f"{fact['pictures']:,} of"
    how = f" ({fact['how']})" if fact["how"] else ""
    return (
        f"{fact['kind']}: {fact['name']}, {part} {fact['of']:,} pictures{how} with {fact['captions']:,} "
        f"captions, from {fact['annotations']}"
        + ("; partial: pictures of it are missing, so scores are partial" if fact.get("partial") else "")
    )


def table_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of results: a row for each variant."""
    head = ["", "decoder parameters", "seconds an epoch", "last training loss", *METRICS, "distinct captions"]
    rows = []
    for variant in variants_of(results):
        losses = [run["epochs"][-1]["loss"] for run in variant.runs]
        rows.append(
            [
                variant.name + (f" ({len(variant.runs)} of {results['seeds']} seeds)"
                                if len(variant.runs) < results["seeds"] else ""),
                f"{variant.runs[0]['parameters']['decoder']:,}",
                _with_spread(variant.seconds()),
                f"{mean(losses):.2f} ± {spread(losses):.2f}",
                *(_with_spread(variant.scores(metric)) for metric in METRICS),
                f"{100 * mean([run['distinct'] for run in variant.runs]):.0f} %",
            ]
        )  # fmt: skip
    return head, rows


def summary_table(results: Mapping[str, Any]) -> str:
    """Return the table of results as plain text."""
    head, rows = table_rows(results)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in [head, *rows]
    )


# --------------------------------------------------------------------------------------------------
# plots

_INK = "#010203"
"""Stands for the colour of the page's text; no other colour in a plot is the same."""
_COLOURS = ("#d1495b", "#2a9d8f", "#3d6fd1", "#e09f3e", "#8e5bb5", "#5f7f3b", "#b5651d", "#778899")
_STYLES = ("-", "--", ":", "-.")


def _figure(columns: int, rows: int = 1, *, width: float = 9.0, height: float = 3.2, **shared: Any) -> Any:
    """Return a figure and its axes as a list of rows, drawn in the page's own colours."""
    import matplotlib
    from matplotlib.figure import Figure

    ink: Any = (
        "text.color",
        "axes.edgecolor",
        "axes.labelcolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
    )
    with matplotlib.rc_context():  # colours are looked up when axes are made
        matplotlib.rcParams.update({**dict.fromkeys(ink, _INK), "font.size": 9, "axes.titlesize": 10})
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for one in axes.flat:
        one.grid(True, alpha=0.25, color="#808080", linewidth=0.6)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


class _Look:
    """How variants are told apart: the first key by colour, the others by panel."""

    def __init__(self, variants: Sequence[Variant]) -> None:
        self.first = next(iter(variants[0].settings), None)
        self.values = list(dict.fromkeys(self.value(v) for v in variants))
        self.panels = list(dict.fromkeys(self.panel(v) for v in variants))

    def value(self, variant: Variant) -> str:
        """Return what the colour stands for."""
        return variant.settings[self.first] if self.first else variant.name

    def panel(self, variant: Variant) -> str:
        """Return what the panel stands for."""
        return ", ".join(
            f"{k.rpartition('.')[2]} {v}" for k, v in variant.settings.items() if k != self.first
        )

    def line(self, variant: Variant) -> dict[str, Any]:
        """Return colour and style."""
        index = self.values.index(self.value(variant))
        return {
            "color": _COLOURS[index % len(_COLOURS)],
            "linestyle": _STYLES[index // len(_COLOURS) % len(_STYLES)],
        }


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique, loc="outside lower center", ncols=min(len(unique), 6), frameon=False
    )


def plot_scores(results: Mapping[str, Any]) -> Any:
    """Each seed a dot, the mean a bar, one standard deviation to both sides a line."""
    variants = variants_of(results)
    look = _Look(variants)
    figure, axes = _figure(len(METRICS), height=0.9 + 0.27 * len(variants), sharey=True)
    for metric, one in zip(METRICS, axes[0], strict=True):
        for place, variant in enumerate(variants):
            colour = look.line(variant)["color"]
            values = variant.scores(metric)
            centre, around = mean(values), spread(values)
            one.plot(
                [centre - around, centre + around], [place, place], color=colour, linewidth=5, alpha=0.25
            )
            one.plot([centre], [place], "|", color=colour, markersize=13, markeredgewidth=2)
            one.plot(values, [place] * len(values), "o", color=colour, markersize=3.5, alpha=0.85)
        one.set_title(f"{metric} × 100")
    axes[0][0].set_yticks(range(len(variants)), [v.name for v in variants])
    axes[0][0].invert_yaxis()
    return figure


def plot_cost(results: Mapping[str, Any]) -> Any:
    """Parameters of the decoder, and time per epoch with each seed as a dot."""
    variants = variants_of(results)
    look = _Look(variants)
    figure, axes = _figure(2, height=0.9 + 0.27 * len(variants), sharey=True)
    left, right = axes[0]
    for place, variant in enumerate(variants):
        colour = look.line(variant)["color"]
        left.barh(place, variant.runs[0]["parameters"]["decoder"] / 1e6, color=colour, alpha=0.7, height=0.6)
        times = variant.seconds()
        right.barh(place, mean(times), color=colour, alpha=0.35, height=0.6)
        right.plot(times, [place] * len(times), "o", color=colour, markersize=3.5)
    left.set_title("parameters of the decoder, millions")
    right.set_title("seconds per epoch")
    left.set_yticks(range(len(variants)), [v.name for v in variants])
    left.invert_yaxis()
    return figure


def _plot_lines(results: Mapping[str, Any], keys: Sequence[tuple[str, str, float]]) -> Any:
    """Lines over epochs: mean over seeds, with a band from the lowest to the highest."""
    variants = variants_of(results)
    look = _Look(variants)
    figure, axes = _figure(len(look.panels), len(keys), height=2.5, sharex=True, sharey="row")
    for row, (key, label, scale) in zip(axes, keys, strict=True):
        for variant in variants:
            one = row[look.panels.index(look.panel(variant))]
            values = [[scale * v for v in epoch] for epoch in variant.per_epoch(key)]
            epochs = range(1, len(values) + 1)
            style = look.line(variant)
            one.fill_between(
                epochs, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.15,
                linewidth=0,
            )  # fmt: skip
            one.plot(epochs, [mean(v) for v in values], label=look.value(variant), linewidth=1.5, **style)
        row[0].set_ylabel(label)
    for panel, one in zip(look.panels, axes[0], strict=True):
        one.set_title(panel)
    for one in axes[-1]:
        one.set_xlabel("epoch")
        one.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes[0][0])
    return figure


def plot_curves(results: Mapping[str, Any]) -> Any:
    """Training loss, and CIDEr of the captions generated for validation pictures, by epoch."""
    return _plot_lines(results, [("loss", "training loss", 1), ("CIDEr", "validation CIDEr × 100", 100)])


def plot_lengths(results: Mapping[str, Any]) -> Any:
    """CIDEr of validation pictures by the mean length of people's captions of them."""
    variants = variants_of(results)
    look = _Look(variants)
    groups = length_groups(results)
    figure, axes = _figure(len(look.panels), height=3.0, sharey=True)
    for variant in variants:
        one = axes[0][look.panels.index(look.panel(variant))]
        style = look.line(variant)
        shift = 0.07 * (look.values.index(look.value(variant)) - (len(look.values) - 1) / 2)
        values = by_length(variant, groups)
        places = [place + shift for place in range(len(groups))]
        one.plot(places, [mean(v) for v in values], label=look.value(variant), linewidth=1.5, **style)
        for place, points in zip(places, values, strict=True):
            one.plot([place] * len(points), points, "o", color=style["color"], markersize=3, alpha=0.6)
    names = group_names(groups)
    for panel, one in zip(look.panels, axes[0], strict=True):
        one.set_title(panel)
        one.set_xticks(range(len(groups)), names)
        one.set_xlabel("words in people's captions")
    axes[0][0].set_ylabel("CIDEr × 100")
    _legend(figure, axes[0][0])
    return figure


def group_names(groups: Sequence[tuple[float, float]]) -> list[str]:
    """Return what to call the groups of `length_groups`."""
    names = []
    for i, (low, high) in enumerate(groups):
        if len(groups) == 1:
            names.append("all")
        elif i == 0:
            names.append(f"up to {high:.3g}")
        elif i == len(groups) - 1:
            names.append(f"over {low:.3g}")
        else:
            names.append(f"to {high:.3g}")
    return names


def plot_gradients(results: Mapping[str, Any]) -> Any:
    """Norm of the gradient of a word's loss at the state k steps earlier, relative to k = 0; log scale."""
    variants = [v for v in variants_of(results) if v.gradients("trained")]
    if not variants:
        return None
    look = _Look(variants)
    moments = ("untrained", "trained")
    figure, axes = _figure(len(look.panels), len(moments), height=2.6, sharex=True, sharey=True)
    for when, row in zip(moments, axes, strict=True):
        for variant in variants:
            one = row[look.panels.index(look.panel(variant))]
            style = look.line(variant)
            norms = variant.gradients(when)
            one.semilogy(norms, label=look.value(variant), linewidth=1.5, marker=".", **style)
            hidden = variant.gradients(when, "hidden")
            if any(not math.isclose(a, b, rel_tol=1e-6) for a, b in zip(norms, hidden, strict=True)):
                label = f"{look.value(variant)}, hidden state alone"
                one.semilogy(hidden, label=label, linewidth=1, color=style["color"], linestyle=":")
        row[0].set_ylabel(f"{when}: gradient, k = 0 is 1")
    for panel, one in zip(look.panels, axes[0], strict=True):
        one.set_title(panel)
    for one in axes[-1]:
        one.set_xlabel("steps back, k")
    _legend(figure, axes[0][0])
    return figure


PLOTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any], str]] = {
    "scores": (
        "Scores",
        plot_scores,
        "Official metrics of the captions generated for the validation pictures, times 100, with the "
        "checkpoint of the best epoch (by validation CIDEr). Each dot is one seed, the upright bar their "
        "mean, the pale line one standard deviation to both sides.",
    ),
    "cost": (
        "Size and time",
        plot_cost,
        "Trained parameters of the decoder, and of the frame encoder if there is one; and the median time of "
        "an epoch of training, without validation, in one thread beside the other runs (each dot is one "
        "seed). Features of the pictures were computed once beforehand.",
    ),
    "curves": (
        "Loss and validation by epoch",
        plot_curves,
        "Lines are means over seeds, bands reach from the lowest to the highest. The loss is the mean over "
        "the epoch's training captions, with dropout, while the weights change; validation is on captions "
        "that the model wrote itself.",
    ),
    "lengths": (
        "Score by length of people's captions",
        plot_lengths,
        "Validation pictures in groups of about equal size by the mean number of words in people's captions "
        "of them; the mean of the pictures' own CIDEr in each group (document frequencies are those of the "
        "whole set). Compare models within a group; between groups the pictures differ too. Dots are seeds.",
    ),
    "gradients": (
        "The gradient that reaches earlier steps",
        plot_gradients,
        "For a word predicted at step t: the norm of the gradient of its loss with respect to the decoder's "
        "state k steps earlier, as a share of that at k = 0, on a logarithmic scale. Means over captions, "
        "steps and seeds; the same words for every k. The state is all that a step hands to the next: for an "
        "LSTM hidden state and memory together; the dotted line is the part that reaches its hidden state.",
    ),
}


def figure_png(figure: Any) -> bytes:
    """Return a figure as PNG on white, with black text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    return buffer.getvalue()


def figure_svg(figure: Any, name: str) -> str:
    """Return a figure as SVG to be put into a page: no background, text in the page's colour and font."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "currentColor")
    # ids must be unique in the page
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    head, tail = text.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + tail  # as wide as the page allows


# --------------------------------------------------------------------------------------------------
# the page

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --line: #d5d5da; --pale: #f4f4f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #18181a; --line: #3c3c40; --pale: #232326; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
figcaption, .note { font-size: .9rem; opacity: .85; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { white-space: normal; vertical-align: bottom; }
pre { background: var(--pale); padding: .8rem; overflow-x: auto; font-size: .85rem; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; }
"""


def write_report(results: Mapping[str, Any], path: Path, figures: Path | None = None) -> None:
    """Write the page, and the plots as PNG files into ``figures``.

    Args:
        results: what `captioner_training.compare.compare` writes as ``results.json``, with at least one run.
        path: of the HTML file.
        figures: folder for the PNG files; None writes none.

    Raises:
        ReportError: if matplotlib is not installed, or there is no run to report on.
    """
    check_matplotlib()
    if not results["runs"]:
        raise ReportError("there is no finished run to report on")
    parts = []
    for name, (title, plot, text) in PLOTS.items():
        figure = plot(results)
        if figure is None:
            continue
        drawn = figure_svg(figure, name)
        if figures is not None:
            figures.mkdir(parents=True, exist_ok=True)
            figure.set_layout_engine("none")  # it takes long, and has done its work
            write_atomically(figures / f"{name}.png", figure_png(figure))
        parts.append(
            f'<h2 id="{name}">{html.escape(title)}</h2>\n<figure role="group" aria-labelledby="{name}">\n'
            f"{drawn}\n<figcaption>{html.escape(text)}</figcaption>\n</figure>\n"
            + (_gradient_table(results) if name == "gradients" else "")
        )
    write_atomically(path, _page(results, "\n".join(parts)).encode())


def _page(results: Mapping[str, Any], plots: str) -> str:
    title = f"{results['name']}: " + " × ".join(
        f"{key} ({', '.join(values)})" for key, values in results["vary"].items()
    )
    total = math.prod(len(values) for values in results["vary"].values()) * results["seeds"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    failed = "".join(
        f"<li>{html.escape(run)}: {html.escape(why)}</li>" for run, why in results["failures"].items()
    )
    data = "".join(f"<dd>{html.escape(phrase_data(fact))}</dd>" for fact in results["data"])
    runs = (
        f"{len(results['runs'])} of {total} finished: every combination with {results['seeds']} seeds. All "
        "share data, order of the pictures (of a seed), steps, schedule and search; only the keys in the "
        "title differ."
    )
    where = (
        f"{results['date']}, {results['minutes']:.0f} minutes for everything, {results['jobs']} runs at a "
        f"time, {results['processor_minutes']:.0f} minutes of processor time for all runs together; "
        f"{results['cores']} cores ({results['processor'] or 'unknown processor'}), device "
        f"{results['device']}; {versions}"
    )
    facts = [("Runs", runs), ("When and where", where)]
    if results["command"]:
        facts.append(("Command", results["command"]))
    described = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts)
    head, rows = table_rows(results)
    table = _table(head, rows)
    said = "\n".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(results))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<h2>What was run</h2>
<dl>
<dt>Data</dt>{data}
{described}
</dl>
{f"<h2>Runs that failed</h2><ul>{failed}</ul>" if failed else ""}
<details><summary>The config that all runs share</summary>
<pre>{html.escape(results["config"])}</pre></details>
<h2>Findings</h2>
<ul>
{said}
</ul>
<h2>Results</h2>
<div class="wide">{table}</div>
<p class="note">Mean ± standard deviation over seeds; scores times 100 on the validation pictures. The best
epoch was chosen by CIDEr on these same pictures, for all variants alike, so the scores are a little higher
than they would be on pictures that chose nothing. Distinct captions: share of the generated captions that
differ.</p>
{plots}
</body>
</html>
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def _gradient_table(results: Mapping[str, Any]) -> str:
    """Return the plot's numbers at some k."""
    variants = [v for v in variants_of(results) if v.gradients("trained")]
    shown = [k for k in (1, 2, 3, 5, 10) if k <= results["reach"]]
    head = ["", *(f"{when}, k = {k}" for when in ("untrained", "trained") for k in shown)]
    rows = [
        [v.name, *(f"{v.gradients(when)[k]:.2g}" for when in ("untrained", "trained") for k in shown)]
        for v in variants
    ]
    return f'<div class="wide">{_table(head, rows)}</div>\n'
