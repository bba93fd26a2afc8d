"""The page in a browser, for tests: opened at a tab, waited for without fixed times, looked over by axe."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PATIENCE = 120_000
"""Milliseconds that a page is waited for; a machine may do much else at the same time."""

WITH_SCRIPTS = {
    "Photo": ("photo-view", "photo-examples"),
    "Video": ("video-view", "video-examples", "video-overlay"),
    "Folder": ("folder-intake", "folder-table", "folder-nav", "folder-view"),
    "Live": ("live-view",),
    "About": (),
}
"""The components of each tab whose scripts must have begun before anything is touched."""


@contextmanager
def opened(browser: Any, url: str, tab: str = "Photo", **options: Any) -> Iterator[Any]:
    """Open the page at a tab; see at the end that nothing was asked of another host and no script failed."""
    options = {"viewport": {"width": 1280, "height": 900}, "accept_downloads": True, **options}
    context = browser.new_context(**options)
    try:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        foreign: list[str] = []
        errors: list[str] = []
        own = re.match(r"\w+://[^/]+", url)
        assert own
        page.on("request", lambda r: r.url.startswith((own[0], "data:", "blob:")) or foreign.append(r.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        go_to(page, tab)
        yield page
        assert foreign == []
        assert errors == []
    finally:
        context.close()


def go_to(page: Any, tab: str) -> None:
    """Go to a tab, and wait until its scripts have begun."""
    page.wait_for_selector("#photo-examples button", state="attached")
    # Gradio puts tabs that do not fit a phone behind a menu
    name = page.locator("button[role=tab]:visible", has_text=tab)
    if not name.count() and page.locator(".overflow-menu > button:visible").count():
        page.click(".overflow-menu > button")
        name = page.locator(".overflow-dropdown button", has_text=tab)
    name.first.click()
    page.wait_for_function(
        """names => names.every(name => { const part = document.getElementById(name);
        return part && (part.dataset.ready || part.querySelector("[data-ready]")); })""",
        arg=list(WITH_SCRIPTS[tab]),
    )


def until(page: Any, script: str, arg: Any = None) -> None:
    """Wait until a script says so."""
    page.wait_for_function(script, arg=arg)


def settled(page: Any) -> None:
    """Wait until nothing moves any more and the page has been drawn."""
    page.evaluate(
        """async () => { await Promise.all(document.getAnimations()
        .filter(one => one.effect.getComputedTiming().iterations !== Infinity)
        .map(one => one.finished.catch(() => {})));
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))); }"""
    )


def asked(page: Any) -> list[str]:
    """Return a list that grows with what the page asks of its server from now on, but for films."""
    found: list[str] = []
    page.on(
        "request",
        lambda r: r.url.startswith(("data:", "blob:")) or r.resource_type == "media" or found.append(r.url),
    )
    return found


def accessible(page: Any, where: str) -> None:
    """Let axe-core look for serious violations, and see that nothing sticks out of the page."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python"
    ).Axe()
    settled(page)
    response = axe.run(page).response
    found = response["violations"]
    assert len(found) + len(response["passes"]) > 15  # it has looked
    serious = [
        (v["id"], [n["html"][:200] + " " + str(n.get("failureSummary"))[:300] for n in v["nodes"][:4]])
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
    assert serious == [], where
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), where


def answer_times(page: Any, words: str, count: int = 20) -> tuple[list[float], list[float]]:
    """Select words; return the milliseconds until each is drawn, and those of as many frames without.

    In turns, so that both meet the same machine.

    Args:
        page: with a caption.
        words: selector of its words.
        count: selections.
    """
    pairs = page.evaluate(
        """async ([selector, count]) => { const words = Array.from(document.querySelectorAll(selector));
        const pairs = [], frame = () => new Promise((done) =>
        requestAnimationFrame(() => setTimeout(done, 0)));
        async function time(act) { const begun = performance.now(); act(); await frame();
        return performance.now() - begun; }
        for (let i = 0; i < count; i++)
        pairs.push([await time(() => words[i % words.length].click()), await time(() => {})]);
        return pairs; }""",
        [words, count],
    )
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def answers_quickly(page: Any, words: str) -> None:
    """See that selecting a word takes at most 100 ms more than a frame takes here anyway, at the median."""
    seconds, frames = answer_times(page, words)
    print(f"word {statistics.median(seconds):.1f} ms, a frame alone {statistics.median(frames):.1f} ms")
    more = statistics.median(one - other for one, other in zip(seconds, frames, strict=True))
    assert more < 100, (seconds, frames)
