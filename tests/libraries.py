"""What a library does where one would guess otherwise, held by a test.

Such a test is no judgement. It notices a release that does otherwise, so that the page
that tells of it can be changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import version


def seen_in(package: str, release: str) -> Callable[[Callable], Callable]:
    """Marks a test with the release in which its fact was seen.

    When it fails, it says which release is installed now.
    """

    def mark(test: Callable) -> Callable:
        @functools.wraps(test)
        def run(*args, **kwargs):
            try:
                return test(*args, **kwargs)
            except BaseException as error:
                error.add_note(
                    f"{package} {release} does as this test says; installed is"
                    f" {version(package)}. If that release does otherwise, change the"
                    " page that says so, too."
                )
                raise

        return run

    return mark
