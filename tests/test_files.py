from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from captioner import files
from captioner.files import remove_leftovers, save, write_atomically


def test_writing_replaces_at_once(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write_atomically(path, b"one")
    with path.open("rb") as reader:
        write_atomically(path, b"two, longer")
        assert reader.read() == b"one"  # whoever has it open keeps the old one
    assert path.read_bytes() == b"two, longer"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "missing" / "state.pt", b"x")
    assert caught.value.filename == str(tmp_path / "missing" / "state.pt")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, b"new")
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    assert path.read_text() == "old"


def test_a_file_like_another_keeps_permissions_and_perhaps_its_time(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    path.chmod(0o640)
    os.utime(path, ns=(5, 1_234_567_890_123_456_789))
    write_atomically(path, b"new", like=path, keep_time=True)
    assert path.stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert path.stat().st_mode & 0o777 == 0o640
    write_atomically(path, b"newer", like=path)
    assert path.stat().st_mtime_ns > 1_500_000_000_000_000_000
    assert path.stat().st_mode & 0o777 == 0o640


def test_names_may_be_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 125 + ".txt")
    write_atomically(path, b"x")
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_leaves_is_found_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    kill = (
        "import os, sys, captioner.files as f\n"
        "f.os.fsync = lambda handle: os.kill(os.getpid(), 9)\n"
        "f.write_atomically(f.Path(sys.argv[1]), b'new')"
    )
    assert subprocess.run([sys.executable, "-c", kill, str(path)]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    mine = tmp_path / ".x.txt.original"  # somebody's own, with a name that is nearly one of ours
    mine.write_text("keep")
    remove_leftovers(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.txt.original", "x.txt"]
    assert path.read_text() == "old"


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.umask(0o077); from pathlib import Path; from captioner.files import save; "
        "save(Path(sys.argv[1]), b'x')"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_link_stays_and_what_a_kill_leaves_beside_its_target_is_removed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "a.json", tmp_path / "far" / "b.json"
    link.symlink_to(target)
    save(link, b"1")
    left = tmp_path / "far" / ".b.json.abcd1234.tmp"
    left.touch()
    remove_leftovers(link)
    assert (link.is_symlink(), target.read_bytes(), left.exists()) == (True, b"1", False)


def test_it_brings_no_torch() -> None:
    code = "import sys, captioner.files; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
