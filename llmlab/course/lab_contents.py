"""The files as JupyterLab sees them under `llmlab lab`.

A learner's copy is made, or renewed, when it is opened. The course's own notebooks open
read-only: they run, but autosave leaves them alone, and a save is refused with the
reason. The scripts that they are made from are not listed. Outputs that are the
course's own are trusted, so that stored sliders move at once.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import nbformat
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from tornado.web import HTTPError

from llmlab.course import workspace
from llmlab.course.syllabus import Lesson, lessons
from llmlab.course.workspace import Kind

FOLDERS = ("notebooks", "exercises", "solutions")
BESIDE = re.compile(r"\.(new|old-\d+)(?=\.ipynb$)")


def is_the_courses(path: str) -> bool:
    """Whether `path`, relative to the course's folder, is under one of `FOLDERS`."""
    first = posixpath.normpath(path.strip("/")).split("/")[0]
    return first.casefold() in FOLDERS  # some file systems do not tell Notebooks/ apart


def without_twins(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A folder without the scripts that its notebooks are made from.

    `05-lora.py` beside `05-lora.ipynb` is for authors, and looks like the lesson.
    """
    names = {entry["name"] for entry in entries}
    shown = []
    for entry in entries:
        stem, dot, suffix = entry["name"].rpartition(".")
        if dot and suffix == "py" and f"{stem}.ipynb" in names:
            continue
        shown.append(entry)
    return shown


class CourseContents(AsyncLargeFileManager):
    """JupyterLab's own contents manager, with the rules above."""

    @property
    def course(self) -> Path:
        """The course's folder."""
        return Path(self.root_dir)

    async def get(
        self,
        path: str,
        content: bool = True,
        type: str | None = None,
        format: str | None = None,
        require_hash: bool = False,
    ) -> dict[str, Any]:
        """A file or a folder; a learner's copy is brought up to date first.

        Raises:
            HTTPError: 403, the copy cannot be made; 404, there is no such file.
        """
        self._bring(path.strip("/"), opens=bool(content))
        model = await super().get(path, content, type, format, require_hash)
        if is_the_courses(path) and model["type"] == "directory" and content:
            model["content"] = without_twins(model["content"])
        return model

    def _bring(self, path: str, opens: bool) -> None:
        """Makes the copy at `path`, or renews it when JupyterLab opens it.

        It is not renewed when JupyterLab only looks at it. JupyterLab looks before it
        saves, and must not find another file than the one it read.
        """
        page = self.course / workspace.GLOSSARY_PAGE
        if self.course / path == page and not page.exists():
            workspace.write_glossary(self.course)
        found = workspace.find_copy(path, self.course)
        if found is None:
            return
        copy = self.course / path
        if copy.exists() and not opens:
            return
        lesson, kind = found
        try:
            workspace.start(lesson, self.course, kind)
        except FileNotFoundError:
            pass  # planned: JupyterLab says that there is no such file
        except workspace.Blocked as error:
            if not copy.exists():
                raise HTTPError(403, str(error)) from None
            self.log.warning("llmlab: %s", error)

    def is_writable(self, path: str) -> bool:
        """Whether JupyterLab may offer to save here."""
        return not is_the_courses(path) and super().is_writable(path)

    async def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
        """Saves a file; 403 for the course's own."""
        self._refuse(path)
        return await super().save(model, path)

    async def delete_file(self, path: str) -> None:
        """Deletes a file; 403 for the course's own."""
        self._refuse(path)
        await super().delete_file(path)

    async def rename_file(self, old_path: str, new_path: str) -> None:
        """Moves a file; 403 for the course's own, and into their folders."""
        self._refuse(old_path)
        self._refuse(new_path)
        await super().rename_file(old_path, new_path)

    async def copy(self, from_path: str, to_path: str | None = None) -> dict[str, Any]:
        """Copies a file; 403 into the course's own folders."""
        target = posixpath.dirname(from_path) if to_path is None else to_path
        self._refuse(target)
        return await super().copy(from_path, to_path)

    def _refuse(self, path: str) -> None:
        if is_the_courses(path):
            raise HTTPError(
                403,
                f"{path} is the course's own file and stays as it is, so that the"
                " course can be updated. Yours are in work/: open the lesson from"
                " work/START-HERE.md, or use File → Save As with a name under work/",
            )

    def mark_trusted_cells(self, nb: nbformat.NotebookNode, path: str = "") -> None:
        """Trusts the outputs that are the course's own, and those that were signed."""
        own = self._outputs_of_the_course(path.strip("/"))
        shown = [c for c in nb.cells if c.cell_type == "code" and c.outputs]
        if all(cell.outputs in own for cell in shown):
            self.notary.mark_cells(nb, True)
            return
        super().mark_trusted_cells(nb, path)
        for cell in shown:
            if cell.outputs in own:
                cell.metadata.trusted = True

    def _outputs_of_the_course(self, path: str) -> list[Any]:
        path = BESIDE.sub("", path)
        found = workspace.find_copy(path, self.course) or self._find_source(path)
        if found is None:
            return []
        lesson, kind = found
        try:
            source = kind.source(lesson, self.course)
            nb = nbformat.read(source, as_version=nbformat.NO_CONVERT)
        except (OSError, ValueError):
            return []
        return [c.outputs for c in nb.cells if c.cell_type == "code" and c.outputs]

    def _find_source(self, path: str) -> tuple[Lesson, Kind] | None:
        for lesson in lessons():
            for kind in Kind:
                if kind.source(lesson, self.course) == self.course / path:
                    return lesson, kind
        return None
