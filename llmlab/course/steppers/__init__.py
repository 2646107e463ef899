"""`steps(trace)` plays what happened, one step at a time, as a picture in the page.

    trace         a list of steps as plain data: marks, a sentence, a line of code
    player        the page's side: HTML with inline SVG, buttons, keyboard
    pipelines     the trace of a pipeline schedule, which can be edited in the page
    collectives   the trace of an all-reduce, also of a learner's own
    watching      a communicator that writes down what is sent

Nothing is fetched, and no kernel is needed once the output is stored.
"""

from llmlab.course.steppers.collectives import all_reduce_trace
from llmlab.course.steppers.pipelines import schedule_trace
from llmlab.course.steppers.player import steps
from llmlab.course.steppers.trace import Lanes, Mark, Plane, Step, Trace

__all__ = [
    "Lanes",
    "Mark",
    "Plane",
    "Step",
    "Trace",
    "all_reduce_trace",
    "schedule_trace",
    "steps",
]
