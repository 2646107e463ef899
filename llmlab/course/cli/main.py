"""The command `llmlab`.

Each command is thin: what it does is in the module of its name.

Exit status: 0 good, 1 something failed (an answer is not right, a check of the
environment failed), 2 misuse. Modules are imported in the command that needs them, so
that `llmlab --help` is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llmlab.course.cli.afterwards import after_check, solution_and_next
from llmlab.course.cli.authors import book, model_app, new, release
from llmlab.course.cli.base import Json, Topic, lesson_and_root, stop, write
from llmlab.course.cli.compress import compress
from llmlab.course.cli.fits import fits
from llmlab.course.cli.peer import peer
from llmlab.course.cli.plan import plan
from llmlab.course.cli.serve import serve
from llmlab.course.words import did_you_mean

NOTHING_BEGUN = (
    "there is nothing to mark yet: no exercise in work/ has an answer in it. Write one"
    " (`llmlab lab`, or `llmlab start 01-welcome`), save the notebook, and check again."
    " `llmlab check 01-welcome` marks that one as it stands"
)

app = typer.Typer(
    name="llmlab",
    help="""A course on how large language models are tuned, split over machines,
    shrunk, served and compiled.

    \b
    First time here?  llmlab lab  opens the course in JupyterLab.
    Done an exercise?  llmlab check 01-welcome  marks it.
    How far are you?  llmlab progress  shows the course with what you have done.
    Something odd?  llmlab doctor  looks for what is wrong with the environment.

    \b
    TOPIC is a lesson's name: 04-peft/05-lora, 05-lora, lora, or its notebook's path.
    """,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.command()
def lab(
    port: Annotated[
        int | None,
        typer.Option(help="the port to serve on [default: the first free one]"),
    ] = None,
    browser: Annotated[bool, typer.Option(help="open a browser")] = True,
    ip: Annotated[
        str | None,
        typer.Option(help="the address to listen on [default: this machine alone]"),
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="start each kernel without the libraries")
    ] = False,
) -> None:
    """Open the course in JupyterLab. What you open are your own copies, in work/."""
    from llmlab.course import lab as jupyter

    raise typer.Exit(jupyter.run(port=port, browser=browser, ip=ip, cold=cold))


@app.command()
def start(
    topic: Topic,
    restore_checks: Annotated[
        bool,
        typer.Option(
            "--restore-checks", help="put changed or deleted check cells back"
        ),
    ] = False,
    use_new: Annotated[
        bool,
        typer.Option(
            "--use-new", help="move over to the course's new version; yours is kept"
        ),
    ] = False,
    solution: Annotated[
        bool, typer.Option("--solution", help="the worked exercises, for other editors")
    ] = False,
) -> None:
    """Make your copy of a lesson and its exercises, in work/.

    A copy that you have is never overwritten.
    """
    from llmlab.course import workspace
    from llmlab.course.workspace import Kind

    if restore_checks + use_new + solution > 1:
        stop("--restore-checks, --use-new and --solution: one at a time", 2)
    lesson, root = lesson_and_root(topic)
    try:
        if restore_checks:
            done = [workspace.restore_checks(lesson, root)]
        elif use_new:
            kinds = [k for k in Kind if workspace.new_path(lesson, root, k).exists()]
            kinds = kinds or [Kind.EXERCISES]
            done = [workspace.use_new(lesson, root, kind) for kind in kinds]
        else:
            kinds = [Kind.SOLUTION] if solution else [Kind.LESSON, Kind.EXERCISES]
            there = [k for k in kinds if k.source(lesson, root).is_file()]
            done = [workspace.start(lesson, root, kind) for kind in there or kinds]
            if Kind.EXERCISES in there:
                workspace.begin(lesson, root)
    except (FileNotFoundError, workspace.Blocked) as error:
        stop(error, 1)
    for copied in done:
        typer.echo(copied.message)
    raise typer.Exit(int(any(copied.what == "unreadable" for copied in done)))


@app.command()
def reset(
    topic: Topic,
    exercises: Annotated[
        bool, typer.Option("--exercises", help="the exercises, not the lesson")
    ] = False,
) -> None:
    """Make a fresh copy of a lesson.

    Your former copy is kept beside it, as .old-1, .old-2 …
    """
    from llmlab.course import workspace
    from llmlab.course.workspace import Kind

    lesson, root = lesson_and_root(topic)
    kind = Kind.EXERCISES if exercises else Kind.LESSON
    try:
        done = workspace.reset(lesson, root, kind)
    except (FileNotFoundError, workspace.Blocked) as error:
        stop(error, 1)
    typer.echo(done.message)


@app.command()
def check(
    topics: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TOPIC]...", help="lessons; all that you wrote into when left out"
        ),
    ] = None,
    json: Json = None,
    junit: Annotated[
        Path | None,
        typer.Option(
            "--junit", metavar="FILE", help="also write the result as JUnit XML"
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--timeout", min=1, help="the longest that one cell may run, in seconds"
        ),
    ] = 60.0,
    cold: Annotated[
        bool, typer.Option("--cold", help="start each kernel without the libraries")
    ] = False,
) -> None:
    """Mark your exercises, and say what to do next.

    Your notebook, as you saved it, runs in a fresh kernel.
    """
    from llmlab.course import grading
    from llmlab.course.families import ending_on_signals
    from llmlab.course.grading import report
    from llmlab.course.kernels import warm_kernels

    chosen, root = _to_check(topics or [])
    results = []
    for lesson in chosen:
        if sys.stderr.isatty():
            typer.echo(f"marking {lesson.slug} …", err=True)
        try:
            with ending_on_signals(), warm_kernels(cold=cold, start=len(chosen) > 1):
                result = grading.grade(lesson, root, cell_seconds=seconds)
            results.append(result)
        except FileNotFoundError as error:
            stop(f"{error}: `llmlab start {lesson.slug}` makes your copy", 2)
    _keep(root, results)  # first: a table that cannot be printed costs no marks
    if json:
        write(json, report.as_json(report.check_as_data(results)))
    if junit:
        write(junit, report.check_as_junit(results))
    if str(json) != "-":
        report.print_check(results, report.console())
        for line in after_check(results, root):
            typer.echo(line)
    raise typer.Exit(0 if all(r.ok for r in results) else 1)


def _keep(root: Path, results: list) -> None:
    """Writes the marks down; says so when it cannot."""
    from llmlab.course import progress

    try:
        warning = progress.record(root, results)
    except progress.NotKept as error:
        warning = str(error)
    if warning:
        typer.echo(f"llmlab: {warning}", err=True)


def _to_check(topics: list[str]):
    """(the lessons to mark, the course's folder); without topics, all that are begun.

    Ends with 2 when there is none.
    """
    from llmlab.course import workspace
    from llmlab.course.syllabus import course_root, lessons

    if topics:
        pairs = [lesson_and_root(topic) for topic in dict.fromkeys(topics)]
        return [lesson for lesson, _ in pairs], pairs[0][1]
    try:
        root = course_root()
    except FileNotFoundError as error:
        stop(error, 2)
    begun = []
    for lesson in lessons():
        if lesson.exercise(root).is_file() and workspace.is_begun(lesson, root):
            begun.append(lesson)
    if not begun:
        stop(NOTHING_BEGUN, 2)
    return begun, root


@app.command()
def progress(
    json: Json = None,
    whole: Annotated[
        bool, typer.Option("--all", help="each lesson on a line, planned ones too")
    ] = False,
) -> None:
    """Show how far you are, and what comes next."""
    from llmlab.course import workspace
    from llmlab.course.cli.course_map import print_map
    from llmlab.course.grading import report
    from llmlab.course.syllabus import course_root, find

    try:
        root = course_root()
        data, warning = report.course_as_data(root)
    except FileNotFoundError as error:
        stop(error, 2)
    for part in data["parts"]:
        for lesson in part["lessons"]:
            lesson["begun"] = workspace.is_begun(find(lesson["topic"]), root)
    if str(json) != "-":
        print_map(data, root, report.console(), whole)
    if warning:
        later = "it is set aside at the next `llmlab check`"
        typer.echo(f"llmlab: {warning}; {later}", err=True)
    if json:
        write(json, report.as_json(data))


@app.command()
def hint(
    topic: Topic,
    exercise: Annotated[
        str | None,
        typer.Argument(
            help="its name, as in check.<name>; when left out, the first that is not"
            " right yet",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show the next hint for an exercise."""
    from llmlab.course import progress

    lesson, root = lesson_and_root(topic)
    name = exercise or _stuck_at(lesson, root)
    one = _exercise(lesson, name)
    try:
        tier = progress.next_hint(root, lesson.slug, name, len(one.hints))
    except progress.NotKept as error:
        tier = 1
        typer.echo(f"llmlab: {error}", err=True)
    typer.echo(f"{lesson.short}, {name}:\n{one.hint(tier)}")


def _stuck_at(lesson, root: Path) -> str:
    """The first exercise that is not right yet; when all are, says so and ends with 0.

    Ends with 2 when the lesson has no exercises.
    """
    from llmlab.course import standing

    if not standing.exercise_names(lesson, root):
        stop(f"{lesson.slug} has no exercises yet: it is planned", 2)
    name = standing.first_open(lesson, root)
    if name is None:
        typer.echo(f"Every exercise of {lesson.short} is right.")
        for line in solution_and_next(lesson, root):
            typer.echo(line)
        raise typer.Exit(0)
    return name


def _exercise(lesson, name: str):
    """The exercise of a lesson; ends with 2 when it has none of that name."""
    from difflib import get_close_matches

    from llmlab.course.exercises import load_check

    try:
        known = load_check(lesson).exercises
    except ModuleNotFoundError:
        stop(f"{lesson.slug} has no exercises yet: it is planned", 2)
    if name in known:
        return known[name]
    near = get_close_matches(name, known, n=1)
    asks = did_you_mean(near)
    names = ", ".join(known)
    stop(f"no exercise of {lesson.short} is called {name!r}. {asks}It has {names}", 2)


@app.command()
def doctor(
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="also write the result as JSON"),
    ] = None,
) -> None:
    """Find out what is wrong here, and say what to do.

    It looks at versions, memory and the models, and runs a few short computations.
    """
    from llmlab.course import doctor as examination

    raise typer.Exit(examination.run(json))


app.add_typer(model_app, name="model")
for command in (plan, fits, compress, serve, peer, book, new, release):
    app.command()(command)


def main() -> None:
    """The entry point of `llmlab`."""
    app()


if __name__ == "__main__":
    main()
