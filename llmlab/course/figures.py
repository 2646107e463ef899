"""`figure(fig, alt=…)` shows a finished figure with its alternative text.

The output is an `image/png` with the alternative text as its `text/plain` and in its
metadata. The book's build turns that into an accessible image; nbval does not compare
PNGs, but does hold the alternative text to what it was.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_DPI = 120  # CSS pixels per inch of figure where there is room
STORED_DPI = 2 * SHOWN_DPI  # sharp on screens with two device pixels a CSS pixel


def png(fig: Figure, *, dpi: int = STORED_DPI, colors: int = 96) -> bytes:
    """The figure as a PNG of at most `colors` colours.

    That takes a third of the bytes, and the eye sees no difference. The whole canvas is
    stored, never a tight box: frames of a slider must not jump.
    """
    from PIL import Image

    fig.set_dpi(dpi)
    settle(fig)
    raw = io.BytesIO()
    fig.savefig(raw, format="rgba", dpi=dpi)
    pixels = raw.getvalue()
    width = int(fig.get_figwidth() * dpi)
    if len(pixels) % (4 * width):  # the product fell just short of a whole number
        width += 1
    height = len(pixels) // (4 * width)
    image = Image.frombuffer("RGBA", (width, height), pixels).convert("RGB")
    few = Image.Quantize.MAXCOVERAGE
    small = image.quantize(colors, method=few, dither=Image.Dither.NONE)
    out = io.BytesIO()
    # Looking for the fewest bytes would save a seventh of them, in eightfold time.
    small.save(out, format="png")
    return out.getvalue()


def settle(fig: Figure) -> None:
    """Work out the figure's layout now, and for good.

    Left to itself, matplotlib draws the whole figure once more for it on each save.
    """
    engine = fig.get_layout_engine()
    if engine is None:
        return
    engine.execute(fig)
    fix(fig)


def fix(fig: Figure) -> None:
    """Leave the axes where they are from now on."""
    import matplotlib

    with matplotlib.rc_context({"figure.constrained_layout.use": False}):
        fig.set_layout_engine(None)


def close(fig: Figure) -> None:
    """Forgets the figure, or the notebook shows it again at the end of the cell."""
    import matplotlib.pyplot as pyplot

    pyplot.close(fig)


def figure(fig: Figure, *, alt: str) -> None:
    """Shows `fig` with the alternative text `alt`, and closes it.

    Args:
        fig: a matplotlib figure.
        alt: what a reader who cannot see it needs to know, in a sentence or two; round
            its numbers.
    Raises:
        ValueError: `alt` is empty, or `fig` is not a figure.
    """
    if not hasattr(fig, "savefig"):
        raise ValueError(f"fig must be a matplotlib Figure, not {type(fig).__name__}")
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(f"alt={alt!r}: say in a sentence what the figure shows")
    from IPython.display import display

    width, height = fig.get_size_inches()
    data = {"image/png": png(fig), "text/plain": f"Figure: {alt.strip()}"}
    size = {
        "width": round(width * SHOWN_DPI),
        "height": round(height * SHOWN_DPI),
        "alt": alt.strip(),
    }
    close(fig)
    display(data, raw=True, metadata={"image/png": size})
