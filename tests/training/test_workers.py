"""Several processes train as one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from captioner_training import experiment, loop
from captioner_training.workers import Workers, run_together
from shape_data import QuickScorer, log_of, make_config, stage, write_shapes


def run_quickly(*arguments):
    """Train in this process, with a scorer that needs no Java."""
    experiment.Scorer = QuickScorer
    torch.set_num_threads(1)
    loop.run(*arguments)


def collect(folder):
    workers = Workers()
    parameters = [torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    if workers.first:  # the other has no gradient for the second
        parameters[1].grad = torch.full((4,), 5.0)
    parameters[0].grad = torch.full((2, 3), 1.0 + workers.rank)
    loss = workers.sum_gradients(parameters, torch.tensor(0.5 + workers.rank))
    facts = [workers.any(False), workers.any(workers.rank == 1), workers.tell(7.5 + workers.rank)]
    workers.wait()
    told = {"gradients": [p.grad for p in parameters], "loss": loss, "facts": facts, "count": workers.count}
    torch.save(told, folder / f"{workers.rank}.pt")


def fail(kind):
    workers = Workers()
    if workers.rank == 1:
        raise kind("the mistake")
    workers.wait()


def test_gradients_and_losses_are_summed(tmp_path):
    run_together(collect, 2, tmp_path)
    for rank in (0, 1):
        told = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert told["count"] == 2
        assert torch.equal(told["gradients"][0], torch.full((2, 3), 3.0))
        assert torch.equal(told["gradients"][1], torch.full((4,), 5.0))
        assert float(told["loss"]) == 2.0
        assert told["facts"] == [False, True, 7.5]


def test_one_process_stays_where_it_is():
    called = []
    run_together(called.append, 1, "here")
    assert called == ["here"]
    workers = Workers()
    assert (workers.rank, workers.count, workers.first) == (0, 1, True)
    assert workers.device == torch.device("cpu")
    assert float(workers.sum_gradients([], torch.tensor(3.0))) == 3.0


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_a_mistake_in_one_process_reaches_the_user_as_it_is(kind):
    with pytest.raises(ValueError, match=r"^the mistake$"):
        run_together(fail, 2, kind)


def die():
    if Workers().first:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_process_that_is_killed_is_one_line():
    with pytest.raises(ValueError, match="a training process was killed, as a system short of memory does"):
        run_together(die, 2)


def test_two_processes_give_the_weights_of_one(tmp_path):
    config = make_config(
        [
            stage(sources={"shapes": 2}, learning_rate=1e-3),
            stage(name="second", trainable_blocks=2, learning_rate=1e-3, encoder_learning_rate=1e-5),
        ],
        decoder={"hidden": 24, "embedding": 16, "cells": 16, "attention_width": 8, "dropout": 0.0},
        loss={"label_smoothing": 0.1, "doubly_stochastic": 0.5},
    )
    data = write_shapes(tmp_path / "data")
    states = []
    for count in (1, 2):
        output = tmp_path / str(count)
        output.mkdir()
        arguments = (run_quickly, count, config, data, output, tmp_path / "cache", "cpu")
        if count == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(experiment, "Scorer", QuickScorer)
                run_together(*arguments)
        else:
            run_together(*arguments)
        states.append(torch.load(output / "state.pt", weights_only=True))
    one, two = states
    # Adam makes whole steps of gradients that are next to nothing: a few weights may differ
    for found, expected in (
        (two["model"].values(), one["model"].values()),
        (two["average"]["values"], one["average"]["values"]),
    ):
        gap = torch.cat([(a - b).abs().flatten() for a, b in zip(found, expected, strict=True)])
        assert float((gap > 1e-5).float().mean()) < 1e-4
        assert float(gap.max()) < 1e-3
    logs = [[json.loads(line) for line in (tmp_path / c / "log.jsonl").open()] for c in "12"]
    assert len(logs[0]) == len(logs[1]) == 2
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], abs=1e-3)


ORPHANS = """
import os, sys, time
from pathlib import Path
from captioner_training.workers import run_together

def work(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(120)

if __name__ == "__main__":
    run_together(work, 2, Path(sys.argv[1]))
"""


def alive(process):
    """Whether it runs; a dead one that nobody has waited for does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_processes_end_with_the_one_that_started_them(tmp_path):
    script, folder = tmp_path / "orphans.py", tmp_path / "running"
    script.write_text(ORPHANS)
    folder.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(folder)])
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        children = [int(path.name) for path in folder.iterdir()]
        assert len(children) == 2
        assert all(alive(child) for child in children)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 20
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(child) for child in children)


LAUNCHED = """
import sys
from pathlib import Path

import torch
from captioner_training import experiment, loop
from shape_data import QuickScorer, log_of, make_config, stage

torch.set_num_threads(1)
experiment.Scorer = QuickScorer
decoder = {"hidden": 24, "embedding": 16, "cells": 16, "attention_width": 8, "dropout": 0.0}
config = make_config([stage(epochs=2, learning_rate=1e-3)], decoder=decoder)
loop.train(config, Path(sys.argv[1]), Path(sys.argv[2]), cache_folder=Path(sys.argv[3]), processes=1)
"""


def test_accelerate_launches_two_processes_with_the_losses_of_one(tmp_path, data, cache):
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    logs = []
    for name, how in (("one", []), ("two", launch)):
        output = tmp_path / name
        command = [sys.executable, *how, str(script), str(data), str(output), str(cache)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stderr.count("24 pictures of shapes_val are also in shapes") == 1  # and not by each
        logs.append(log_of(output))
    assert len(logs[0]) == len(logs[1]) == 2
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["validation"] == one["validation"]
