"""The page's side of a stepper: one HTML output that plays a trace.

The output holds the trace as JSON, a style and a script, and nothing else: it is drawn
in the page as SVG. In JupyterLab the script runs when the cell has been run, or the
notebook is trusted; in the book it runs at once.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping

from llmlab.course import inline
from llmlab.course.steppers.trace import Trace

BUDGET = 150_000  # bytes that one stepper may add to a page
START = {"first": 0, "last": -1}


def steps(
    trace: Trace | Mapping[str, Trace], *, title: str = "", start: str = "last"
) -> None:
    """Shows a trace that can be played, stepped through and looked at.

    Keys, where the stepper has the focus: space plays and pauses, the arrows left and
    right step, Home and End go to the ends, up and down look at single marks.

    Args:
        trace: what to play; or several by name, with a button for each.
        title: a line above the picture.
        start: the step shown at first, "first" or "last".
    Raises:
        ValueError: there is nothing to play, `start` is unknown, or the output would
            be larger than 150 kB.

    An example:

        steps(schedule_trace(one_f_one_b(4, 8)), title="1F1B")
    """
    from IPython.display import display

    traces = {"": trace} if isinstance(trace, Trace) else dict(trace)
    text = as_html(traces, title, start)
    alts = [each.steps[-1].alt for each in traces.values()]
    plain = f"Stepper: {title}\n" if title else "Stepper\n"
    display({"text/html": text, "text/plain": plain + "\n".join(alts)}, raw=True)


def as_html(traces: Mapping[str, Trace], title: str, start: str) -> str:
    """The stepper as a page shows it."""
    if not traces:
        raise ValueError("trace is empty: steps needs one trace or more")
    for name, trace in traces.items():
        if not isinstance(trace, Trace):
            raise ValueError(
                f"trace {name!r} is a {type(trace).__name__}; make a Trace of it, as"
                " schedule_trace and all_reduce_trace do"
            )
    if start not in START:
        raise ValueError(f"start={start!r} must be one of {', '.join(START)}")
    data = inline.as_json(
        {
            "title": title,
            "start": START[start],
            "traces": [page_data(name, trace) for name, trace in traces.items()],
        }
    )
    uid = "s" + hashlib.sha256(data.encode()).hexdigest()[:12]
    first = next(iter(traces.values()))
    script = "\n".join(_script(name) for name in ("steps_pipeline.js", "steps.js"))
    text = (
        f"<style>{inline.style('steps.css')}</style>"
        f'<figure class="llmlab-steps" id="{uid}" data-lm-suppress-shortcuts="true">'
        f"{inline.heading(title)}"
        f'<p class="s-alt">{html.escape(first.steps[START[start]].alt)}</p>'
        f'<script type="application/json">{data}</script>'
        f"<script>(function () {{\n{script}\n}})();</script></figure>"
    )
    if len(text.encode()) > BUDGET:
        raise ValueError(
            f"the stepper has {len(text.encode()):,} bytes, and a page can carry"
            f" {BUDGET:,}: take fewer ranks or fewer steps"
        )
    return text


def page_data(name: str, trace: Trace) -> dict:
    """What the page needs of a trace. It works out a schedule's steps itself."""
    if trace.plan is not None:
        return {"name": name, "plan": dict(trace.plan)}
    return {"name": name, **trace.data()}


def _script(name: str) -> str:
    """A script without its comments and indentation."""
    kept = [line.strip() for line in inline.script(name).splitlines()]
    return "\n".join(line for line in kept if line and not line.startswith("//"))
