"""On a Ray cluster of two machines (in name), each with one worker."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import elsewhere
import psutil
import pytest
from elsewhere import (
    Broken,
    Deadly,
    len_of_caption,
    packed,
    plain,
    same,
    sources_of,
    write_files,
    write_model,
)

from captioner.batch.on_ray import AHEAD, ClusterError, Desk, Worker, caption_on_ray, import_ray
from captioner.batch.sources import Source

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "lively.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_files(tmp_path_factory.mktemp("photos"))


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
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "MapWorker" in " ".join(process.cmdline())]


def test_same_records_although_a_worker_is_killed(model: Path, folder: Path, cluster: Any) -> None:
    sources = [*sources_of(folder), *packed(folder)]
    options = {"sample": True, "seed": 5}
    records: list[dict[str, Any]] = []
    given = 0

    def counted() -> Iterator[Source]:
        nonlocal given
        for source in sources:
            given += 1
            yield source

    for record in caption_on_ray(counted(), model=model, options=options, batch_size=4):
        records.append(record)
        assert given <= len(records) + 4 * (AHEAD * 2 + 2)  # two workers, chunks of four
        if len(records) == 9:
            assert len(workers()) == 2
            workers()[0].kill()
    assert Counter(record["path"] for record in records) == Counter(source.path for source in sources)

    expected = plain(model, sources, **options)
    assert sum(record["error"] is not None for record in expected.values()) == 4
    assert len({record["caption"] for record in expected.values()}) > 10
    for record in records:
        same(record, expected[record["path"]])


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


def run_with_journal(
    folder: Path, model: Path, journal: Path, options: dict[str, Any], workers: int
) -> Iterator[int]:
    """Caption what a plain file does not have yet; yield how many lines it has."""
    if journal.exists():
        journal.write_bytes(journal.read_bytes().rpartition(b"\n")[0])  # the last line may be torn
    done = (
        {json.loads(line)["path"] for line in journal.read_text().splitlines()} if journal.exists() else set()
    )
    todo = [source for source in [*sources_of(folder), *packed(folder)] if source.path not in done]
    count = len(done)
    with journal.open("a") as file:
        for record in caption_on_ray(todo, model=model, options=options, batch_size=2, workers=workers):
            file.write("\n" * (count > 0) + json.dumps(record))
            file.flush()
            count += 1
            yield count


def begin_elsewhere(cluster: Any, *arguments: Any) -> subprocess.Popen[str]:
    """Run `run_with_journal` in a process of its own."""
    program = """
        import sys
        from pathlib import Path

        import elsewhere
        import ray
        import test_ray

        ray.cloudpickle.register_pickle_by_value(elsewhere)
        for _ in test_ray.run_with_journal(*map(Path, sys.argv[1:]), {"n_best": 2}, 1):
            pass
    """
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        env={**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check_journal(folder: Path, model: Path, journal: Path) -> None:
    sources = [*sources_of(folder), *packed(folder)]
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert Counter(record["path"] for record in records) == Counter(source.path for source in sources)
    expected = plain(model, sources, n_best=2)
    for record in records:
        same(record, expected[record["path"]])


def test_killed_driver_resumes(model: Path, folder: Path, cluster: Any, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    run = begin_elsewhere(cluster, folder, model, journal)
    while not journal.exists() or journal.read_bytes().count(b"\n") < 10:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    run.kill()
    assert run.communicate()[0] == ""  # Ray is quiet
    before = journal.read_bytes()
    assert before.count(b"\n") < 70
    counts = list(run_with_journal(folder, model, journal, {"n_best": 2}, 1))
    assert 10 < counts[0] <= before.count(b"\n") + 2
    check_journal(folder, model, journal)


@pytest.mark.slow
def test_a_machine_goes_away(model: Path, folder: Path, cluster: Any, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    for count in run_with_journal(folder, model, journal, {"n_best": 2}, 2):
        if count == 15:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    check_journal(folder, model, journal)


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
