"""The about tab: what the model is, what it was trained on, how good it is, and another one to choose."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from captioner import __version__
from captioner.checkpoint import Header
from captioner_demo import page
from captioner_demo.common import Demo
from captioner_demo.limits import LimitError

LABEL = "About"

LIMITS = (
    "It is small: four in ten captions are right in all they say, one in ten is plainly wrong.",
    "It counts badly, mixes up colours, and says “man” of many women. What it says of people is a guess "
    "about a picture, never a fact about them.",
    "It knows some thousand words. A thing that it has never read about gets the name of something similar.",
    "Attention tells which cells the decoder weighed for a word: a hint at the reason, not the reason.",
)


def facts(header: Header, megabytes: float, vocabulary: int) -> str:
    """Return what a checkpoint's header says, as HTML.

    Args:
        header: of the checkpoint.
        megabytes: its file's size.
        vocabulary: number of words (or pieces of words).
    """
    decoder, preprocess = header.decoder, header.preprocess
    attention = {"none": "no attention"}.get(decoder.attention, f"{decoder.attention} attention")
    rows = {
        "Looks with": f"{header.encoder}, {preprocess.size} × {preprocess.size} pixels ({preprocess.fit})",
        "Writes with": f"{decoder.cell.upper()} of {decoder.hidden}, {attention}",
        "Vocabulary": f"{vocabulary:,} words or pieces of words",
        "Size": f"{megabytes:.1f} MB",
        "Confidence": "calibrated" if header.calibration else "not calibrated: probabilities stand in",
        "Video": "looks at frames in time"
        if getattr(header, "frames", None)
        else "looks at frames side by side",
    }
    summary = header.summary if isinstance(header.summary, dict) else {}
    if "encoder_weights" in summary:
        rows["Started at"] = str(summary["encoder_weights"])
    if "licence" in summary:
        rows["Terms"] = str(summary["licence"])
    listed = "".join(
        f"<dt>{html.escape(k)}</dt><dd>{html.escape(page.clean(v))}</dd>" for k, v in rows.items()
    )
    limits = "".join(f"<li>{html.escape(line)}</li>" for line in LIMITS)
    return (
        f'<section class="cap-facts"><h2>The model “{html.escape(page.clean(header.name))}”</h2>'
        f"<dl>{listed}</dl>{''.join(_scores(summary))}{''.join(_data(summary))}"
        f"<div><h3>What to expect</h3><ul>{limits}</ul></div>"
        f"<p><small>captioner {html.escape(__version__)} · asks no other machine</small></p>"
        "</section>"
    )


def _scores(summary: dict[str, Any]) -> Iterator[str]:
    scores = summary.get("scores")
    if not isinstance(scores, dict) or not all(isinstance(v, dict) for v in scores.values()):
        return
    names = list(dict.fromkeys(name for each in scores.values() for name in each))
    top = "".join(f'<th class="cap-number" scope="col">{html.escape(str(name))}</th>' for name in names)
    rows = ""
    for data, each in scores.items():
        cells = "".join(
            f'<td class="cap-number">{100 * each[name]:.1f}</td>'
            if isinstance(each.get(name), (int, float))
            else "<td></td>"
            for name in names
        )
        rows += f'<tr><th scope="row">{html.escape(str(data))}</th>{cells}</tr>'
    yield (
        "<div><h3>Scores of its captions (× 100, official metrics, pictures kept out of training)</h3>"
        '<div class="cap-scroll" tabindex="0" role="region" aria-label="Scores"><table><thead><tr>'
        f'<th scope="col">pictures</th>{top}</tr></thead><tbody>{rows}</tbody></table></div></div>'
    )


def _data(summary: dict[str, Any]) -> Iterator[str]:
    data = summary.get("data")
    if not isinstance(data, dict):
        return
    rows = ""
    for name, entry in data.items():
        if isinstance(entry, dict):
            counts = [f"{v:,} {k}" for k, v in entry.items() if isinstance(v, int)]
            texts = [str(v) for v in entry.values() if isinstance(v, str)]
            said = ", ".join(counts), ", ".join(texts)
        else:
            said = "", str(entry)
        rows += (
            f'<tr><th scope="row">{html.escape(str(name))}</th>'
            f"<td>{html.escape(page.clean(said[0]))}</td><td>{html.escape(page.clean(said[1]))}</td></tr>"
        )
    yield (
        '<div><h3>Trained on</h3><div class="cap-scroll" tabindex="0" role="region" aria-label="Data"><table>'
        '<thead><tr><th scope="col">source</th><th scope="col">how much</th>'
        f'<th scope="col">what, and its terms</th></tr></thead><tbody>{rows}</tbody></table></div></div>'
    )


def describe(demo: Demo, model: str = "") -> str:
    """Return the facts of a model as HTML.

    Raises:
        LimitError, CheckpointError: the model cannot be used.
    """
    captioner = demo.engine(model).captioner
    parameters = sum(p.numel() for p in captioner.model.parameters())
    path = Path(model) if model else demo.path
    megabytes = path.stat().st_size / 1e6 if path is not None and path.is_file() else 2 * parameters / 1e6
    return facts(captioner.header, megabytes, len(captioner.vocabulary))


def choose(demo: Demo, model: str) -> tuple[str, str, str]:
    """Load another model; return its key, its facts and a line that says so.

    Raises:
        LimitError, CheckpointError: the model cannot be used.
    """
    model = model.strip()
    if len(model) > 4096 or "\0" in model:
        raise LimitError("this is not the path of a checkpoint")
    name = demo.engine(model).captioner.header.name
    return model, describe(demo, model), page.note(f"All tabs use “{page.clean(name)}” now.")


def tab(demo: Demo) -> None:
    """Lay out the tab and connect it."""
    told = gr.HTML(describe(demo), apply_default_css=False, js_on_load=None, elem_id="about-facts")
    if not demo.choose_models:
        return
    gr.Markdown("### Another model")
    with gr.Row():
        path = gr.Textbox(
            label="Checkpoint on this machine",
            placeholder="runs/mine/model.safetensors",
            scale=4,
            min_width=260,
            max_lines=1,
        )
        with gr.Column(scale=1, min_width=160):
            use = gr.Button("Use it", variant="primary")
            first = gr.Button("The first again")
    line = gr.HTML("", js_on_load=None)

    def used(model: str) -> tuple[str, str, str]:
        with demo.mistakes():
            return choose(demo, model)

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal", "concurrency_limit": 1}
    gr.on([use.click, path.submit], used, path, [demo.model, told, line], **quiet)
    first.click(lambda: used(""), None, [demo.model, told, line], **quiet)
