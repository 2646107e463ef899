"""What you wrote and passed: `from mine import allocate` gives your own function.

It is read from your notebook in work/, and its check marks it before you get it. Where
two lessons ask for a function of the same name:

    import mine
    mine.lesson("02-flash-attention").merge
"""

from llmlab.course.mine import OfLesson as lesson
from llmlab.course.mine import own

__all__ = ["lesson"]


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    return own(name)
