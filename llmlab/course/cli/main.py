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

from llmlab.course.cli.authors import book, model_app, new, release
from llmlab.course.cli.base import Json, Topic, lesson_and_root, stop, write
from llmlab.course.cli.plan import plan

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
            metavar="[TOPIC]...", help="lessons; all that you began when left out"
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

    Your notebook runs in a fresh kernel.
    """
    from llmlab.course import grading, progress
    from llmlab.course.grading import report
    from llmlab.course.kernels import warm_kernels

    chosen, root = _to_check(topics or [])
    quiet = str(json) == "-"
    results = []
    for lesson in chosen:
        if sys.stderr.isatty():
            typer.echo(f"marking {lesson.slug} …", err=True)
        try:
            with warm_kernels(cold=cold, start=len(chosen) > 1):
                result = grading.grade(lesson, root, cell_seconds=seconds)
            results.append(result)
        except FileNotFoundError as error:
            stop(f"{error}: `llmlab start {lesson.slug}` makes your copy", 2)
    if not quiet:
        report.print_check(results, report.console())
    try:
        warning = progress.record(root, results)
    except progress.NotKept as error:
        warning = str(error)
    if warning:
        typer.echo(f"llmlab: {warning}", err=True)
    if json:
        write(json, report.as_json(report.check_as_data(results)))
    if junit:
        write(junit, report.check_as_junit(results))
    raise typer.Exit(0 if all(r.ok for r in results) else 1)


def _to_check(topics: list[str]):
    """(the lessons to mark, the course's folder); without topics, all that are begun.

    Ends with 2 when there is none.
    """
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
        if lesson.work(root).exists() and lesson.exercise(root).is_file():
            begun.append(lesson)
    if not begun:
        first = "`llmlab start 01-welcome` makes your first copy"
        stop(f"there is nothing to mark yet: {first}", 2)
    return begun, root


@app.command()
def progress(json: Json = None) -> None:
    """Show the map of the course. It says what you have done and what comes next."""
    from llmlab.course.grading import report
    from llmlab.course.syllabus import course_root

    try:
        data, warning = report.course_as_data(course_root())
    except FileNotFoundError as error:
        stop(error, 2)
    if str(json) != "-":
        report.print_course(data, report.console())
    if warning:
        later = "it is set aside at the next `llmlab check`"
        typer.echo(f"llmlab: {warning}; {later}", err=True)
    if json:
        write(json, report.as_json(data))


@app.command()
def hint(
    topic: Topic,
    exercise: Annotated[
        str, typer.Argument(help="its name, as in check.<name>", show_default=False)
    ],
) -> None:
    """Show the next hint for an exercise."""
    from llmlab.course import progress
    from llmlab.course.exercises import load_check

    lesson, root = lesson_and_root(topic)
    try:
        check = load_check(lesson)
    except ModuleNotFoundError:
        stop(f"{lesson.slug} has no exercises yet: it is planned", 2)
    if exercise not in check.exercises:
        known = ", ".join(check.exercises)
        stop(f"no exercise of {lesson.slug} is called {exercise!r}: it has {known}", 2)
    one = check.exercises[exercise]
    try:
        tier = progress.next_hint(root, lesson.slug, exercise, len(one.hints))
    except progress.NotKept as error:
        tier = 1
        typer.echo(f"llmlab: {error}", err=True)
    typer.echo(one.hint(tier))


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
for command in (plan, book, new, release):
    app.command()(command)


def main() -> None:
    """The entry point of `llmlab`."""
    app()


if __name__ == "__main__":
    main()
