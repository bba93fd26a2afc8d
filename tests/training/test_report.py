"""The report: numbers as by hand, sentences that hold whatever came out, and a page that stands alone."""

import copy
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from captioner_training import report
from captioner_training.report import (
    ReportError,
    by_length,
    fades_at,
    figure_png,
    findings,
    length_groups,
    pairings,
    plot_scores,
    summary_table,
    table_rows,
    variants_of,
    write_report,
)
from PIL import Image

CIDER = {"gru": {1: 0.10, 2: 0.12}, "lstm": {1: 0.20, 2: 0.26}}


def made_up(cider: dict[str, dict[int, float]] | None = None, **changes: Any) -> dict[str, Any]:
    """Return what a comparison of a GRU and an LSTM with two seeds might have given."""
    runs = []
    for cell, scores in (cider or CIDER).items():
        for seed, value in scores.items():
            fading = [0.5 if cell == "gru" else 0.9] * 4
            norms = [2.0, *(2.0 * share ** (k + 1) for k, share in enumerate(fading))]
            hidden = norms if cell == "gru" else [norms[0], *(norm / 2 for norm in norms[1:])]
            gradients = {
                when: {"state": norms, "hidden": hidden, "pairs": 30} for when in ("trained", "untrained")
            }
            runs.append(
                {
                    "settings": {"decoder.cell": cell},
                    "seed": seed,
                    "epochs": [
                        {"epoch": n, "loss": 5.0 - n, "seconds": 10.0 * n, "CIDEr": value * n / 3}
                        for n in (1, 2, 3)
                    ],
                    "parameters": {"decoder": 3000 if cell == "gru" else 4000, "encoder": 100},
                    "vocabulary": 50,
                    "scores": {"CIDEr": value, "METEOR": value / 2, "BLEU-4": value / 4},
                    "by_picture": [{"words": 6.0 + n, "CIDEr": value * n} for n in range(8)],
                    "distinct": 0.5,
                    "gradients": {**gradients, "captions": 10},
                    "minutes": 1.0,
                    "processor_minutes": 0.9,
                }
            )
    facts = {
        "name": "made up",
        "command": "captioner compare --data DATA",
        "date": "2026-01-02",
        "minutes": 12.3,
        "processor_minutes": 20.0,
        "cores": 2,
        "jobs": 2,
        "device": "cpu",
        "processor": "a processor",
        "versions": {"captioner": "0", "torch": "2"},
        "vary": {"decoder.cell": list(cider or CIDER)},
        "seeds": 2,
        "reach": 4,
        "data": [
            {
                **{"kind": "training", "name": "shapes", "pictures": 10, "captions": 20, "of": 24},
                **{"annotations": "shapes.json", "how": "drawn at random", "hash": ""},
            }
        ],
        "config": "name: made up\n",
        "failures": {},
        "runs": runs,
    }
    return {**facts, **changes}


class Page(HTMLParser):
    """Collects what stands in a page, and sees that elements are closed in order."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One written report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(made_up(), folder / "report.html", folder / "figures")
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------
# numbers


def test_the_table():
    head, rows = table_rows(made_up())
    assert head[0] == ""
    assert rows == [
        ["gru", "3,000", "20.0 ± 0.0", "2.00 ± 0.00", "11.0 ± 1.4", "5.5 ± 0.7", "2.8 ± 0.4", "50 %"],
        ["lstm", "4,000", "20.0 ± 0.0", "2.00 ± 0.00", "23.0 ± 4.2", "11.5 ± 2.1", "5.8 ± 1.1", "50 %"],
    ]  # the sample deviation of 10 and 12 is sqrt(2)
    lines = summary_table(made_up()).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].startswith("lstm")


def test_runs_are_paired_with_those_that_differ_in_nothing_else():
    (pair,) = pairings(made_up())
    assert (pair.key, pair.first, pair.second) == ("decoder.cell", "gru", "lstm")
    assert pair.differences == pytest.approx([10, 14])
    results = made_up()
    del results["runs"][0]  # the GRU of seed 1
    (pair,) = pairings(results)
    assert pair.differences == pytest.approx([14])


def test_pictures_are_grouped_by_the_length_of_their_captions():
    results = made_up()
    groups = length_groups(results)  # of 6 to 13 words
    assert [high for _, high in groups] == [7.0, 9.0, 11.0, 13.0]
    assert [low for low, _ in groups] == [float("-inf"), 7.0, 9.0, 11.0]
    gru = variants_of(results)[0]
    # pictures n = 0 to 7 score value * n
    assert by_length(gru, groups) == [
        pytest.approx([100 * value * mean for value in (0.10, 0.12)]) for mean in (0.5, 2.5, 4.5, 6.5)
    ]


def test_pictures_of_one_length_stay_together():
    results = made_up()
    for run in results["runs"]:
        for number, picture in enumerate(run["by_picture"]):
            picture["words"] = 9.0 if number else 5.0
    groups = length_groups(results)
    assert [high for _, high in groups] == [9.0]
    assert report.group_names(groups) == ["all"]


def test_where_a_gradient_fades():
    assert fades_at([1.0, 0.5, 0.1, 0.09, 0.2]) == 3
    assert fades_at([1.0, 0.5, 0.2]) is None


def test_gradients_are_relative_to_their_own_step():
    gru, lstm = variants_of(made_up())
    assert gru.gradients("trained") == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625])
    assert lstm.gradients("trained", "hidden") == pytest.approx([1, 0.45, 0.405, 0.3645, 0.32805])


# --------------------------------------------------------------------------------------------------
# words


def sentences(**changes: Any) -> str:
    return "\n".join(findings(made_up(**changes)))


def test_a_clear_difference_is_said():
    said = sentences()
    assert "The highest mean CIDEr is that of lstm: 23.0 ± 4.2, before gru with 11.0 ± 1.4." in said
    assert "The difference of 12.0 is larger than the spread over seeds." in said
    assert "decoder.cell: lstm is 12.0 CIDEr above gru on average over 2 pairs" in said
    assert "higher in 2 of 2)." in said
    assert "lstm has 4,000 parameters, 1.33 times as many as that of gru (3,000)" in said
    assert "gru 4 steps back; lstm not within 4 steps" in said


def test_a_difference_within_the_spread_is_not_sold_as_more():
    said = sentences(cider={"gru": {1: 0.10, 2: 0.30}, "lstm": {1: 0.20, 2: 0.22}})
    assert "within the spread over seeds: take them as equal" in said
    assert "higher in 1 of 2); not in all of them" in said


def test_a_loss_is_said_too():
    said = sentences(cider={"gru": {1: 0.30, 2: 0.32}, "lstm": {1: 0.20, 2: 0.22}})
    assert "The highest mean CIDEr is that of gru" in said
    assert "lstm is 10.0 CIDEr below gru" in said
    assert "higher in 0 of 2)." in said


def test_one_run_of_each_says_nothing_about_chance():
    said = sentences(cider={"gru": {1: 0.30}, "lstm": {1: 0.20}}, seeds=1)
    assert "With one run of each nobody can say whether that is more than chance." in said


def test_one_variant_alone():
    said = sentences(cider={"gru": {1: 0.30, 2: 0.2}})
    assert said.startswith("The highest mean CIDEr is that of gru: 25.0 ± 7.1.")


# --------------------------------------------------------------------------------------------------
# the page


def test_the_page_needs_nothing_else(page):
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "img")
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href", "data"):
                assert (value or "").startswith("#"), (tag, value)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name.endswith("href"):
                assert value[1:] in ids
            for target in re.findall(r"url\(#([^)]+)\)", value or ""):
                assert target in ids


def test_the_page_tells_what_was_run(page):
    assert len(page.all("h1")) == 1
    assert "made up: decoder.cell (gru, lstm)" in page.text
    assert "training: shapes, 10 of 24 pictures (drawn at random) with 20 captions" in page.text
    assert "4 of 4 finished" in page.text
    assert "2026-01-02, 12 minutes for everything, 2 runs at a time" in page.text
    assert "2 cores (a processor)" in page.text
    assert "torch 2" in page.text
    assert "captioner compare --data DATA" in page.text
    assert "name: made up" in page.text
    for sentence in findings(made_up()):
        assert sentence in page.text
    assert "23.0 ± 4.2" in page.text


def test_every_plot_is_there_and_follows_the_page_s_colours(page, folder):
    assert len(page.all("svg")) == len(page.all("figure")) == len(page.all("figcaption")) == 5
    for svg in page.all("svg"):
        assert "width" not in svg
        assert svg["viewbox"]
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "currentColor" in text
    assert "#010203" not in text
    assert "prefers-color-scheme: dark" in text
    for path in (folder / "figures").iterdir():
        assert Image.open(path).format == "PNG"


def test_texts_from_outside_are_shown_and_not_obeyed(tmp_path):
    results = made_up(name="<script>alert(1)</script>", failures={"gru & co": "<b>why</b>"})
    results["data"][0]["name"] = "<i>"
    write_report(results, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.all("script") == page.all("b") == page.all("i") == []
    assert "Runs that failed" in page.text
    assert "gru & co: <b>why</b>" in page.text


def test_a_grid_with_holes_and_without_gradients(tmp_path):
    results = made_up()
    results["vary"] = {"decoder.cell": ["rnn_tanh", "gru", "lstm"]}
    del results["runs"][0]
    for run in results["runs"]:
        run["gradients"] = {}
    write_report(results, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "3 of 6 finished" in page.text
    assert "gru (1 of 2 seeds)" in page.text
    assert len(page.all("svg")) == 4


def test_two_keys_make_panels(tmp_path):
    results = made_up()
    results["vary"]["decoder.attention"] = ["none", "dot"]
    more = copy.deepcopy(results["runs"])
    for runs, attention in ((results["runs"], "none"), (more, "dot")):
        for run in runs:
            run["settings"]["decoder.attention"] = attention
    results["runs"] += more
    write_report(results, tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert text.count("attention dot") >= 3
    assert "decoder.attention: dot is 0.0 CIDEr above none" in text


def test_dots_stand_where_the_scores_are():
    axes = plot_scores(made_up()).axes
    assert [one.get_title() for one in axes] == ["CIDEr × 100", "METEOR × 100", "BLEU-4 × 100"]
    dots = [sorted(line.get_xdata()) for line in axes[0].lines if line.get_marker() == "o"]
    assert dots == [pytest.approx([10, 12]), pytest.approx([20, 26])]


def test_a_png_is_white_for_any_page():
    picture = Image.open(io.BytesIO(figure_png(plot_scores(made_up())))).convert("RGB")
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(ReportError, match="no finished run"):
        write_report(made_up(runs=[]), tmp_path / "report.html")
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ReportError, match=r'pip install "captioner\[figures\]"'):
        write_report(made_up(), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
