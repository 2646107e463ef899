"""`python -m llmlab.course.sync [PATH …]`: notebooks follow their scripts.

The percent script is the source. A notebook whose code is as it was when it last ran
keeps its outputs; the others run in a fresh kernel. What a run took, and with which
versions, goes to `jupyter-book/verified.json`, from which the book makes its page "Last
verified". `--check` changes nothing and fails when something is out of step; CI runs
it.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from dataclasses import asdict
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbformat import NotebookNode

from llmlab.course import header
from llmlab.course.book.verified import WIDGET, Records, digest, execute
from llmlab.course.kernels import warm_kernels
from llmlab.course.syllabus import course_root, lessons

TIME_LIMIT = 30.0  # seconds per lesson may take on two cores
MEMORY_LIMIT = 3.0  # GiB
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
# What JupyterLab folds, by the tags that the book folds by.
FOLDED = {
    "hide-input": {"source_hidden": True},
    "hide-output": {"outputs_hidden": True},
    "hide-cell": {"source_hidden": True, "outputs_hidden": True},
}
ABSOLUTE = re.compile(
    r"(?<![\w./~<])(?:/(?:home|root|Users|tmp|work|mnt|opt|var|private)/[\w.-]+|[A-Z]:\\\\?Users\b)"
)


def pairs(paths: list[Path], root: Path) -> list[Path]:
    """The percent scripts that `paths` names (scripts, notebooks or folders).

    Without paths, all scripts of the course.

    Raises:
        ValueError: a path that is not under notebooks/ or solutions/, or does not
            exist.
    """
    homes = [root / "notebooks", root / "solutions"]
    found: list[Path] = []
    for path in [p.resolve() for p in paths] or homes:
        if path.is_dir():
            for script in sorted(path.rglob("*.py")):
                if ".ipynb_checkpoints" not in script.parts:
                    found.append(script)
        elif path.with_suffix(".py").is_file():
            found.append(path.with_suffix(".py"))
        elif paths:
            raise ValueError(f"{path} does not exist")
    for script in found:
        if not any(home in script.parents for home in homes):
            raise ValueError(
                f"{script} is not under {root}/notebooks or {root}/solutions"
            )
    return list(dict.fromkeys(found))  # each once, in this order


def name_of(script: Path, root: Path) -> str:
    """'notebooks/04-peft/05-lora': the notebook's name in verified.json."""
    return script.relative_to(root).with_suffix("").as_posix()


def read_pair(script: Path) -> tuple[NotebookNode, NotebookNode | None]:
    """The notebook as its script says, with stored outputs; and the stored one."""
    source = jupytext.read(script, fmt="py:percent")
    # tags come from the script alone: combining takes others from the stored notebook
    tags = [list(cell.metadata.get("tags") or []) for cell in source.cells]
    path = script.with_suffix(".ipynb")
    old = None
    known: set[str] = set()
    if path.is_file():
        old = nbformat.read(path, as_version=4)
        # jupytext pairs cells by place, too: the line on top is no cell of the script
        known = {cell.id for cell in old.cells} - {header.ID}
        source = combine_inputs_with_outputs(source, old, fmt="py:percent")
    taken: set[str] = set()
    for cell, own_tags in zip(source.cells, tags, strict=True):
        cell.metadata = nbformat.from_dict(metadata(own_tags))
        cell.id = _id(cell, known, taken)
        taken.add(cell.id)
    source.metadata = nbformat.from_dict(METADATA)
    source.nbformat = 4
    source.nbformat_minor = 5
    return source, old


def metadata(tags: list[str]) -> dict:
    """A cell's metadata: its tags, and what JupyterLab folds by them."""
    folded = {}
    for tag in tags:
        folded |= FOLDED.get(tag, {})
    return ({"tags": tags} if tags else {}) | ({"jupyter": folded} if folded else {})


def _id(cell: NotebookNode, known: set[str], taken: set[str]) -> str:
    """The id that the cell has on disk, or one made from its text; never random."""
    if cell.get("id") in known and cell.id not in taken:
        return cell.id
    base = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
    candidate = base
    n = 0
    while candidate in taken:
        n += 1
        candidate = f"{base}-{n}"
    return candidate


def is_fresh(nb: NotebookNode, old: NotebookNode | None, run: dict | None) -> bool:
    """Whether the outputs on disk belong to this code."""
    if old is None or run is None:
        return False
    code = digest(nb)
    if run.get("digest") != code or digest(old) != code:
        return False
    for cell in nb.cells:
        runs = cell.cell_type == "code" and cell.source.strip()
        if runs and not cell.execution_count:
            return False
    return True


def strip(nb: NotebookNode) -> None:
    """Removes what changes from run to run, and what needs the kernel that made it."""
    count = 0
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        if cell.source.strip():
            count += 1
            cell.execution_count = count
        for output in cell.outputs:
            output.get("data", {}).pop(WIDGET, None)
            if "execution_count" in output:
                output.execution_count = cell.execution_count


def put_header(nb: NotebookNode, name: str, run: dict, root: Path) -> None:
    """Puts the line on top of a lesson; other notebooks have none."""
    kind, _, slug = name.partition("/")
    lesson = next((x for x in lessons() if x.slug == slug), None)
    if kind == "notebooks" and lesson is not None:
        header.put(nb, lesson, run, root)


def problems(nb: NotebookNode) -> list[str]:
    """What no notebook may hold: errors, absolute paths, warnings on stderr."""
    found = []
    for i, cell in enumerate(nb.cells):
        may_fail = "raises-exception" in cell.metadata.get("tags", [])
        for output in cell.get("outputs", []):
            if output.output_type == "error" and not may_fail:
                found.append(f"cell {i} failed: {output.ename}: {output.evalue}")
            if match := ABSOLUTE.search(_text_of(output)):
                found.append(f"cell {i} prints an absolute path: {match.group()}…")
            if output.get("name") == "stderr":
                last = output.text.strip().splitlines()[-1]
                found.append(f"cell {i} writes to stderr: {last[:90]}")
        if match := ABSOLUTE.search(cell.source):
            found.append(f"cell {i} holds an absolute path: {match.group()}…")
    return found


def _text_of(output: NotebookNode) -> str:
    """What a reader sees of an output, without pictures."""
    text = output.get("text", "") + "".join(output.get("traceback", []))
    for kind, value in output.get("data", {}).items():
        if kind in ("text/plain", "text/html"):
            text += value
    return text


def limits(run: dict, script: Path, root: Path) -> list[str]:
    """The limits of time and memory that the run broke."""
    found = []
    if run["seconds"] > TIME_LIMIT:
        found.append(f"took {run['seconds']} s; a notebook may take {TIME_LIMIT:g} s")
    if run["memory_gib"] > MEMORY_LIMIT:
        found.append(
            f"took {run['memory_gib']} GiB; a notebook may take {MEMORY_LIMIT:g} GiB"
        )
    return found


def sync(script: Path, root: Path, *, force: bool = False) -> tuple[str, list[str]]:
    """Brings one pair in step; returns what was done and what is wrong now."""
    records = Records(root)
    name = name_of(script, root)
    nb, old = read_pair(script)
    run = records.read().get(name)
    done = "unchanged"
    if force or not is_fresh(nb, old, run):
        fresh = execute(nb, script.parent)
        strip(nb)
        records.write(name, fresh)
        run = asdict(fresh)
        done = f"ran in {fresh.seconds} s, {fresh.memory_gib} GiB"
    strip(nb)
    put_header(nb, name, run, root)
    text = nbformat.writes(nb) + "\n"
    path = script.with_suffix(".ipynb")
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        if done == "unchanged":
            done = "updated"
    return done, problems(nb) + limits(run, script, root)


def check(script: Path, root: Path) -> list[str]:
    """What is out of step or not allowed; changes nothing."""
    nb, old = read_pair(script)
    run = Records(root).read().get(name_of(script, root))
    if old is None:
        return ["has no notebook: run `make sync`"]
    strip(nb)
    if run:
        put_header(nb, name_of(script, root), run, root)
    stored = script.with_suffix(".ipynb").read_text(encoding="utf-8")
    wrong = []
    if not is_fresh(nb, old, run):
        wrong.append("its code changed since it last ran: run `make sync`")
    elif nbformat.writes(nb) + "\n" != stored:
        wrong.append("the notebook is out of step with its script: run `make sync`")
    wrong += problems(nb)
    if run:
        wrong += limits(run, script, root)
    return wrong


def orphans(root: Path) -> list[Path]:
    """Notebooks whose script is gone."""
    found = []
    for home in ("notebooks", "solutions"):
        for path in (root / home).rglob("*.ipynb"):
            is_checkpoint = ".ipynb_checkpoints" in path.parts
            if not is_checkpoint and not path.with_suffix(".py").is_file():
                found.append(path)
    return found


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 1 when a notebook failed or is out of step."""
    parser = argparse.ArgumentParser(
        prog="python -m llmlab.course.sync", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        help="scripts, notebooks or folders (default: all)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; fail when something is out of step",
    )
    parser.add_argument(
        "--force", action="store_true", help="run also what did not change"
    )
    parser.add_argument("--cold", action="store_true", help="start each kernel anew")
    args = parser.parse_args(argv)
    root = course_root()
    try:
        scripts = pairs(args.paths, root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with warm_kernels(cold=args.cold, start=len(scripts) > 1):
        bad = bring_in_step(scripts, root, args)
    if not args.paths:
        for path in orphans(root):
            bad += 1
            print(f"{path.relative_to(root)}: its script is gone")
    return 1 if bad else 0


def bring_in_step(scripts: list[Path], root: Path, args: argparse.Namespace) -> int:
    """Brings each notebook in step, or checks it; returns how many are not."""
    bad = 0
    for script in scripts:
        name = name_of(script, root)
        try:
            if args.check:
                done = "checked"
                wrong = check(script, root)
            else:
                done, wrong = sync(script, root, force=args.force)
        except Exception as error:
            done = "failed"
            wrong = [f"{type(error).__name__}: {error}"]
        bad += bool(wrong)
        print(f"{name}: {done}", flush=True)
        for line in wrong:
            print(f"  {line}", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
