"""Several devices of one machine: the CPU, named twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

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

from captioner.batch import on_devices
from captioner.batch.on_devices import AHEAD, DeviceError, caption_on_devices, devices

TWO = ["cpu", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "lively.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_files(tmp_path_factory.mktemp("photos"))


def workers(of: psutil.Process | None = None) -> list[psutil.Process]:
    """Return the processes that caption."""
    return processes("spawn_main", of)


def test_same_records_although_a_process_is_killed(model: Path, folder: Path) -> None:
    sources = [*sources_of(folder), *packed(folder)]
    options = {"sample": True, "seed": 5}
    caption = partial(caption_on_devices, devices=TWO, model=model, options=options, batch_size=4, threads=2)
    records = kill_one(caption, sources, workers, most=4 * (AHEAD * 2 + 2))
    assert not workers()
    check_records(records, plain(model, sources, **options))


def test_files_that_end_processes_and_bugs_are_records(model: Path, folder: Path) -> None:
    good = packed(folder)[:12]
    sources = [*good[:5], Deadly("deadly.jpg"), *good[5:], Broken("broken.jpg")]
    options = {"model": model, "batch_size": 4, "threads": 2, "look": len_of_caption}
    records = {record["path"]: record for record in caption_on_devices(sources, TWO, **options)}
    assert list(Counter(records)) == [*records]
    assert set(records) == {source.path for source in sources}
    errors = {path: record["error"] for path, record in records.items() if record["error"]}
    assert errors == {
        "deadly.jpg": "deadly.jpg: whatever process reads it dies; look at it with another program",
        "broken.jpg": "broken.jpg: RuntimeError: thing",
    }
    one, dead = records[good[0].path], records["deadly.jpg"]
    assert (one["looked"], dead["looked"]) == (len(one["caption"]), None)
    assert (dead["model"], dead["model_sha256"]) == (one["model"], one["model_sha256"])


def test_a_single_file_takes_one_process(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    start = on_devices._Run._start
    monkeypatch.setattr(
        on_devices._Run, "_start", lambda run, device: begun.append(device) or start(run, device)
    )
    (record,) = caption_on_devices(packed(folder)[:1], TWO, model=model)
    assert record["error"] is None
    assert begun == ["cpu"]
    assert list(caption_on_devices(iter(()), TWO, model=model)) == []
    assert begun == ["cpu"]


def test_mistakes_are_one_line(model: Path, folder: Path, tmp_path: Path) -> None:
    def complaint(**settings: Any) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            list(caption_on_devices(packed(folder)[:2], TWO, **{"model": model, **settings}))
        assert "\n" not in str(caught.value)
        assert not workers()
        return str(caught.value)

    assert str(tmp_path / "no.safetensors") in complaint(model=tmp_path / "no.safetensors")
    assert "zeppelin" in complaint(options={"must": ["zeppelin"]})


def test_a_device_that_cannot_be_used_is_one_line(
    model: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    setup = {"model": model, "threads": 0, "precision": "float32"}  # threads: torch raises a RuntimeError
    run = on_devices._Run(iter([[(0, packed(folder)[0])]]), setup, ["cpu"], lambda: False)
    with pytest.raises(ValueError, match=r"^cpu: set_num_threads expects"):
        list(run.records())
    run.close()
    assert capfd.readouterr().err == ""


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert devices("cpu") == ["cpu"]
    assert devices("cpu, cpu") == TWO
    for wrong, reason in (
        ("cpu,gpu", "unknown device 'gpu'"),
        ("cpu,cuda:77", "'cuda:77' is not available"),
        ("cpu,", "unknown device ''"),
    ):
        with pytest.raises(ValueError, match=reason):
            devices(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, expected in ((0, ["auto"]), (1, ["auto"]), (3, ["cuda:0", "cuda:1", "cuda:2"])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert devices("auto") == expected
    assert devices("cuda:2,cuda:0") == ["cuda:2", "cuda:0"]
    with pytest.raises(ValueError, match="named twice"):
        devices("cuda,cuda:0")


def test_processes_that_never_begin(model: Path, folder: Path) -> None:
    run = caption_on_devices(packed(folder)[:3], ["cpu"], model=model)
    killed = 0

    def kill() -> None:
        nonlocal killed
        while killed < on_devices.STARTS:
            for process in workers():
                with suppress(psutil.Error):
                    process.kill()
                    process.wait()
                    killed += 1
            time.sleep(0.05)

    from threading import Thread

    thread = Thread(target=kill)
    thread.start()
    with pytest.raises(DeviceError, match="ended as they began"):
        list(run)
    thread.join()


def command(model: Path, folder: Path, output: Path) -> list[str]:
    code = "from captioner.cli import main; main()"
    arguments = [
        "caption",
        str(folder),
        "--output",
        str(output),
        "--model",
        str(model),
        "--device",
        "cpu,cpu",
    ]
    return [sys.executable, "-c", code, *arguments, "--batch-size", "2", "--threads", "2"]


def begin(model: Path, folder: Path, output: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Begin the command, and wait until there are new records; return its processes, too."""
    before = output.stat().st_size if output.exists() else 0
    process = subprocess.Popen(
        command(model, folder, output), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not output.exists() or output.stat().st_size == before:
        assert process.poll() is None
        time.sleep(0.02)
    return process, workers(psutil.Process(process.pid))


def test_the_command_goes_on_after_ctrl_c_and_its_death(model: Path, folder: Path, tmp_path: Path) -> None:
    many, output = tmp_path / "many", tmp_path / "out.jsonl"
    many.mkdir()
    for path in folder.iterdir():
        for number in range(4):
            os.link(path, many / f"{number}-{path.name}")

    process, others = begin(model, many, output)
    for one in (psutil.Process(process.pid), *others):
        one.send_signal(signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    assert "Traceback" not in said

    process, others = begin(model, many, output)
    assert others
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(others, timeout=10)
    assert not alive  # whoever sends them chunks is gone

    assert output.read_bytes().count(b"\n") < len(sources_of(many)) - 1
    done = subprocess.run(command(model, many, output), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "done before" in done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    check_records(records, plain(model, sources_of(many)[:-1]))
