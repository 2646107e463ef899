"""`explore(draw, …)` makes a figure that moves with one or two sliders.

It is a live widget in JupyterLab; the static book shows the same frames.

One output holds both. JupyterLab shows the ipywidgets view; the book, and a page
without a kernel, show the HTML: `<input type=range>` over PNG frames, with the
keyboard, a caption that screen readers announce, and alternative text for each frame.
Nothing is fetched.

A list of names (a method, a schedule) is a choice, not a quantity: it becomes radio
buttons. ipywidgets has none that the arrow keys reach, so a figure with a choice is the
HTML in JupyterLab too.

Lines and bars of the state before stay as a pale trace (`traces`). A figure may pose a
challenge, which is settled at the place where the sliders stand.
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
from llmlab.course.traces import Traces, traces

MAX_FRAMES = 30
BUDGET = 280_000  # bytes of base64 that one figure may add to a page
# (dots per inch, colours), the sharpest first
RESOLUTIONS = ((200, 64), (160, 48), (130, 32), (100, 32), (80, 24))


@dataclass(frozen=True)
class Frame:
    """One position of the sliders.

    Attributes:
        src: a picture, as a data URI.
        alt: its alternative text.
        missing: what it lacks of the challenge; '' where it meets it.
    """

    src: str
    alt: str
    missing: str = ""


@dataclass(frozen=True)
class Frames:
    """All positions of one or two sliders, in row-major order of `controls`."""

    title: str
    controls: dict[str, list]
    start: tuple[int, ...]
    frames: list[Frame]
    size: tuple[float, float]  # inches
    challenge: str = ""
    traces: Traces | None = None

    def number(self, indices: Iterable[int]) -> int:
        """Which frame stands at these positions."""
        flat = 0
        for i, values in zip(indices, self.controls.values(), strict=True):
            flat = flat * len(values) + i
        return flat

    def at(self, indices: Iterable[int]) -> Frame:
        """The frame at these positions."""
        return self.frames[self.number(indices)]

    def state(self, indices: Iterable[int]) -> str:
        """These positions in words: 'bits 4, group 64'."""
        pairs = zip(self.controls.items(), indices, strict=True)
        return ", ".join(f"{_label(name)} {_shown(v[i])}" for (name, v), i in pairs)

    def verdict(self, indices: Iterable[int]) -> str:
        """Whether these positions meet the challenge."""
        indices = list(indices)
        missing = self.at(indices).missing
        return f"Not yet: {missing}" if missing else f"Yes: {self.state(indices)}."

    @cached_property
    def uid(self) -> str:
        """An id that is the same for the same figure."""
        text = "".join([self.title, *(f.src for f in self.frames)])
        return "x" + hashlib.sha256(text.encode()).hexdigest()[:12]

    def picture(self, frame: Frame, trace: str = "") -> str:
        """The image, in a box that scrolls sideways where there is no room.

        The text of the image never becomes smaller than 9 points. Over it lies the
        trace of the state before, as SVG.
        """
        width, height = (round(side * SHOWN_DPI) for side in self.size)
        least = round(self.size[0] * 72)
        name = _text(self.title or "figure")
        return (
            f'<div class="llmlab-scroll" tabindex="0" role="group" aria-label="{name}">'
            f'<div class="llmlab-picture" style="min-width:{least}px">'
            f'<img src="{frame.src}" alt="{_text(frame.alt)}"'
            f' width="{width}" height="{height}">'
            f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{trace}</svg>'
            "</div></div>"
        )

    def html(self) -> str:
        """The figure as a page without a kernel shows it."""
        rows = ""
        for k, (name, position) in enumerate(
            zip(self.controls, self.start, strict=True)
        ):
            rows += self._control(f"{self.uid}-{k}", name, position)
        first = self.at(self.start)
        return (
            f"<style>{inline.style('explore.css')}</style>"
            f'<figure class="llmlab-explore" id="{self.uid}"'
            ' data-lm-suppress-shortcuts="true">'
            f"{inline.heading(self.title)}{self.picture(first)}"
            f"{_before('') if self.traces else ''}"
            f'<form class="llmlab-controls">{rows}</form>{self._asked()}'
            f'<figcaption aria-live="polite">{_text(first.alt)}</figcaption>'
            f'<script type="application/json">{inline.as_json(self._data())}</script>'
            f"<script>{inline.script('explore.js')}</script></figure>"
        )

    def _data(self) -> dict[str, Any]:
        """What the script of the page needs."""
        shown = [[_shown(v) for v in values] for values in self.controls.values()]
        data = {
            "frames": [[f.src, f.alt] for f in self.frames],
            "values": shown,
            "names": [_label(name) for name in self.controls],
        }
        if self.challenge:
            data["missing"] = [f.missing for f in self.frames]
        if self.traces:
            data["marks"] = self.traces.marks
            data["traces"] = self.traces.frames
        return data

    def _asked(self) -> str:
        """The challenge with its button, where there is one."""
        if not self.challenge:
            return ""
        return (
            f'<div class="llmlab-challenge"><p>{_challenge(self.challenge)}</p>'
            '<button type="button">Check</button> <span role="status"></span></div>'
        )

    def _control(self, uid: str, name: str, position: int) -> str:
        """One slider with its label and its value, or one row of buttons."""
        values = self.controls[name]
        value = _text(_shown(values[position]))
        label = _text(_label(name))
        if is_choice(values):
            buttons = ""
            for i, each in enumerate(values):
                checked = " checked" if i == position else ""
                buttons += (
                    f'<label><input type="radio" name="{uid}" value="{i}"{checked}'
                    f' autocomplete="off"><span>{_text(_shown(each))}</span></label>'
                )
            return (
                '<div class="llmlab-control llmlab-choice" role="radiogroup"'
                f' aria-labelledby="{uid}"><span id="{uid}">{label}</span>'
                f"<div>{buttons}</div></div>"
            )
        return (
            '<div class="llmlab-control">'
            f'<label for="{uid}">{label}</label>'
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
    trace: bool = True,
    challenge: str = "",
    missing: Callable[..., str] | None = None,
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
        trace: whether lines and bars of the state before stay as pale outlines.
        challenge: something to find by the sliders, in a sentence.
        missing: called with the same values; returns '' where they meet the challenge,
            else what is wrong with them, as in "the error is 12%".
        controls: for each slider the list of its values; names (and True, False) become
            buttons. All combinations are drawn: at most 30.
    Raises:
        ValueError: no control or more than two, an empty list, over 30 frames, a start
            that is not in the list, or a challenge that no position meets, that the
            start meets, or that has no `missing`.

    An example, with a function `plot(rank)` that returns a figure:

        explore(plot, alt=lambda rank: f"the fit of rank {rank}", rank=[1, 2, 4, 8])
    """
    from IPython.display import display

    lists = {name: list(values) for name, values in controls.items()}
    frames = render(
        draw,
        alt=alt,
        title=title,
        start=start,
        controls=lists,
        trace=trace,
        challenge=challenge,
        missing=missing,
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
    trace: bool = True,
    challenge: str = "",
    missing: Callable | None = None,
) -> Frames:
    """Draws every frame, as sharp as the budget of bytes allows."""
    positions = _check(controls, start or {})
    if bool(challenge) != bool(missing):
        raise ValueError(
            f"challenge={challenge!r} needs `missing`, which says what a position"
            " lacks, and the other way round"
        )
    names = list(controls)
    figures = []
    alts = []
    lacks = []
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
        lacks.append(missing(**chosen) if missing else "")
    align(figures)
    sources = _encode(figures)
    left = traces(figures) if trace else None
    width, height = figures[0].get_size_inches()
    for fig in figures:
        close(fig)
    frames = [Frame(*each) for each in zip(sources, alts, lacks, strict=True)]
    size = (float(width), float(height))
    made = Frames(title, controls, positions, frames, size, challenge, left)
    if challenge:
        _check_challenge(made)
    return made


def _check_challenge(made: Frames) -> None:
    """A challenge can be met, and is not met before the reader has moved anything."""
    if all(frame.missing for frame in made.frames):
        raise ValueError(f"challenge={made.challenge!r}: no position meets it")
    if not made.at(made.start).missing:
        raise ValueError(
            f"challenge={made.challenge!r}: the start, {made.state(made.start)}, meets"
            " it already"
        )


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
    """The ipywidgets view of the same frames.

    None where ipywidgets is missing, or has no such control: a choice by arrow keys.
    """
    if any(map(is_choice, frames.controls.values())):
        return None
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

    shown = [frames.start]  # the state on show

    def update(_=None) -> None:
        now = tuple(slider.index for slider in sliders)
        before = shown[0]
        shown[0] = now
        frame = frames.at(now)
        trace = note = ""
        if frames.traces:
            trace = frames.traces.between(frames.number(before), frames.number(now))
            note = _before(f"before: {frames.state(before)}" if trace else "")
        picture.value = (
            '<figure class="llmlab-explore">'
            f"{frames.picture(frame, trace)}{note}</figure>"
        )
        caption.value = (
            f'<p class="llmlab-caption" aria-live="polite">{_text(frame.alt)}</p>'
        )

    for slider in sliders:
        slider.observe(update, names="index")
    update()
    style = inline.style("explore.css")
    top = widgets.HTML(f"<style>{style}</style>{inline.heading(frames.title)}")
    asked = _challenge_widget(frames, sliders) if frames.challenge else []
    box = widgets.VBox([top, picture, *sliders, *asked, caption])
    return {"version_major": 2, "version_minor": 0, "model_id": box.model_id}


def _challenge_widget(frames: Frames, sliders: list) -> list:
    """The challenge with its button, as widgets."""
    import ipywidgets as widgets

    button = widgets.Button(description="Check")
    told = widgets.HTML()

    def say(text: str) -> None:
        told.value = f'<span role="status">{_text(text)}</span>'

    button.on_click(lambda _: say(frames.verdict([s.index for s in sliders])))
    for slider in sliders:
        slider.observe(lambda _: say(""), names="index")
    text = widgets.HTML(f"<p>{_challenge(frames.challenge)}</p>")
    box = widgets.VBox([text, widgets.HBox([button, told])])
    box.add_class("llmlab-challenge")
    return [box]


def is_choice(values: list) -> bool:
    """Whether a list holds names, or on and off, and no quantity."""
    return all(isinstance(value, str | bool) for value in values)


def _challenge(text: str) -> str:
    return f"<strong>Challenge.</strong> {_text(text)}"


def _before(text: str) -> str:
    """The line that says what the pale trace is."""
    return f'<p class="llmlab-before">{_text(text)}</p>'


def _label(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: Any) -> str:
    """A value as the slider shows it: 0.3 rather than 0.30000000000000004."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)
