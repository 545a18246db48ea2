"""Make README.md and its pictures from nbs/index.ipynb: `make readme`.

nbconvert does the work. Cells that start with `#| hide` and front matter are left out, directive lines (`#| ...`) are
dropped, pictures go to assets/, and links that are right in nbs/ are made right for the repository's root.
"""

import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

INDEX, README, ASSETS = "nbs/index.ipynb", "README.md", "assets"
CODE_OR_LINK = re.compile(r"```.*?```|`[^`]*`|\]\((?![a-z]+:|#|/)([^)\s#]+)", re.S)  # group 1: a relative link's target


def is_left_out(cell) -> bool:
    """Front matter and cells marked `#| hide` are not for the README."""
    return cell.cell_type == "raw" or cell.source.startswith("---\n") or re.search(r"^#\|\s*hide\b", cell.source, re.M) is not None


def from_the_root(markdown: str) -> str:
    """Make relative links of a notebook in nbs/ relative to the repository's root; code stays as it is."""

    def rewrite(match):
        return f"]({posixpath.normpath(posixpath.join('nbs', match[1]))}" if match[1] else match[0]

    return CODE_OR_LINK.sub(rewrite, markdown)


def render(root: Path) -> dict[str, bytes]:
    """What README.md and the pictures beside it should hold: a dict of path → contents."""
    notebook = nbformat.read(root / INDEX, as_version=4)
    notebook.metadata.language_info = {"name": "python"}  # nbdev_clean removes it; the code blocks' colours need it
    notebook.cells = [cell for cell in notebook.cells if not is_left_out(cell)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        else:
            cell.source = from_the_root(cell.source)
    markdown, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": "readme", "output_files_dir": ASSETS})
    text = re.sub(r"\n(\s*\n)+", "\n\n", markdown.strip())  # nbconvert leaves several blank lines, and spaces in them
    return {README: f"<!-- Made from {INDEX} by `make readme`: edit that. -->\n\n{text}\n".encode(), **resources["outputs"]}


def existing(root: Path) -> dict[str, bytes]:
    """What README.md and its pictures hold now."""
    paths = [path for path in [root / README, *sorted((root / ASSETS).glob("readme_*"))] if path.exists()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def write(root: Path) -> None:
    """Bring README.md and its pictures up to date, and remove pictures that it no longer shows."""
    new = render(root)
    for path in existing(root).keys() - new.keys():
        (root / path).unlink()
    for path, contents in new.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(contents)


if __name__ == "__main__":
    write(Path(__file__).parent.parent)
