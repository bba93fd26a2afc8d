from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from captioner_demo.guard import PathError, check_files, only_ours

META = {"meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../secret",
        "{folder}/../secret",
        "{folder}2/x.jpg",
        "{folder}/link",
        "http://127.0.0.1/x.jpg",
        "https://example.com/x.jpg",
        "file:///etc/passwd",
        "HTTP://x",
        "data:image/png;base64,AAAA",
        "a\0b",
        7,
        ["/etc/passwd"],
    ],
)
def test_files_that_were_not_uploaded_are_refused(tmp_path: Path, path: Any) -> None:
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "link").symlink_to("/etc/passwd")
    named = path.replace("{folder}", str(folder)) if isinstance(path, str) else path
    for data in ({"path": named, **META}, {"data": [1, {"a": [{"path": named, "url": None}]}]}):
        with pytest.raises(PathError, match="upload"):
            check_files(data, folder)


def test_uploaded_files_pass(tmp_path: Path) -> None:
    inside = tmp_path / "ab" / "x.jpg"
    check_files({"data": [{"path": str(inside), **META}, None, "text", {"path": None, **META}]}, tmp_path)
    check_files(None, tmp_path)


def test_foreign_hosts_are_taken_out_of_pages() -> None:
    page = (
        b'<script src="https://cdn.example/x.js" async></script><link rel="preconnect" href="https://fonts.x">'
        b'<meta property="og:image" content="https://x/y.jpg" /><script src="./ours.js"></script>'
        b'<link rel="stylesheet" href="./ours.css"><script>let a = "https://kept.as.text"</script>'
    )
    assert only_ours(page) == (
        b'<script src="./ours.js"></script><link rel="stylesheet" href="./ours.css">'
        b'<script>let a = "https://kept.as.text"</script>'
    )
