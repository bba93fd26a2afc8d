"""Several processes train as one does."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from captioner_training import loop
from captioner_training.workers import Workers, run_together
from shape_data import QuickScorer, make_config, stage, write_shapes


def run_quickly(workers, *arguments):
    """Train in this process, with a scorer that needs no Java."""
    loop.Scorer = QuickScorer
    torch.set_num_threads(1)
    loop.run(workers, *arguments)


def collect(workers, folder):
    gathered = workers.gather(torch.tensor([workers.rank, 10 * workers.rank]))
    parameters = [torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    if workers.first:  # the other has no gradient for the second
        parameters[1].grad = torch.full((4,), 5.0)
    parameters[0].grad = torch.full((2, 3), 1.0 + workers.rank)
    workers.sum_gradients(parameters)
    workers.wait()
    torch.save([gathered, [p.grad for p in parameters]], folder / f"{workers.rank}.pt")


def fail(workers, kind):
    if workers.rank == 1:
        raise kind("the mistake")
    workers.wait()


def test_gradients_are_summed_and_tensors_gathered(tmp_path):
    run_together(collect, 2, tmp_path)
    for rank in (0, 1):
        gathered, gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert [g.tolist() for g in gathered] == [[0, 0], [1, 10]]
        assert torch.equal(gradients[0], torch.full((2, 3), 3.0))
        assert torch.equal(gradients[1], torch.full((4,), 5.0))


def test_one_process_stays_where_it_is():
    called = []
    run_together(lambda workers, word: called.append((workers, word)), 1, "here")
    assert called == [(Workers(0, 1), "here")]


def test_a_mistake_in_one_process_reaches_the_user_as_it_is():
    with pytest.raises(ValueError, match=r"^the mistake$"):
        run_together(fail, 2, ValueError)


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
                patch.setattr(loop, "Scorer", QuickScorer)
                run_together(*arguments)
        else:
            run_together(*arguments)
        states.append(torch.load(output / "state.pt", weights_only=True))
    one, two = states
    assert len(one["random"]) == 1
    assert len(two["random"]) == 2
    # Adam makes whole steps of gradients that are next to nothing: a few weights may differ
    for found, expected in (
        (two["model"].values(), one["model"].values()),
        (two["average"]["values"], one["average"]["values"]),
    ):
        gap = torch.cat([(a - b).abs().flatten() for a, b in zip(found, expected, strict=True)])
        assert float((gap > 1e-5).float().mean()) < 1e-4
        assert float(gap.max()) < 1e-3
    losses = [re.findall(r'"loss": ([\d.]+)', (tmp_path / c / "log.jsonl").read_text()) for c in "12"]
    assert len(losses[0]) == len(losses[1]) == 2
    for a, b in zip(*losses, strict=True):
        assert float(a) == pytest.approx(float(b), abs=0.05)  # each process tells the loss of its share


ORPHANS = """
import os, sys, time
from pathlib import Path
from captioner_training.workers import run_together

def work(workers, folder):
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
