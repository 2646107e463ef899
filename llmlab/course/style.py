"""One look for every figure of the course.

Figures own a light card, so that one PNG serves the light and the dark theme. Text is
12 points on a card of 4.8 inches: at that size it is still 9 points on a phone 390
pixels wide. The colours are Okabe and Ito's, which people with any of the common colour
blindnesses can tell apart; blue, vermillion, green and ink have a contrast of 3:1 or
more on the card and come first.
"""

from __future__ import annotations

from types import SimpleNamespace

WIDTH, HEIGHT, FONT = 4.8, 3.0, 12.0  # inches, inches, points
CARD = "#fdfdfb"

# Okabe & Ito 2008, "Color Universal Design"; orange, sky and yellow are for areas, not
# for thin lines or text.
palette = SimpleNamespace(
    blue="#0072b2",
    vermillion="#d55e00",
    green="#00805e",  # darkened from #009e73 to reach 4.5:1 on the card
    purple="#a8548a",  # darkened from #cc79a7
    orange="#e69f00",
    sky="#56b4e9",
    yellow="#f0e442",
    ink="#22262b",
    gray="#6b7078",
    light="#dfe1e4",
    card=CARD,
)
CYCLE = [
    palette.blue,
    palette.vermillion,
    palette.green,
    palette.purple,
    palette.orange,
    palette.sky,
    palette.ink,
]

RC = {
    "figure.figsize": (WIDTH, HEIGHT),
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.facecolor": CARD,
    "savefig.facecolor": CARD,
    "axes.facecolor": CARD,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": FONT,
    "xtick.labelsize": FONT,
    "ytick.labelsize": FONT,
    "legend.fontsize": FONT,
    "figure.titlesize": FONT,
    "figure.titleweight": "bold",
    "text.color": palette.ink,
    "axes.labelcolor": palette.ink,
    "axes.edgecolor": palette.gray,
    "axes.titlecolor": palette.ink,
    "xtick.color": palette.gray,
    "ytick.color": palette.gray,
    "xtick.labelcolor": palette.ink,
    "ytick.labelcolor": palette.ink,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 1.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": palette.light,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "patch.edgecolor": CARD,
    "image.cmap": "cividis",
    "hatch.linewidth": 0.8,
    "axes.formatter.useoffset": False,
    # a slider draws up to 30 frames before it stores them
    "figure.max_open_warning": 0,
}


def _styled_pyplot():
    """matplotlib.pyplot with the course's style in its rcParams."""
    import matplotlib
    import matplotlib.pyplot as pyplot
    from cycler import cycler

    matplotlib.rcParams.update(RC)
    matplotlib.rcParams["axes.prop_cycle"] = cycler(color=CYCLE)
    return pyplot


def __getattr__(name: str):
    if name == "plt":
        return _styled_pyplot()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
