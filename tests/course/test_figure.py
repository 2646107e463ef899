import base64
import io
import subprocess
import sys

import pytest
from PIL import Image

from llmlab.course import figure, palette, plt, style


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(color):
    return (luminance(style.CARD) + 0.05) / (luminance(color) + 0.05)


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr(
        "IPython.display.display",
        lambda data, raw, metadata: found.append((data, metadata)),
    )
    return found


def test_alt_text_goes_with_the_image(shown):
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    figure(fig, alt=" A line rises. ")
    data, metadata = shown[0]
    assert data["text/plain"] == "Figure: A line rises."
    assert metadata["image/png"]["alt"] == "A line rises."
    assert "text/html" not in data
    assert fig.number not in plt.get_fignums()


def test_png_is_sharp_small_and_of_the_size_it_says(shown):
    fig, ax = plt.subplots(figsize=(6, 3))
    ax.plot([1, 2])
    figure(fig, alt="x")
    data, metadata = shown[0]
    content = data["image/png"]
    content = base64.b64decode(content) if isinstance(content, str) else content
    image = Image.open(io.BytesIO(content))
    assert (
        image.size
        == (2 * metadata["image/png"]["width"], 2 * metadata["image/png"]["height"])
        == (1440, 720)
    )
    assert len(content) < 40_000


@pytest.mark.parametrize("alt", ["", "  ", None])
def test_alt_is_required(alt):
    fig, _ = plt.subplots()
    with pytest.raises(ValueError, match="alt"):
        figure(fig, alt=alt)
    plt.close(fig)


def test_only_figures():
    with pytest.raises(ValueError, match="matplotlib Figure"):
        figure("x", alt="x")


def test_text_keeps_nine_points_on_a_phone():
    """A phone's page has 358 of 390 pixels: there, 9 points are 12 CSS pixels."""
    sizes = [
        v
        for k, v in style.RC.items()
        if k.endswith(("labelsize", "titlesize", "fontsize", "font.size"))
    ]
    assert min(sizes) * 358 / (72 * style.WIDTH) >= 12


def test_colors_can_be_told_apart_on_the_card():
    for name in ("blue", "vermillion", "green", "purple", "ink", "gray"):
        assert contrast(getattr(palette, name)) >= 3, name
    for name in ("ink", "blue", "green", "gray"):
        assert contrast(getattr(palette, name)) >= 4.5, name


def test_style_is_applied():
    assert plt.rcParams["figure.figsize"] == [style.WIDTH, style.HEIGHT]
    assert plt.rcParams["axes.prop_cycle"].by_key()["color"][0] == palette.blue


def test_course_is_light_to_import():
    code = (
        "import sys, llmlab.course; print({'torch', 'matplotlib', 'IPython', 'numpy'} &"
        " set(sys.modules) or 'light')"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        ).stdout.strip()
        == "light"
    )


def test_unknown_names_are_refused():
    import llmlab.course

    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = llmlab.course.nothing_of_the_kind
    with pytest.raises(AttributeError, match="nothing"):
        _ = style.nothing
    assert "explore" in dir(llmlab.course)
