"""On a Ray cluster of two machines (in name), each with one worker."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import make_header
from lively import make_lively_model, pictures
from PIL import Image

from captioner import Captioner, checkpoint
from captioner.batch import caption_media, to_record
from captioner.batch.on_ray import AHEAD, ClusterError, caption_on_ray
from captioner.batch.sources import Source

T0=time.monotonic()
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "lively.safetensors"
    network = make_lively_model()
    checkpoint.save(path, network, make_header(network))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty photos, a clip, and files that cannot be read; not to be changed."""
    folder = tmp_path_factory.mktemp("photos")
    made = [Image.fromarray(picture) for picture in pictures(40)]
    for i, picture in enumerate(made):
        picture.save(folder / f"{i:02}.png")
    moving = [picture.resize((64, 48)) for picture in made[:3]]
    moving[0].save(folder / "05-moves.gif", save_all=True, append_images=moving[1:], duration=400)
    whole = (folder / "07.png").read_bytes()
    (folder / "07-cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "11-text.jpg").write_text("not a picture")
    (folder / "23-empty.mp4").touch()
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason='Ray is not installed: pip install "captioner[ray]"')
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # which the workers cannot import
    ray.init(cluster.address, log_to_driver=False, logging_level="CRITICAL")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@dataclass(frozen=True)
class Packed(Source):
    """Reads a photo out of another file, slowly, as if it came over a network."""

    holder: str = ""

    def read(self) -> bytes:
        time.sleep(0.05)
        return Path(self.holder).read_bytes()


@dataclass(frozen=True)
class Deadly(Source):
    """Ends the process that reads it, as a decoder with a bug does."""

    def read(self) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def sources_of(folder: Path) -> list[Source]:
    paths = [*sorted(folder.iterdir()), folder / "missing.jpg"]
    return [Source(str(path), str(path)) for path in paths]


def packed(folder: Path) -> list[Source]:
    return [
        Packed(f"archive/{path.name}", holder=str(path)) for path in sorted(folder.glob("[0-9][0-9].png"))
    ]


def plain(model: Path, sources: list[Source], **options: Any) -> dict[str, dict[str, Any]]:
    captioner = Captioner.load(model, device="cpu")
    results = caption_media(captioner, sources, **options)
    records = [to_record(result, captioner.header.name, captioner.fingerprint) for result in results]
    return {record["path"]: record for record in records}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """All the same, except for how long it took, and numbers only nearly."""
    assert list(found) == list(expected)
    numbers = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
    texts = [json.dumps({**record, "seconds": None, "path": None}) for record in (found, expected)]
    assert numbers.sub("#", texts[0]) == numbers.sub("#", texts[1])
    values = [[float(number) for number in numbers.findall(text)] for text in texts]
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-4)


def workers() -> list[psutil.Process]:
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "MapWorker" in " ".join(process.cmdline())]


def test_same_records_although_a_worker_is_killed_and_a_file_kills_others(
    model: Path, folder: Path, cluster: Any
) -> None:
    good = [*sources_of(folder), *packed(folder)]
    sources = [*good[:30], Deadly("deadly.jpg"), *good[30:]]
    records: list[dict[str, Any]] = []
    given = 0

    def counted() -> Iterator[Source]:
        nonlocal given
        for source in sources:
            given += 1
            yield source

    for record in caption_on_ray(counted(), model=model, options={"n_best": 2}, batch_size=4):
        records.append(record)
        assert record["seconds"] >= 0
        assert given <= len(records) + 4 * (AHEAD * 2 + 2)  # two workers, chunks of four
        if len(records) == 9:
            workers()[0].kill()
    assert Counter(record["path"] for record in records) == Counter(source.path for source in sources)

    found = {record["path"]: record for record in records}
    assert (
        found["deadly.jpg"]["error"]
        == "deadly.jpg: whatever process reads it dies; look at it with another program"
    )
    expected = plain(model, good, n_best=2, batch_size=32)
    assert sum(record["error"] is not None for record in expected.values()) == 4
    assert len({record["caption"] for record in expected.values()}) > 10
    for path, record in expected.items():
        same(found[path], record)


# a run that notes what is done; killed and started again by the test, and it does not know of that
RUN = """
    import json, sys
    from pathlib import Path

    import ray
    import test_rayprof_tmp
    from test_rayprof_tmp import packed, sources_of

    from captioner.batch.on_ray import caption_on_ray

    ray.cloudpickle.register_pickle_by_value(test_rayprof_tmp)
    folder, model, journal = map(Path, sys.argv[1:])
    done = set()
    if journal.exists():
        whole = journal.read_bytes().rpartition(b"\\n")[0]
        journal.write_bytes(whole + b"\\n" * bool(whole))
        done = {json.loads(line)["path"] for line in whole.splitlines()}
    todo = [source for source in [*sources_of(folder), *packed(folder)] if source.path not in done]
    with journal.open("a") as file:
        for record in caption_on_ray(todo, model=model, options={"sample": True, "seed": len}, batch_size=2):
            file.write(json.dumps(record) + "\\n")
            file.flush()
"""


def test_killed_driver_resumes_and_a_machine_may_go(
    model: Path, folder: Path, cluster: Any, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(RUN), str(folder), str(model), str(journal)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def lines() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    def wait_for(count: int, run: subprocess.Popen[str]) -> None:
        while lines() < count:
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.01)

    print("T start", time.monotonic()-T0); run = start()
    wait_for(1, run); print("T first", time.monotonic()-T0)
    wait_for(10, run); print("T ten", time.monotonic()-T0)
    run.kill()
    assert run.communicate()[0] == ""  # Ray is quiet
    before = lines()
    assert before < 70
    print("T start", time.monotonic()-T0); run = start()
    wait_for(before+1, run); print("T first", time.monotonic()-T0)
    wait_for(before + 10, run); print("T b10", time.monotonic()-T0)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    print("T removed", time.monotonic()-T0); said, _ = run.communicate(timeout=120)
    assert (run.returncode, said) == (0, "")

    print("T done", time.monotonic()-T0)
    sources = [*sources_of(folder), *packed(folder)]
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert Counter(record["path"] for record in records) == Counter(source.path for source in sources)
    expected = plain(model, sources, sample=True, seed=len)
    for record in records:
        same(record, expected[record["path"]])


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
