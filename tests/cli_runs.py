"""How the tests of the command line run it: in this process, or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import make_header
from lively import make_lively_model, pictures
from PIL import Image

from captioner import Captioner, checkpoint, cli, identity


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return json.loads(self.out)

    @property
    def timeless(self) -> list[dict[str, Any]]:
        """The records without how long they took."""
        return [without_seconds(record) for record in self.records]

    @property
    def complaints(self) -> list[str]:
        """The lines on stderr, each of which must be one of ours."""
        lines = self.err.splitlines()
        assert all(line.startswith("captioner: ") for line in lines), self.err
        return [line.removeprefix("captioner: ") for line in lines]


Run = Callable[..., Outcome]


def without_seconds(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}


def save_lively(path: Path) -> Path:
    """Write the lively model's checkpoint."""
    lively = make_lively_model()
    header = make_header(
        lively, name="lively", summary={"data": {"none": {"pictures": 3, "note": "made up"}}}
    )
    checkpoint.save(path, lively, header)
    return path


def run_here(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> Run:
    """Return what runs ``captioner ARGUMENTS`` in this process and that folder, with that model."""
    monkeypatch.setattr(identity, "BUILT_IN", model)
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["captioner", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Outcome(int(stop.value.code or 0), out, err)

    return run


def save(path: Path | str | bytes, place: int = 0) -> Path:
    """Write the picture of that number; the content does not depend on the suffix."""
    with open(path, "wb") as file:
        Image.fromarray(pictures(place + 1)[place]).save(file, "PNG")
    return Path(os.fsdecode(path))


def the_caption(model: Path, photo: object, **options: object) -> str:
    return Captioner.load(model, device="cpu").caption(photo, **options).text


def launch(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start ``python -m captioner ARGUMENTS``."""
    root = str(Path(cli.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "captioner", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        **options,
    )


def modules_after(*arguments: object) -> set[str]:
    """Return what is imported after a command, by the name up to the first dot."""
    code = (
        "import sys\n"
        f"sys.argv = ['captioner', *{[str(a) for a in arguments]!r}]\n"
        "from captioner.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print({name.split('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    )
    root = str(Path(cli.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    return eval(done.stderr.splitlines()[-1])
