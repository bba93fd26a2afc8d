"""How the page looks: a theme on Gradio's theme system, its styles and scripts. Nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from captioner_demo.page import ramp

STATIC = Path(__file__).parent / "static"

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

VIOLET = gr.themes.Color(
    name="captioner_violet",
    c50="#f6f2fd",
    c100="#ebe2fa",
    c200="#d7c6f4",
    c300="#bd9fec",
    c400="#a078e0",
    c500="#8552d0",
    c600="#6e3cbe",
    c700="#582d9c",
    c800="#43237a",
    c900="#301a59",
    c950="#1e103a",
)
STONE = gr.themes.Color(
    name="captioner_stone",
    c50="#faf7f2",
    c100="#f3eee7",
    c200="#e4dcd2",
    c300="#cbc1b8",
    c400="#a69cab",
    c500="#7b7184",
    c600="#5d5466",
    c700="#41394c",
    c800="#2b2534",
    c900="#1e1a27",
    c950="#14111b",
)


def theme() -> gr.themes.Base:
    """Return the theme: system fonts, violet on warm paper, light and dark."""
    return gr.themes.Base(
        primary_hue=VIOLET,
        secondary_hue=VIOLET,
        neutral_hue=STONE,
        radius_size=gr.themes.sizes.radius_lg,
        font=[gr.themes.Font(name) for name in SANS],
        font_mono=[gr.themes.Font(name) for name in MONO],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="#1d1a24",
        body_text_color_dark="#efeaf4",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_800",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_700",
        block_background_fill="#ffffff",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_radius="14px",
        button_large_radius="999px",
        button_medium_radius="999px",
        button_small_radius="999px",
        input_radius="10px",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_800",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_600",
        button_primary_background_fill_dark="*primary_300",
        button_primary_background_fill_hover_dark="*primary_200",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="*primary_950",
        button_border_width="1px",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_secondary_text_color="#1d1a24",
        button_secondary_text_color_dark="#efeaf4",
        slider_color="*primary_600",
        slider_color_dark="*primary_300",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
    )


def head() -> str:
    """Return what goes into the page's head: styles and scripts of our own, inline."""
    styles, script = _together("css"), _together("js")
    colours = json.dumps(ramp(), separators=(",", ":"))
    return (
        f"<style>{styles}</style>\n"
        '<meta name="color-scheme" content="light dark">\n'
        f"<script>window.captionerRamp={colours};\n{script}</script>"
    )


def _together(suffix: str) -> str:
    """Return the files of ``static`` with a suffix, in one: the page's own first, then the tabs'."""
    files = sorted(STATIC.glob(f"*.{suffix}"), key=lambda file: (file.stem != "page", file.stem))
    return "\n".join(file.read_text("utf-8") for file in files)


def look() -> dict[str, Any]:
    """Return what Gradio's ``launch`` and ``mount_gradio_app`` take to give the page its look."""
    return {"theme": theme(), "head": head(), "footer_links": ["api"]}


LOGO = (
    '<svg width="34" height="34" viewBox="0 0 34 34" aria-hidden="true"><g>'
    + "".join(
        f'<rect x="{1 + 11 * x}" y="{1 + 11 * y}" width="10" height="10" rx="2.6" fill="{colour}"/>'
        for y, row in enumerate(
            (
                ("#6e3cbe", "#8c38b4", "#6e3cbe"),
                ("#8c38b4", "#ffb028", "#f06432"),
                ("#6e3cbe", "#f06432", "#cd3878"),
            )
        )
        for x, colour in enumerate(row)
    )
    + "</g></svg>"
)

HEADER = f"""<header class="cap-header">{LOGO}<div><h1>captioner</h1>
<p>says what it sees, and shows where it looked</p></div></header>"""
