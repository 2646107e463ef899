"""`explore(draw, …)` makes a figure that moves with one or two sliders.

It is a live widget in JupyterLab; the static book shows the same frames.

One output holds both. JupyterLab shows the ipywidgets view; the book, and a page
without a kernel, show the HTML: `<input type=range>` over PNG frames, with the
keyboard, a caption that screen readers announce, and alternative text for each frame.
Nothing is fetched.
"""

from __future__ import annotations

import hashlib
import html
import itertools
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmlab.course import inline
from llmlab.course.figures import SHOWN_DPI, close, fix, png

MAX_FRAMES = 30
BUDGET = 280_000  # bytes of base64 that one figure may add to a page
# (dots per inch, colours), the sharpest first
RESOLUTIONS = ((200, 64), (160, 48), (130, 32), (100, 32), (80, 24))


@dataclass(frozen=True)
class Frame:
    """One position of the sliders: a picture (data URI) and its alternative text."""

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
        """The image, in a box that scrolls sideways where there is no room.

        The text of the image never becomes smaller than 9 points.
        """
        width, height = (round(side * SHOWN_DPI) for side in self.size)
        least = round(self.size[0] * 72)
        name = _text(self.title or "figure")
        return (
            f'<div class="llmlab-scroll" tabindex="0" role="group" aria-label="{name}">'
            f'<img src="{frame.src}" alt="{_text(frame.alt)}"'
            f' width="{width}" height="{height}" style="min-width:{least}px">'
            "</div>"
        )

    def html(self) -> str:
        """The figure as a page without a kernel shows it."""
        rows = ""
        for k, (name, position) in enumerate(
            zip(self.controls, self.start, strict=True)
        ):
            rows += self._control(f"{self.uid}-{k}", name, position)
        first = self.at(self.start)
        shown = [[_shown(v) for v in values] for values in self.controls.values()]
        data = {"frames": [[f.src, f.alt] for f in self.frames], "values": shown}
        return (
            f"<style>{inline.style('explore.css')}</style>"
            f'<figure class="llmlab-explore" id="{self.uid}">'
            f"{inline.heading(self.title)}{self.picture(first)}"
            f'<div class="llmlab-controls">{rows}</div>'
            f'<figcaption aria-live="polite">{_text(first.alt)}</figcaption>'
            f'<script type="application/json">{inline.as_json(data)}</script>'
            f"<script>{inline.script('explore.js')}</script></figure>"
        )

    def _control(self, uid: str, name: str, position: int) -> str:
        """One slider with its label and its value."""
        values = self.controls[name]
        value = _text(_shown(values[position]))
        return (
            '<div class="llmlab-control">'
            f'<label for="{uid}">{_text(_label(name))}</label>'
            f'<input type="range" id="{uid}" min="0" max="{len(values) - 1}" step="1"'
            f' value="{position}" aria-valuetext="{value}" autocomplete="off">'
            f'<output for="{uid}">{value}</output>'
            "</div>"
        )


def explore(
    draw: Callable[..., Any],
    *,
    alt: Callable[..., str],
    title: str = "",
    start: Mapping[str, Any] | None = None,
    **controls: Iterable,
) -> None:
    """Shows the figure that `draw` makes; sliders choose the values it is called with.

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

    lists = {name: list(values) for name, values in controls.items()}
    frames = render(draw, alt=alt, title=title, start=start, controls=lists)
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
    positions = _check(controls, start or {})
    names = list(controls)
    figures = []
    alts = []
    for values in itertools.product(*controls.values()):
        chosen = dict(zip(names, values, strict=True))
        fig = draw(**chosen)
        text = str(alt(**chosen)).strip()
        if not hasattr(fig, "savefig"):
            raise ValueError(
                f"draw(**{chosen}) must return a matplotlib Figure,"
                f" not {type(fig).__name__}"
            )
        if not text:
            raise ValueError(
                f"alt(**{chosen}) must say what the frame shows; it returned nothing"
            )
        figures.append(fig)
        alts.append(text)
    align(figures)
    sources = _encode(figures)
    width, height = figures[0].get_size_inches()
    for fig in figures:
        close(fig)
    frames = [Frame(src, text) for src, text in zip(sources, alts, strict=True)]
    return Frames(title, controls, positions, frames, (float(width), float(height)))


def align(figures: list) -> None:
    """Put the axes of all frames into the same places: nothing jumps as a slider moves.

    Matplotlib's layout takes three quarters of the time that a figure takes. It is
    worked out for the first, the middle and the last frame; the axes of all get the
    room that is free in each of these. Frames of different sizes or numbers of axes are
    left alone.
    """
    from matplotlib.transforms import Bbox

    kinds = {(len(fig.axes), *fig.get_size_inches()) for fig in figures}
    if len(kinds) > 1 or any(fig.get_layout_engine() is None for fig in figures):
        return
    probes = [figures[0], figures[len(figures) // 2], figures[-1]]
    places = []
    for fig in probes:
        fig.get_layout_engine().execute(fig)
        places.append([ax.get_position(original=True) for ax in fig.axes])
    free = []
    for boxes in zip(*places, strict=True):
        left, bottom = max(box.x0 for box in boxes), max(box.y0 for box in boxes)
        right, top = min(box.x1 for box in boxes), min(box.y1 for box in boxes)
        if right <= left or top <= bottom:
            return  # the frames put these axes into different places
        free.append(Bbox.from_extents(left, bottom, right, top))
    for fig in figures:
        fix(fig)
        for ax, box in zip(fig.axes, free, strict=True):
            ax.set_position(box)


def _encode(figures: list) -> list[str]:
    """Data URIs of all figures, at the first resolution that fits the budget.

    When none fits, the last resolution is used.
    """
    last_dpi, _ = RESOLUTIONS[-1]
    for dpi, colors in RESOLUTIONS:
        encoded: list[str] = []
        total = 0  # bytes so far
        for fig in figures:
            content = png(fig, dpi=dpi, colors=colors)
            encoded.append(b64encode(content).decode())
            total += len(encoded[-1])
            will_not_fit = total * len(figures) > 1.2 * BUDGET * len(encoded)
            if will_not_fit and dpi > last_dpi:
                break
        if len(encoded) == len(figures) and total <= BUDGET:
            break
    return [f"data:image/png;base64,{text}" for text in encoded]


def _check(controls: dict[str, list], start: Mapping) -> tuple[int, ...]:
    """The index of the first position of each control.

    All arguments are checked before.
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
    positions = []
    for name, values in controls.items():
        if name in start:
            positions.append(values.index(start[name]))
        else:
            positions.append((len(values) - 1) // 2)
    return tuple(positions)


def _widget(frames: Frames) -> dict | None:
    """The ipywidgets view of the same frames, or None where ipywidgets is missing."""
    try:
        import ipywidgets as widgets
    except ImportError:
        return None
    picture = widgets.HTML()
    caption = widgets.HTML()
    width = round(0.6 * max(map(len, frames.controls))) + 1
    sliders = []
    for (name, values), position in zip(
        frames.controls.items(), frames.start, strict=True
    ):
        slider = widgets.SelectionSlider(
            options=[(_shown(v), i) for i, v in enumerate(values)],
            index=position,
            description=_label(name),
            style={"description_width": f"{width}em"},
            layout={"width": "min(480px, 98%)"},
        )
        sliders.append(slider)

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
    style = inline.style("explore.css")
    top = widgets.HTML(f"<style>{style}</style>{inline.heading(frames.title)}")
    box = widgets.VBox([top, picture, *sliders, caption])
    return {"version_major": 2, "version_minor": 0, "model_id": box.model_id}


def _label(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: Any) -> str:
    """A value as the slider shows it: 0.3 rather than 0.30000000000000004."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)
