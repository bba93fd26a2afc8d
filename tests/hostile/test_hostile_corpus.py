"""A folder of hostile files is captioned: nothing breaks, each is named once, what is written parses."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from cli_runs import Run, run_here, save_lively

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import hostile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lively(tmp_path_factory.mktemp("model") / "lively.safetensors")


@pytest.fixture
def run(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Run:
    return run_here(model, capsys, monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[hostile.Case]]:
    folder = tmp_path_factory.mktemp("hostile") / "corpus"
    return folder, hostile.write_corpus(folder, each=1, small=True)


def test_the_corpus_is_large_and_the_same_every_time(tmp_path: Path) -> None:
    first = hostile.write_corpus(tmp_path / "a", each=1, small=True)
    second = hostile.write_corpus(tmp_path / "b", each=1, small=True)
    assert len(first) >= 300
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        if one.listed and b"damaged" in one.path:
            assert Path(one.path.decode()).read_bytes() == Path(other.path.decode()).read_bytes()


@pytest.mark.parametrize("label", ["jsonl", "csv"])
def test_every_file_is_named_once(label: str, corpus: tuple[Path, list[hostile.Case]], run: Run) -> None:
    folder, cases = corpus
    command = hostile.COMMANDS[label]
    begun = time.process_time()
    done = run("caption", folder, "--recursive", *command.options, "--beam", 1, "--threads", 1)
    out = done.out.encode("utf-8", "backslashreplace")
    outcome = hostile.Outcome(done.code, out, done.err, time.process_time() - begun, 0, folder)
    assert hostile.faults(outcome, command, cases) == []
    assert outcome.seconds < 60


def test_what_is_written_beside_files_and_into_them(model: Path, tmp_path: Path) -> None:
    for name in ("before", "now"):
        cases = hostile.write_corpus(tmp_path / name, each=0, small=True)
    command = hostile.COMMANDS["everything"]
    options = ["--beam", "1", "--threads", "1", "--model", str(model)]
    outcome = hostile.caption_folder(tmp_path / "now", command, cases, options, tmp_path)
    assert hostile.faults(outcome, command, cases) == []
    chosen = command.chosen(cases)
    assert command.look is not None
    assert command.look(outcome.results, tmp_path / "before", tmp_path / "now", chosen) == []
    # and would something wrong be found?
    (tmp_path / "now" / "names" / "a*.mp4").write_bytes(b"damaged")
    page = outcome.results.with_suffix(".html")
    page.write_text(
        page.read_text("utf-8").replace("</body>", "<img src=x onerror=alert(1)></body>"), "utf-8"
    )
    found = command.look(outcome.results, tmp_path / "before", tmp_path / "now", chosen)
    assert len(found) == 2


@pytest.mark.slow
def test_the_whole_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hostile.py"])
    assert hostile.main() == 0
