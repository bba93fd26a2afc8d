"""Score a set of captions as papers do, describe what they leave out, and say what to beware of."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from captioner_training.measures import common_caption_warning, few_pictures_warning, measure
from captioner_training.metrics import (
    METRICS,
    SPICE,
    Annotations,
    ScoreError,
    Scorer,
    Scores,
    format_table,
    load_annotations,
    spice_missing,
)
from captioner_training.published import DATA_SETS, format_published, guess, published
from captioner_training.results import load_results, match_results

_LISTED = 20
"""How many ids a line names before it stops; JSON names all."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is known about a set of captions.

    Attributes:
        name: of the data set.
        scores: by the official metrics.
        measures: what `captioner_training.measures.measure` gives.
        warnings: lines that anybody who reports the scores should know.
        notes: lines about what was done.
        compare: which of `captioner_training.published.DATA_SETS` the pictures are from, if it is known.
        ignored: how many captions were of pictures without references.
        confidence: how well the captions' confidence is calibrated, when a captioner made them.
        seconds_per_image: from file to words, when a captioner made them.
        model: the captioner's name.
    """

    name: str
    scores: Scores
    measures: dict[str, Any]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    compare: str | None = None
    ignored: int = 0
    confidence: dict[str, Any] | None = None
    seconds_per_image: float | None = None
    model: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a record ready for JSON; docs/evaluation.md describes it."""
        rows = published(self.compare) if self.compare else []
        return {
            **self.scores.to_dict(),
            "ignored": self.ignored,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            **self.measures,
            "confidence": self.confidence,
            "seconds_per_image": self.seconds_per_image,
            "data": self.name,
            "model": self.model,
            "published": [
                {
                    "method": row.method,
                    "scores": dict(row.scores),
                    "measured_on": DATA_SETS[row.data],
                    "source": row.source,
                }
                for row in rows
            ],
        }

    def format(self) -> str:
        """Return everything as plain text, the table beside published results last."""
        made = f", captions by {self.model}" if self.model else ""
        lines = [f"{self.name}: {self.scores.images} pictures{made}", format_table(self.scores), ""]
        lines += [f"{name:<13}{text}" for name, text in self._described()]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [f"note: {note}" for note in self.notes]
        if self.compare:
            note = f"{self.name}, {self.scores.images} pictures{', partial' if self.scores.partial else ''}"
            lines += ["", format_published(self.compare, self.scores.corpus, note)]
        return "\n".join(lines)

    def _described(self) -> list[tuple[str, str]]:
        """Return the measures as pairs of a word and a phrase."""
        found = self.measures
        length, people = found["length"], found["length"]["references"]
        lines = []
        if length["mean"] is not None:
            lines.append(
                (
                    "length",
                    f"{length['mean']:.1f} ± {length['sd']:.1f} words, {length['min']} to {length['max']} "
                    f"(people's: {people['mean']:.1f} ± {people['sd']:.1f})",
                )
            )
        words = found["vocabulary"]
        lines.append(
            ("vocabulary", f"{words['words']} different words (people's: {words['references']} in theirs)")
        )
        if found["distinct"] is not None:
            lines.append(("distinct", f"{100 * found['distinct']:.1f} % of the captions are different ones"))
        novel = found["novel"]
        lines.append(
            (
                "novel",
                "unknown: give the training captions with --training"
                if novel is None
                else f"{100 * novel:.1f} % are none of the {found['training_captions']} training captions",
            )
        )
        lines += [
            ("most common" if n == 0 else "", f'{c["count"]} x "{c["caption"]}"')
            for n, c in enumerate(found["common"])
            if c["count"] > 1
        ]
        if self.confidence is not None:
            c = self.confidence
            lines.append(
                (
                    "confidence",
                    f"mean {c['mean']:.3f}, right content words {c['content_share']:.3f}, calibration error "
                    f"{c['error']:.3f}" + ("" if c["calibrated"] else " (the model has no calibration)"),
                )
            )
        if self.seconds_per_image is not None:
            lines.append(("time", f"{self.seconds_per_image:.3f} seconds a picture, from file to words"))
        return lines


def assess(
    name: str,
    captions: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    annotations: Annotations,
    *,
    scorer: Scorer | None = None,
    metrics: Sequence[str] = METRICS,
    spice: bool | None = None,
    intervals: bool = True,
    training: Collection[str] | None = None,
    compare: str | None = None,
    ignored: int = 0,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Score captions and describe them.

    Args:
        name: of the data set.
        captions: by image id; images without one count as having an empty one.
        references: people's captions of the images to score.
        annotations: where these are from.
        scorer: of ``references``, if it is there already.
        metrics: which of `captioner_training.metrics.METRICS`.
        spice: run SPICE too; None: if its models are there.
        intervals: also compute bootstrap intervals.
        training: the captions that the model was trained on, if they are known.
        compare: the data set whose published results to print.
        ignored: how many captions were left aside, for a warning.
        notes: lines to pass on.

    Raises:
        ScoreError: as for `captioner_training.metrics.score`, and for ``spice=True`` without its models.
    """
    missing = tuple(key for key in references if key not in captions)
    complete = {key: captions.get(key, "") for key in references}
    lacking = spice_missing()
    if spice and lacking:
        raise ScoreError(lacking)
    scorer = scorer or Scorer(references)
    scores = scorer.score(complete, metrics=metrics, intervals=intervals)
    warnings, notes = [], list(notes)
    if spice is None and lacking:
        notes.append(f"no SPICE: {lacking}")
    elif spice is not False:
        try:
            scores = _joined(scores, scorer.score(complete, metrics=(SPICE,), intervals=intervals))
        except ScoreError as error:  # the other scores, and the captions, are worth keeping
            warnings.append(str(error))
    scores = replace(
        scores, missing=missing, total_images=len(annotations.images), partial=annotations.partial
    )
    given = {key: complete[key] for key in captions if key in complete}
    measures = measure(given, references, training)
    empty = measures["empty"]
    warnings = [
        *_data_warnings(scores, annotations, missing, ignored),
        *([f"empty captions: {empty}"] if empty else []),
        *filter(
            None,
            (
                few_pictures_warning(scores.images) if "CIDEr" in scores.corpus else None,
                common_caption_warning(given),
            ),
        ),
        *warnings,
    ]
    return Evaluation(name, scores, measures, tuple(warnings), tuple(notes), compare, ignored)


def evaluate_files(
    results: str | PathLike[str],
    annotations: str | PathLike[str],
    *,
    metrics: Sequence[str] = METRICS,
    spice: bool | None = None,
    intervals: bool = True,
    training: Sequence[Path] = (),
    compare: str = "auto",
) -> Evaluation:
    """Score a file of captions against a COCO annotation file.

    All annotated images are scored: one without a result counts as having an empty caption, and is listed.
    Results of other images are left aside, and counted.

    Args:
        results: see `captioner_training.results.load_results`.
        annotations: see `captioner_training.metrics.load_annotations`.
        metrics: which of `captioner_training.metrics.METRICS`.
        spice: run SPICE too; None: if its models are there.
        intervals: also compute bootstrap intervals.
        training: files of the captions that the model was trained on, in COCO's format.
        compare: the data set whose published results to print: one of
            `captioner_training.published.DATA_SETS`, ``none``, or ``auto`` to guess it.

    Raises:
        ScoreError: as for the functions that read the files, and `assess`.
    """
    known = load_annotations(annotations)
    match = match_results(load_results(results), known, results)
    notes = [
        f"captions whose ids are not written as in the annotations, matched {way}: {count}"
        for way, count in match.ways.items()
    ]
    return assess(
        Path(annotations).stem,
        match.captions,
        known.references,
        known,
        metrics=metrics,
        spice=spice,
        intervals=intervals,
        training=training_captions(training, known, Path(annotations)),
        compare=choose_published(compare, known, Path(annotations)),
        ignored=len(match.surplus),
        notes=notes,
    )


def training_captions(
    files: Sequence[Path], annotations: Annotations | None = None, path: Path | None = None
) -> list[str] | None:
    """Return the captions of files in COCO's format; without files of the prepared folder's ``train.json``.

    Args:
        files: captions that a model was trained on.
        annotations: what it is evaluated on.
        path: where this is from; ``train.json`` beside it is taken if both say of which split they are.

    Returns:
        None if nothing is known.

    Raises:
        ScoreError: a file cannot be used.
    """
    if not files and annotations is not None and path is not None and "split" in annotations.info:
        beside = path.parent / "train.json"
        if beside.is_file() and annotations.info["split"] != "train":
            files = [beside]
    if not files:
        return None
    return [
        caption for file in files for texts in load_annotations(file).references.values() for caption in texts
    ]


def choose_published(compare: str, annotations: Annotations, path: Path, *names: str) -> str | None:
    """Return which published results to print.

    Args:
        compare: one of `captioner_training.published.DATA_SETS`, ``none``, or ``auto`` to guess it by what
            the annotations say of themselves, ``names``, and how the file and its folder are called.
        annotations: the references.
        path: where they are from.
        names: what else the data set is called.
    """
    if compare != "auto":
        return compare if compare in DATA_SETS else None
    described = annotations.info.get("description")
    place = path.absolute()
    return guess(
        [*([described] if isinstance(described, str) else []), *names, place.name, place.parent.name]
    )


def _joined(scores: Scores, more: Scores) -> Scores:
    return replace(
        scores,
        corpus={**scores.corpus, **more.corpus},
        per_image={**scores.per_image, **more.per_image},
        intervals={**scores.intervals, **more.intervals},
    )


def _data_warnings(
    scores: Scores, annotations: Annotations, missing: Sequence[Hashable], ignored: int
) -> list[str]:
    lines = []
    if scores.partial:
        lost = annotations.info.get("missing_pictures")
        how_many = f" ({lost} pictures are missing)" if lost else ""
        lines.append(
            f"partial: this data set is only partly there{how_many}; scores on all of it would be others"
        )
    if missing:
        lines.append(
            f"{len(missing)} of {scores.images} pictures have no caption and count as empty: "
            f"{_listed(missing)}"
        )
    if annotations.without:
        lines.append(
            f"pictures without a reference caption, left out: {len(annotations.without)} "
            f"({_listed(annotations.without)})"
        )
    if ignored:
        lines.append(f"captions of pictures without references, left aside: {ignored}")
    return lines


def _listed(keys: Sequence[Hashable]) -> str:
    return ", ".join(map(str, keys[:_LISTED])) + (", …" if len(keys) > _LISTED else "")
