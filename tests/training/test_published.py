"""Published results: complete, plausible, and printed with their sources."""

import pytest
from captioner_training.metrics import OFFICIAL
from captioner_training.published import DATA_SETS, PUBLISHED, format_published, guess, published


def test_every_row_has_a_source_and_plausible_scores():
    assert {row.data for row in PUBLISHED} == {*DATA_SETS}
    for row in PUBLISHED:
        assert "arXiv" in row.source
        assert len(row.method) < 24
        assert {*row.scores} <= {*OFFICIAL, "METEOR", "CIDEr", "SPICE"}
        bleu = [row.scores[name] for name in OFFICIAL if name in row.scores and "BLEU" in name]
        assert bleu == sorted(bleu, reverse=True)
        assert all(10 < score < 130 for score in row.scores.values())  # times 100


def test_figures_that_the_data_came_with():
    rows = {row.method: row.scores for row in published("flickr8k")}
    assert rows["soft attention, VGG"]["BLEU-4"] == 19.5
    assert rows["soft attention, VGG"]["METEOR"] == 18.93
    assert rows["hard attention, VGG"]["BLEU-4"] == 21.3
    assert rows["hard attention, VGG"]["METEOR"] == 20.30
    assert rows["SCA-CNN, ResNet"] == {"BLEU-4": 25.8, "METEOR": 22.4}


@pytest.mark.parametrize(
    ("texts", "data"),
    [
        (["COCO 2014 Dataset"], "coco"),
        (["", "captions_val2014.json", "MSCOCO"], "coco"),
        (["my pictures", "flickr_8k"], "flickr8k"),
        (["Flickr 30K"], "flickr30k"),
        (["groceries", "val"], None),
        ([], None),
    ],
)
def test_guess(texts, data):
    assert guess(texts) == data


def test_table():
    table = format_published("flickr8k", {"BLEU-4": 0.226, "CIDEr": 0.5716}, "val, 1000 pictures")
    lines = table.splitlines()
    assert lines[0].split() == ["x", "100", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "CIDEr"]
    assert lines[1].split() == ["these", "captions", "-", "-", "-", "22.6", "-", "57.2"]
    assert lines[2].split() == [
        "soft",
        "attention,",
        "VGG",
        "[1]",
        "67.0",
        "44.8",
        "29.9",
        "19.5",
        "18.9",
        "-",
    ]
    assert "these captions: val, 1000 pictures; [n]: Flickr8k's test split" in table
    assert "\n[1] Xu et al. 2015" in table
    assert "\n[2] Chen et al. 2017" in table
