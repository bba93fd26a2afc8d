"""On a Ray cluster of two machines (in name), each with one worker."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import elsewhere
import psutil
import pytest
from elsewhere import (
    Broken,
    Deadly,
    check_records,
    kill_one,
    len_of_caption,
    packed,
    plain,
    processes,
    sources_of,
    write_files,
    write_model,
)

from captioner.batch.on_ray import AHEAD, ClusterError, Desk, Worker, caption_on_ray, import_ray
from captioner.batch.sources import Source


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "lively.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_files(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def many(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same under four names each: enough for something to be left when some is done."""
    place = tmp_path_factory.mktemp("many")
    for path in folder.iterdir():
        for number in range(4):
            os.link(path, place / f"{number}-{path.name}")
    return place


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason='Ray is not installed: pip install "captioner[ray]"')
    ray = import_ray()
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    for module in (sys.modules[__name__], elsewhere):  # which the workers cannot import
        ray.cloudpickle.register_pickle_by_value(module)
    ray.init(cluster.address, log_to_driver=False, logging_level="CRITICAL")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def workers() -> list[psutil.Process]:
    return processes("MapWorker")


def test_same_records_although_a_worker_is_killed(model: Path, folder: Path, cluster: Any) -> None:
    sources = [*sources_of(folder), *packed(folder)]
    options = {"sample": True, "seed": 5}
    caption = partial(caption_on_ray, model=model, options=options, batch_size=4)
    # two workers, chunks of four
    records = kill_one(caption, sources, workers, most=4 * (AHEAD * 2 + 2))
    check_records(records, plain(model, sources, **options))


@pytest.mark.slow
def test_a_file_that_kills_whoever_reads_it(model: Path, folder: Path, cluster: Any) -> None:
    sources = [*packed(folder)[:20], Deadly("deadly.jpg"), *packed(folder)[20:]]
    records = list(caption_on_ray(sources, model=model, batch_size=4))
    assert Counter(record["path"] for record in records) == Counter(source.path for source in sources)
    assert [record["path"] for record in records if record["error"]] == ["deadly.jpg"]


@dataclass(frozen=True)
class Fatal(Source):
    """Ends whoever reads it, but the test."""

    def read(self) -> bytes:
        raise SystemExit


def test_what_workers_die_of_is_found_out(
    model: Path, folder: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    desk = ray.remote(Desk).options(num_cpus=0).remote()
    setup = {
        "checkpoint": ray.put(model.read_bytes()),
        "options": {"n_best": 2},
        "clips": {},
        "look": len_of_caption,
        "precision": "float32",
        "batch_size": 8,
        "folder": str(folder),
        "threads": 1,
        "gpu": False,
    }
    monkeypatch.chdir(folder)  # where the worker goes
    worker = Worker(desk, setup)
    chunk = list(enumerate([Source("a", "00.png"), Fatal("fatal"), Source("c", str(folder / "02.png"))]))
    ray.get(desk.add.remote({7: ray.cloudpickle.dumps(chunk)}, [], True))
    assert ray.get(desk.after.remote(0)) == [7]
    assert ray.get(desk.after.remote(1)) == []
    batch = {"number": [7]}
    for _ in range(2):  # all together, then one by one
        with pytest.raises(SystemExit):
            worker(batch)
    (records,) = (pickle.loads(pickled) for pickled in worker(batch)["records"])
    assert [record["path"] for record in records] == ["a", "fatal", "c"]
    assert records[1]["error"] == "fatal: whatever process reads it dies; look at it with another program"
    assert records[1]["looked"] is None
    assert records[2]["looked"] == len(records[2]["caption"])
    chunk = [(0, Broken("broken")), (1, Source("d", "03.png"))]
    ray.get(desk.add.remote({8: ray.cloudpickle.dumps(chunk)}, [7], True))
    (records,) = (pickle.loads(pickled) for pickled in worker({"number": [8]})["records"])
    assert [record["error"] for record in records] == ["broken: RuntimeError: thing", None]
    assert [pickle.loads(pickled) for pickled in worker(batch)["records"]] == [None]
    ray.kill(desk)


def begin(cluster: Any, folder: Path, model: Path, output: Path, workers: int) -> subprocess.Popen[str]:
    """Begin the command in a process of its own."""
    code = "from captioner.cli import main; main()"
    command = [sys.executable, "-c", code, "caption", folder, "--output", output, "--model", model]
    command += ["--engine", "ray", "--ray-address", cluster.address, "--workers", workers]
    return subprocess.Popen(
        [*map(str, command), "--batch-size", "2", "--n-best", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(count: int, output: Path, run: subprocess.Popen[str]) -> None:
    """Wait until so many records are written."""
    while not output.exists() or output.read_bytes().count(b"\n") < count:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)


def check_output(folder: Path, model: Path, output: Path) -> None:
    records = [json.loads(line) for line in output.read_text().splitlines()]
    check_records(records, plain(model, sources_of(folder)[:-1], n_best=2))


def test_a_killed_command_goes_on(model: Path, many: Path, cluster: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run = begin(cluster, many, model, output, workers=1)
    wait_for(10, output, run)
    run.kill()
    said = run.communicate()[0].splitlines()
    assert all(line.startswith("captioner: ") for line in said), said  # Ray is quiet
    before = output.read_bytes().count(b"\n")
    assert before < len(sources_of(many)) - 1
    run = begin(cluster, many, model, output, workers=1)
    said = run.communicate()[0]
    assert run.returncode == 0, said
    found = re.search(r"captioned (\d+) files; (\d+) files done before; 12 files could not be", said)
    assert found, said
    assert int(found[2]) >= before - 12  # what fails is tried again
    assert int(found[1]) + int(found[2]) == len(sources_of(many)) - 13
    check_output(many, model, output)


@pytest.mark.slow
def test_a_machine_goes_away(model: Path, many: Path, cluster: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run = begin(cluster, many, model, output, workers=2)
    wait_for(15, output, run)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    said = run.communicate()[0]
    assert run.returncode == 0, said
    check_output(many, model, output)


def test_mistakes_are_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason='Ray is not installed: pip install "captioner[ray]"')

    def complaint(**settings: Any) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            next(caption_on_ray([], **{"model": model, **settings}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    begun = time.monotonic()
    assert "127.0.0.1:1: no Ray cluster answers there" in complaint(address="127.0.0.1:1")
    assert "expected host:port" in complaint(address="somewhere")
    assert "ray job submit" in complaint(address="ray://somewhere:10001")
    assert "vocabulary" in complaint(options={"must": ["zeppelin"]})
    assert "beam" in complaint(options={"beam": 0})
    assert str(tmp_path / "no.safetensors") in complaint(model=tmp_path / "no.safetensors")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert complaint() == 'Ray Data is needed (ray is missing): pip install "captioner[ray]"'
    with pytest.raises(ClusterError):
        next(caption_on_ray([], model=model))
    assert time.monotonic() - begun < 20


def test_nothing_to_do_starts_nothing(model: Path, cluster: Any) -> None:
    before = {process.pid for process in workers()}
    assert list(caption_on_ray(iter(()), model=model)) == []
    assert {process.pid for process in workers()} <= before


def test_import_is_light() -> None:
    check = "import sys, captioner.batch.on_ray; print({'ray', 'torch', 'pyarrow'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "set()"
