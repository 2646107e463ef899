"""`explore(draw, …)` makes a figure that moves: a live widget in JupyterLab, the same
frames in the static book.

One output holds both. JupyterLab shows the ipywidgets view; the book, and a page
without a kernel, show the HTML: `<input type=range>` over PNG frames, with the
keyboard, a caption that screen readers announce, and alternative text for each frame.
Nothing is fetched.
"""

from __future__ import annotations

import hashlib
import html
import itertools
import json
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmlab.course.figures import SHOWN_DPI, close, png

MAX_FRAMES = 30
BUDGET = 280_000  # bytes of base64 that one figure may add to a page
STATIC = Path(__file__).parent / "static"


@dataclass(frozen=True)
class Frame:
    """One position of the sliders: its picture as a data URI, and its alternative
    text.
    """

    src: str
    alt: str


@dataclass(frozen=True)
class Frames:
    """All positions of one or two sliders, in row-major order of `controls`."""

    title: str
    controls: dict[str, list]
    start: tuple[int, ...]
    frames: list[Frame]
    size: tuple[float, float]  # inches

    def at(self, indices: Iterable[int]) -> Frame:
        """The frame at these positions."""
        flat = 0
        for i, values in zip(indices, self.controls.values(), strict=True):
            flat = flat * len(values) + i
        return self.frames[flat]

    @cached_property
    def uid(self) -> str:
        """An id that is the same for the same figure."""
        text = "".join([self.title, *(f.src for f in self.frames)])
        return "x" + hashlib.sha256(text.encode()).hexdigest()[:12]

    def picture(self, frame: Frame) -> str:
        """The image in a box that scrolls sideways rather than shrink its text below 9
        points.
        """
        width, height = (round(side * SHOWN_DPI) for side in self.size)
        return (
            '<div class="llmlab-scroll" tabindex="0" role="group"'
            f' aria-label="{_text(self.title or "figure")}"><img src="{frame.src}"'
            f' alt="{_text(frame.alt)}" width="{width}" height="{height}"'
            f' style="min-width:{round(self.size[0] * 72)}px"></div>'
        )

    def html(self) -> str:
        """The figure as a page without a kernel shows it."""
        rows = "".join(
            '<div class="llmlab-control"><label'
            f' for="{self.uid}-{k}">{_text(_label(name))}</label><input type="range"'
            f' id="{self.uid}-{k}" min="0" max="{len(values) - 1}" step="1" value="{i}"'
            f' aria-valuetext="{_text(_shown(values[i]))}" autocomplete="off"><output'
            f' for="{self.uid}-{k}">{_text(_shown(values[i]))}</output></div>'
            for k, ((name, values), i) in enumerate(
                zip(self.controls.items(), self.start, strict=True)
            )
        )
        first = self.at(self.start)
        heading = (
            f'<p class="llmlab-title">{_text(self.title)}</p>' if self.title else ""
        )
        data = {
            "frames": [[f.src, f.alt] for f in self.frames],
            "values": [
                [_shown(v) for v in values] for values in self.controls.values()
            ],
        }
        script = (STATIC / "explore.js").read_text(encoding="utf-8").strip()
        return (
            f"<style>{_css()}</style>"
            f'<figure class="llmlab-explore" id="{self.uid}">'
            f"{heading}{self.picture(first)}"
            f'<div class="llmlab-controls">{rows}</div>'
            f'<figcaption aria-live="polite">{_text(first.alt)}</figcaption>'
            f'<script type="application/json">{_json(data)}</script>'
            f"<script>{script}</script></figure>"
        )


def explore(
    draw: Callable[..., Any],
    *,
    alt: Callable[..., str],
    title: str = "",
    start: Mapping[str, Any] | None = None,
    **controls: Iterable,
) -> None:
    """Shows the figure that `draw` makes, with one or two sliders that choose what it
    is called with.

    Args:
        draw: called with one value per control; returns a matplotlib Figure, always of
            one size. Compute what is slow outside of it.
        alt: called with the same values; returns what a reader who cannot see this
            frame needs to know.
        title: a line above the figure.
        start: the values shown first, by control; by default the middle of each list.
        controls: for each slider the list of its values. All combinations are drawn: at
            most 30.
    Raises:
        ValueError: no control or more than two, an empty list, over 30 frames, or a
            start that is not in the list.

    An example, with a function `plot(rank)` that returns a figure:

        explore(plot, alt=lambda rank: f"the fit of rank {rank}", rank=[1, 2, 4, 8])
    """
    from IPython.display import display

    frames = render(
        draw,
        alt=alt,
        title=title,
        start=start,
        controls={k: list(v) for k, v in controls.items()},
    )
    bundle = {
        "text/html": frames.html(),
        "text/plain": f"Slider figure: {frames.at(frames.start).alt}",
    }
    view = _widget(frames)
    if view is not None:
        bundle["application/vnd.jupyter.widget-view+json"] = view
    display(bundle, raw=True)


def render(
    draw: Callable,
    *,
    alt: Callable,
    title: str,
    start: Mapping | None,
    controls: dict[str, list],
) -> Frames:
    """Draws every frame, as sharp as the budget of bytes allows."""
    indices = _check(controls, start or {})
    names = list(controls)
    figures, alts = [], []
    for values in itertools.product(*controls.values()):
        chosen = dict(zip(names, values, strict=True))
        figures.append(draw(**chosen))
        alts.append(str(alt(**chosen)).strip())
        if not hasattr(figures[-1], "savefig"):
            raise ValueError(
                f"draw(**{chosen}) must return a matplotlib Figure, not"
                f" {type(figures[-1]).__name__}"
            )
        if not alts[-1]:
            raise ValueError(
                f"alt(**{chosen}) must say what the frame shows; it returned nothing"
            )
    sources = _encode(figures)
    size = tuple(float(side) for side in figures[0].get_size_inches())
    for fig in figures:
        close(fig)
    return Frames(
        title,
        controls,
        indices,
        [Frame(*pair) for pair in zip(sources, alts, strict=True)],
        size,
    )


def _encode(figures: list) -> list[str]:
    """Data URIs of all figures: the first resolution at which together they fit the
    budget, or the last tried.
    """
    for dpi, colors in ((200, 64), (160, 48), (130, 32), (100, 32), (80, 24)):
        encoded: list[str] = []
        for fig in figures:
            encoded.append(
                b64encode(png(fig, dpi=dpi, colors=colors, optimize=False)).decode()
            )
            if (
                sum(map(len, encoded)) * len(figures) > 1.2 * BUDGET * len(encoded)
                and dpi > 80
            ):
                break  # at this rate they will not fit
        if len(encoded) == len(figures) and sum(map(len, encoded)) <= BUDGET:
            break
    return [f"data:image/png;base64,{text}" for text in encoded]


def _check(controls: dict[str, list], start: Mapping) -> tuple[int, ...]:
    """The index of the first position of each control, once all arguments are known to
    be good.
    """
    if not 1 <= len(controls) <= 2:
        raise ValueError(
            f"controls={list(controls)}: explore takes one or two lists of values"
        )
    frames = 1
    for name, values in controls.items():
        frames *= len(values)
        if len(values) < 2:
            raise ValueError(f"{name}={values!r}: a slider needs two values or more")
        if name in start and start[name] not in values:
            raise ValueError(
                f"start[{name!r}]={start[name]!r} is not among {name}={values!r}"
            )
    if unknown := set(start) - set(controls):
        raise ValueError(
            f"start names {sorted(unknown)}, but the controls are {list(controls)}"
        )
    if frames > MAX_FRAMES:
        raise ValueError(
            f"the controls make {frames} frames; the page can carry {MAX_FRAMES}"
        )
    return tuple(
        v.index(start[k]) if k in start else (len(v) - 1) // 2
        for k, v in controls.items()
    )


def _widget(frames: Frames) -> dict | None:
    """The ipywidgets view of the same frames, or None where ipywidgets is missing."""
    try:
        import ipywidgets as widgets
    except ImportError:
        return None
    picture, caption = widgets.HTML(), widgets.HTML()
    width = round(0.6 * max(map(len, frames.controls))) + 1
    sliders = [
        widgets.SelectionSlider(
            options=[(_shown(v), i) for i, v in enumerate(values)],
            index=i,
            description=_label(name),
            style={"description_width": f"{width}em"},
            layout={"width": "min(480px, 98%)"},
        )
        for (name, values), i in zip(frames.controls.items(), frames.start, strict=True)
    ]

    def update(_=None) -> None:
        frame = frames.at([s.index for s in sliders])
        picture.value = (
            f'<figure class="llmlab-explore">{frames.picture(frame)}</figure>'
        )
        caption.value = (
            f'<p class="llmlab-caption" aria-live="polite">{_text(frame.alt)}</p>'
        )

    for slider in sliders:
        slider.observe(update, names="index")
    update()
    heading = (
        f'<p class="llmlab-title">{_text(frames.title)}</p>' if frames.title else ""
    )
    top = widgets.HTML(f"<style>{_css()}</style>{heading}")
    box = widgets.VBox([top, picture, *sliders, caption])
    return {"version_major": 2, "version_minor": 0, "model_id": box.model_id}


def _css() -> str:
    return " ".join((STATIC / "explore.css").read_text(encoding="utf-8").split())


def _label(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: Any) -> str:
    """A value as the slider shows it: 0.3 rather than 0.30000000000000004."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)


def _json(data: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace(
        "</", "<\\/"
    )
