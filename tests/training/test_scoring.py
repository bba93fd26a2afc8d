"""Files of results against files of references: what is scored, what is said about it."""

import json

import pytest
from captioner_training import metrics, scoring
from captioner_training.metrics import ScoreError, score
from captioner_training.scoring import evaluate_files
from metric_data import FAST, GENERATED, REFERENCES, coco, put_models, results, spice, write

from captioner.tokenizer import split_words

__all__ = ["spice"]  # a fixture


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """Tokenise without Java, which takes a second to start; the numbers are test_metrics' concern."""
    monkeypatch.setattr(metrics, "tokenize", lambda texts: [" ".join(split_words(text)) for text in texts])


@pytest.fixture
def files(tmp_path):
    """Return a function that evaluates captions against references by way of files, without METEOR."""
    folder = tmp_path / "with space"
    folder.mkdir()

    def run(captions, annotations=None, *, name="captions.json", **options):
        references = write(folder / name, annotations or coco(REFERENCES))
        return evaluate_files(
            write(folder / "results.json", captions), references, **{"metrics": FAST, **options}
        )

    return run


def test_files_give_what_score_gives(files):
    found = files(results(GENERATED))
    alone = score(GENERATED, REFERENCES, metrics=FAST)
    assert found.name == "captions"
    assert found.scores.corpus == alone.corpus
    assert found.scores.intervals == alone.intervals
    assert (found.scores.images, found.scores.total_images, found.scores.missing) == (6, 6, ())
    assert not found.scores.partial


def test_ids_of_another_type_give_the_same_scores(files):
    found = files({str(key): caption for key, caption in GENERATED.items()})
    assert found.scores.corpus == score(GENERATED, REFERENCES, metrics=FAST).corpus
    assert "captions whose ids are not written as in the annotations, matched as text: 6" in found.notes


def test_missing_results_count_as_empty_and_are_listed(files):
    part = {key: GENERATED[key] for key in (8, 3, 5)}
    found = files(results(part))
    assert (
        found.scores.corpus
        == score({**dict.fromkeys(REFERENCES, ""), **part}, REFERENCES, metrics=FAST).corpus
    )
    assert found.scores.images == 6
    record = found.to_dict()
    assert (record["missing_count"], record["missing"]) == (3, [11, 7, 20])
    assert "3 of 6 pictures have no caption and count as empty: 11, 7, 20" in record["warnings"]
    assert not any("empty captions" in warning or "covers" in warning for warning in record["warnings"])
    assert "count as empty: 11, 7, 20" in found.format()
    assert record["empty"] == 0
    assert record["length"]["min"] == 5  # of those that are there


def test_images_that_cannot_be_scored_are_left_out(files):
    annotations = coco(REFERENCES | {99: [], 98: [" "]})
    found = files(results(GENERATED | {99: "a dog", 1234: "a cat"}), annotations)
    assert found.scores.corpus == score(GENERATED, REFERENCES, metrics=FAST).corpus
    assert (found.scores.images, found.scores.total_images, found.ignored) == (6, 8, 2)
    assert "pictures without a reference caption, left out: 2 (99, 98)" in found.warnings
    assert "captions of pictures without references, left aside: 2" in found.warnings


def test_a_partial_set(files):
    found = files(results(GENERATED), coco(REFERENCES) | {"info": {"partial": True, "missing_pictures": 12}})
    assert found.to_dict()["partial"] is True
    assert found.format().count("   partial\n") == len(found.scores.corpus)
    assert any(warning.startswith("partial: ") and "12 pictures" in warning for warning in found.warnings)


def test_small_sets_carry_a_warning_on_cider(files):
    assert any(
        "CIDEr is not comparable on so few pictures (6," in w for w in files(results(GENERATED)).warnings
    )
    found = files(results(GENERATED), metrics=("BLEU",))
    assert not any("CIDEr" in warning for warning in found.warnings)


def test_one_caption_for_many_pictures(files):
    found = files(results({**GENERATED, 3: "a dog", 7: "A dog."}))
    assert any(warning.startswith('the caption "a dog" covers 2 of 6 pictures') for warning in found.warnings)
    assert any(warning == "empty captions: 1" for warning in found.warnings)


def test_the_record(files):
    record = json.loads(json.dumps(files(results(GENERATED)).to_dict()))
    assert [*record][:6] == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    assert record["intervals"].keys() == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"}
    for key in ("confidence", "seconds_per_image", "model", "novel"):
        assert record[key] is None
    assert record["published"] == []


def test_published_results_of_the_set(files):
    described = coco(REFERENCES) | {"info": {"description": "COCO 2014 Dataset"}}
    assert files(results(GENERATED), described).compare == "coco"
    assert files(results(GENERATED), name="flickr8k_val.json").compare == "flickr8k"
    found = files(results(GENERATED), described, compare="flickr30k")
    assert "Flickr30k's test split" in found.format()
    assert {row["measured_on"] for row in found.to_dict()["published"]} == {
        "Flickr30k's test split of 1,000 pictures (Karpathy and Li 2015)"
    }
    assert files(results(GENERATED), described, compare="none").compare is None
    assert "Xu et al." not in files(results(GENERATED)).format()


def test_novel_captions(files, tmp_path):
    learned = write(tmp_path / "train.json", coco({1: ["A kite in the SKY!"], 2: ["a dog"]}))
    found = files(results(GENERATED), training=[learned])
    assert found.measures["novel"] == pytest.approx(4 / 5)  # one of six is empty
    assert "80.0 % are none of the 2 training captions" in found.format()
    assert "unknown: give the training captions with --training" in files(results(GENERATED)).format()
    with pytest.raises(ScoreError, match=r"absent.json: cannot be read"):
        files(results(GENERATED), training=[tmp_path / "absent.json"])


def test_spice_is_run_where_its_models_are(files, spice, monkeypatch):
    found = files(results(GENERATED))
    assert "SPICE" not in found.scores.corpus
    assert any(note.startswith("no SPICE: SPICE needs its models") for note in found.notes)
    with pytest.raises(ScoreError, match="SPICE needs its models"):
        files(results(GENERATED), spice=True)
    put_models(spice.lib)
    monkeypatch.setattr(metrics, "_spice", lambda captions, _: [0.25, *[0.1] * (len(captions) - 1)])
    found = files(results(GENERATED))
    assert found.scores.corpus["SPICE"] == pytest.approx(0.75 / 6)
    assert found.to_dict()["SPICE"] == pytest.approx(0.75 / 6)
    assert found.scores.per_image["SPICE"][11] == 0.25  # the first of the references
    assert found.scores.intervals["SPICE"][0] < 0.75 / 6 < found.scores.intervals["SPICE"][1]
    assert "\nSPICE     12.5 " in found.format()
    assert "SPICE" not in files(results(GENERATED), spice=False).scores.corpus


def test_where_spice_fails_the_other_scores_are_kept(files, spice, monkeypatch):
    put_models(spice.lib)

    def fail(*_):
        raise ScoreError("SPICE, written for Java 8, cannot run on openjdk version 25: no")

    monkeypatch.setattr(metrics, "_spice", fail)
    found = files(results(GENERATED))
    assert found.scores.corpus == score(GENERATED, REFERENCES, metrics=FAST).corpus
    assert "SPICE, written for Java 8, cannot run on openjdk version 25: no" in found.warnings
    assert scoring.SPICE not in found.to_dict()


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (results({1: "a", 4: "b"}), "none of its 2 images has captions in the annotations"),
        (results({3: "a"}) * 2, "entry 1: image 3 occurs twice"),
        ("{", "is not JSON"),
    ],
)
def test_results_that_cannot_be_scored(files, captions, message):
    with pytest.raises(ScoreError, match=message) as caught:
        files(captions)
    assert "results.json: " in str(caught.value)
    assert "\n" not in str(caught.value)
