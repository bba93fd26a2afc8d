"""Configs, annotations and results that are damaged, or are anything at all: read, or refused in one line."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from captioner_training import formats
from captioner_training.config import ConfigError, load_config
from captioner_training.data import DataError
from captioner_training.metrics import ScoreError, load_annotations, load_references
from captioner_training.results import load_results, match_results
from fuzz_worker import EXAMPLES, ROOT, only
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import hostile

quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
odd_text = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\u2028",
        "\ud800",
        "=1+1",
        "1e999",
        "nan",
        "\x1b[0m",
        "٣",
        "²",
        "a/../b",
        "video" + "9" * 5000,
    ]
) | st.text(max_size=6)
odd = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**63, 10**400, float("inf"), float("nan"), 1e308])
    | odd_text
)
anything = st.recursive(
    odd,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3),
    max_leaves=6,
)

ROWS = [("a.jpg", "a dog runs"), ("b.jpg", "two cats, sitting"), ("sub/c.png", 'a "red" car')]
COCO = {
    "info": {"description": "x", "split": "val", "media": "image", "images": ["."]},
    "images": [
        {"id": i, "file_name": name, "split": "train", "start": 1.5} for i, (name, _) in enumerate(ROWS)
    ],
    "annotations": [{"id": i, "image_id": i, "caption": text} for i, (_, text) in enumerate(ROWS)],
}
KARPATHY = {
    "images": [
        {
            "filename": name,
            "filepath": "x",
            "split": "restval",
            "cocoid": i,
            "sentences": [{"raw": text, "tokens": text.split()}],
        }
        for i, (name, text) in enumerate(ROWS)
    ]
}
MSRVTT = {
    "videos": [
        {"video_id": f"video{i}", "split": "validate", "start time": 1.0, "end time": 2.0} for i in range(3)
    ],
    "sentences": [{"video_id": f"video{i}", "caption": text} for i, (_, text) in enumerate(ROWS)],
}
RESULTS = [{"image_id": i, "caption": text} for i, (_, text) in enumerate(ROWS)]
RECORDS = [{"path": name, "caption": text, "split": "train", "start": "1:02"} for name, text in ROWS]
JSONS = {"coco": COCO, "karpathy": KARPATHY, "msrvtt": MSRVTT, "table": RECORDS}
TEXTS = {
    "flickr": "".join(f"{name}#0\t{text}\n" for name, text in ROWS),
    "msvd": "".join(f"abcdefghijk_{i}_{i + 5} {text}\n" for i, (_, text) in enumerate(ROWS)),
    "msvd table": "VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\n"
    + "".join(
        f'abcdefghijk,{i},{i + 5},1,clean,9,English,"{text.replace(chr(34), "")}"\n'
        for i, (_, text) in enumerate(ROWS)
    ),
    "csv": "path,caption,split,start\n"
    + "".join(f'{name},"{text.replace(chr(34), chr(34) * 2)}",train,1\n' for name, text in ROWS),
    "tsv": "path\tcaption\n" + "".join(f"{name}\t{text}\n" for name, text in ROWS),
    "bars": "image_name| comment_number| comment\n" + "".join(f"{name}| 0| {text}\n" for name, text in ROWS),
    "list": "a.jpg\nb.jpg\nc.jpg\n",
    "lines": "".join(json.dumps(record) + "\n" for record in RECORDS),
}
CONFIG = yaml.safe_load((ROOT / "configs" / "own_pictures.yaml").read_text("utf-8"))


def altered(data: Any, picks: list[tuple[int, Any]]) -> Any:
    """Put anything in the place of some values, anywhere within."""
    data = json.loads(json.dumps(data))
    for number, value in picks:
        places: list[tuple[Any, Any]] = []
        pending = [data]
        while pending:
            here = pending.pop()
            for key in here if isinstance(here, dict) else range(len(here)):
                places.append((here, key))
                if isinstance(here[key], (dict, list)):
                    pending.append(here[key])
        if not places:
            break
        container, key = places[number % len(places)]
        container[key] = value
    return data


def dump(data: Any) -> bytes:
    return json.dumps(data, default=str).encode()


picks = st.lists(st.tuples(st.integers(0, 10**6), anything), min_size=1, max_size=3)


def read_all(path: Path, kind: str | None) -> None:
    """Read a file as every reader of captions does."""
    only(DataError, lambda: formats.read(path), path)
    if kind in formats.FORMATS:
        only(DataError, lambda: formats.read(path, kind), path)
    only(ScoreError, lambda: load_annotations(path), path)
    only(ScoreError, lambda: load_references(path), path)
    only(ScoreError, lambda: load_results(path), path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


def test_the_good_ones_are_read(place: Path) -> None:
    for name, data in {
        **{k: dump(v) for k, v in JSONS.items()},
        **{k: v.encode() for k, v in TEXTS.items()},
    }.items():
        path = place / "good"
        path.write_bytes(data)
        source = formats.read(path)
        assert len(source.entries or source.listed) == 3, name


@quick
@given(kind=st.sampled_from(sorted(JSONS)), picks=picks)
def test_fuzz_annotations_with_anything_in_them(kind: str, picks: list[tuple[int, Any]], place: Path) -> None:
    path = place / "annotations.json"
    try:
        path.write_bytes(dump(altered(JSONS[kind], picks)))
    except ValueError:  # more digits than Python writes
        return
    read_all(path, kind)


@quick
@given(
    kind=st.sampled_from(sorted({**JSONS, **TEXTS})),
    seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=3),
)
def test_fuzz_damaged_annotations(kind: str, seeds: list[int], place: Path) -> None:
    data = dump(JSONS[kind]) if kind in JSONS else TEXTS[kind].encode()
    for seed in seeds:
        data = hostile.mutate(data, random.Random(seed))
    path = place / "annotations"
    path.write_bytes(data)
    read_all(path, kind.split()[0])


@quick
@given(
    kind=st.sampled_from(sorted(TEXTS)), lines=st.lists(st.tuples(st.integers(0, 200), odd_text), max_size=4)
)
def test_fuzz_odd_characters(kind: str, lines: list[tuple[int, str]], place: Path) -> None:
    text = TEXTS[kind]
    for at, piece in lines:
        text = text[: at % len(text)] + piece + text[at % len(text) :]
    path = place / "annotations.csv"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    read_all(path, kind.split()[0])


@quick
@given(picks=picks, whole=anything, use=st.integers(0, 3))
def test_fuzz_results(picks: list[tuple[int, Any]], whole: Any, use: int, place: Path) -> None:
    path, references = place / "results.json", place / "references.json"
    references.write_bytes(dump(COCO))
    known = load_annotations(references)
    try:
        path.write_bytes(dump(whole if use == 0 else altered(RESULTS if use < 3 else RECORDS, picks)))
    except ValueError:
        return
    only(ScoreError, lambda: match_results(load_results(path), known, path), path)


@quick
@given(picks=picks)
def test_fuzz_configs_with_anything_in_them(picks: list[tuple[int, Any]], place: Path) -> None:
    path = place / "config.yaml"
    try:
        text = yaml.safe_dump(altered(CONFIG, picks))
        path.write_text(text, "utf-8")
    except (ValueError, yaml.YAMLError):
        return
    only(ConfigError, lambda: load_config(path), path)


@quick
@given(seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=3), piece=odd_text, at=st.integers(0, 2000))
def test_fuzz_damaged_configs(seeds: list[int], piece: str, at: int, place: Path) -> None:
    data = (ROOT / "configs" / "small.yaml").read_bytes()
    data = data[: at % len(data)] + piece.encode("utf-8", "surrogatepass") + data[at % len(data) :]
    for seed in seeds:
        data = hostile.mutate(data, random.Random(seed))
    path = place / "config.yaml"
    path.write_bytes(data)
    only(ConfigError, lambda: load_config(path), path)


# found, and what it takes to find them again


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (None, '{"images": [], "a": ' + "9" * 5000 + "}"),
        ("table", '{"path": "a.jpg", "caption": "x"}\n{"path": ' + "9" * 5000 + "}"),
        ("table", json.dumps([{"path": "a.jpg", "caption": "x", "start": 10**400}])),
        ("coco", json.dumps({**COCO, "annotations": [{"id": [], "image_id": 0, "caption": "x"}]})),
        ("karpathy", json.dumps({"videos": 1})),
        ("msrvtt", json.dumps({"images": []})),
        ("msrvtt", json.dumps({"videos": [{"video_id": "video" + "9" * 5000}], "sentences": []})),
        ("msrvtt", json.dumps({**MSRVTT, "sentences": [{"video_id": [], "caption": "x"}]})),
        ("msvd", TEXTS["msvd table"].replace(",0,5,", ",²,5,")),
        ("coco", json.dumps({**COCO, "images": [{"id": "a\nb\x1b[0m", "file_name": ""}]})),
        (None, "x\ry z\n"),
    ],
)
def test_annotations_that_raised_something_else(kind: str | None, data: str, place: Path) -> None:
    path = place / "found"
    path.write_text(data, "utf-8")
    read_all(path, kind)


def test_merges_of_merges_do_not_grow(place: Path) -> None:
    """Ten merges of ten merges of …: ten thousand million keys, if each were kept."""
    levels = ["l0: &l0 {k: 1}"]
    levels += [f"l{n}: &l{n} {{<<: [{', '.join([f'*l{n - 1}'] * 10)}]}}" for n in range(1, 11)]
    path = place / "laughs.yaml"
    path.write_text("\n".join(levels), "utf-8")
    begun = time.process_time()
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(path)
    assert time.process_time() - begun < 5


def test_aliases_of_aliases_do_not_grow(place: Path) -> None:
    levels = ["l0: &l0 [x]"] + [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 11)]
    path = place / "laughs.yaml"
    path.write_text("\n".join(levels) + "\nname: *l10\nstages: *l10\ndata: *l10\n", "utf-8")
    begun = time.process_time()
    with pytest.raises(ConfigError):
        load_config(path)
    assert time.process_time() - begun < 5


def test_a_key_with_a_line_break_stays_one_line(place: Path) -> None:
    path = place / "config.yaml"
    path.write_text('"a\\nb": 1\n', "utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).isprintable()


def test_a_config_that_does_not_end_is_not_read(place: Path) -> None:
    path = place / "config.yaml"
    path.write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(ConfigError, match="no config"):
        load_config(path)
