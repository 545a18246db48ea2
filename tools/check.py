"""Is the repository in order? `make check` runs every check; each gives a list of complaints for people.

Nothing in the working tree is changed: the notebooks are exported again in a temporary copy and compared.
`python tools/check.py exported_package` runs the named checks only.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LARGEST_NOTEBOOK = 200_000  # bytes; a chapter should load at once, and its diffs should be readable


# The notebooks

def chapters(root: Path) -> dict[str, Path]:
    """The chapters in reading order: module name → notebook."""
    return {path.stem.partition("_")[2]: path for path in sorted((root / "nbs").glob("[0-9][0-9]_*.ipynb"))}


def notebooks(root: Path) -> list[Path]:
    """Every notebook of the book: index, chapters, tutorials."""
    return [path for path in sorted((root / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def cells(notebook: Path, kind: str = "code") -> list[dict]:
    """The notebook's cells of one kind; `text` is the source as one string."""
    every = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "text": "".join(cell["source"])} for cell in every if cell["cell_type"] == kind]


def directives(text: str) -> list[str]:
    """The words of every `#| ...` line, as in `default_exp config`."""
    return [" ".join(line.split()) for line in re.findall(r"^#\|(.*)$", text, re.M)]


# The order of the chapters

def package_imports(source: str, modules: set[str]) -> set[str]:
    """The modules of flowbook that a cell's source imports, wherever the import stands in it."""
    from IPython.core.inputtransformer2 import TransformerManager  # turns %magics and !commands into Python

    found = set()
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(source))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("flowbook." if node.level else "") + (node.module or "")
            names = [base] + [f"{base.rstrip('.')}.{alias.name}" for alias in node.names if alias.name in modules]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("flowbook.") and name != "flowbook."}
    return found


def chapter_order(root: Path) -> list[str]:
    """Chapter n imports only from chapters before n, in exported cells and in the others."""
    modules = chapters(root)
    complaints, earlier = [], set()
    for module, notebook in modules.items():
        for cell in cells(notebook):
            for name in sorted(package_imports(cell["text"], set(modules)) - earlier):
                reason = "a later chapter or itself" if name in modules else "no chapter makes that module"
                complaints.append(f"{notebook.name}, cell {cell.get('id')}: imports flowbook.{name}, {reason}")
        earlier.add(module)
    return complaints


def export_targets(root: Path) -> list[str]:
    """NN_name.ipynb exports to the module `name`; index and tutorials export nothing."""
    complaints, modules = [], {path: module for module, path in chapters(root).items()}
    for notebook in notebooks(root):
        words = [directive for cell in cells(notebook) for directive in directives(cell["text"])]
        if notebook in modules:
            targets = [word.split()[1:] for word in words if word.startswith("default_exp")]
            if targets != [[modules[notebook]]]:
                complaints.append(f"{notebook.name}: needs exactly one `#| default_exp {modules[notebook]}`")
        elif any(word.startswith(("default_exp", "export")) for word in words):
            complaints.append(f"{notebook.name}: exports code, but only numbered chapters may")
    return complaints


# Notebooks, package and README in step

def exported_package(root: Path) -> list[str]:
    """A fresh export of the notebooks gives the package as it is, byte for byte (with nbdev 2 as with nbdev 3)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "flowbook"
        (copy / "flowbook").mkdir(parents=True)
        for name in ["settings.ini", "pyproject.toml", "flowbook/__init__.py"]:  # nbdev only sets the version in __init__.py
            if (root / name).exists():
                shutil.copy(root / name, copy / name)
        shutil.copytree(root / "nbs", copy / "nbs", ignore=lambda at, names: [n for n in names if not is_source(Path(at, n))])
        command = "from nbdev.doclinks import nbdev_export; nbdev_export()"
        environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}  # with it nbdev exports nothing
        subprocess.run([sys.executable, "-c", command], cwd=copy, env=environment, check=True)
        fresh, current = python_files(copy), python_files(root)
    return [
        f"flowbook/{name} is not what the notebooks export: run `make export`"
        for name in sorted(fresh.keys() | current.keys())
        if fresh.get(name) != current.get(name)
    ]


def is_source(path: Path) -> bool:
    """Notebooks and the folders that hold them, not what running them leaves behind."""
    return path.suffix == ".ipynb" or path.is_dir() and path.name in ("nbs", "tutorials")


def python_files(root: Path) -> dict[str, bytes]:
    """The package's Python files: path → contents."""
    package = root / "flowbook"
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*.py")}


def readme(root: Path) -> list[str]:
    """README.md and its pictures are what nbs/index.ipynb gives."""
    from tools.readme import existing, render

    now, fresh = existing(root), render(root)
    stale = [path for path in sorted(now.keys() | fresh.keys()) if now.get(path) != fresh.get(path)]
    return [f"{path} is not what nbs/index.ipynb gives: run `make export`" for path in stale]


def links(root: Path) -> list[str]:
    """Relative links between the notebooks, and to other files, lead somewhere."""
    from tools.readme import CODE_OR_LINK

    return [
        f"{notebook.name}: the link to {link} leads nowhere"
        for notebook in notebooks(root)
        for cell in cells(notebook, "markdown")
        for link in CODE_OR_LINK.findall(cell["text"])
        if link and not (notebook.parent / link).exists()
    ]


def clean_notebooks(root: Path) -> list[str]:
    """Notebooks are as `nbdev_clean` leaves them and as JupyterLab writes them, so that diffs show only real changes."""
    import nbformat
    from nbdev.clean import clean_nb

    complaints = []
    for notebook in notebooks(root):
        text = notebook.read_text(encoding="utf-8")
        cleaned = json.loads(text)
        clean_nb(cleaned)
        if cleaned != json.loads(text):
            complaints.append(f"{notebook.name}: has execution counts or stray metadata: run `make export`")
        elif nbformat.writes(nbformat.reads(text, as_version=4)) + "\n" != text:
            complaints.append(f"{notebook.name}: JupyterLab would write it differently: open and save it there")
    return complaints


def stored_outputs(root: Path) -> list[str]:
    """No notebook stores an error as an output, and none is too large."""
    complaints = []
    for notebook in notebooks(root):
        for cell in cells(notebook):
            if any(output["output_type"] == "error" for output in cell["outputs"]):
                complaints.append(f"{notebook.name}, cell {cell.get('id')}: stores an error as its output")
        if (size := notebook.stat().st_size) > LARGEST_NOTEBOOK:
            complaints.append(f"{notebook.name}: {size / 1000:.0f} kB; the most is {LARGEST_NOTEBOOK / 1000:.0f} kB")
    return complaints


def linter(root: Path) -> list[str]:
    """Ruff is content with the notebooks, the package, the tests and the tools; it prints what it finds itself."""
    found = subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet"], cwd=root, check=False)
    return ["ruff check found the above"] if found.returncode else []


ALL = [chapter_order, export_targets, exported_package, readme, links, clean_notebooks, stored_outputs, linter]
CHECKS = {check.__name__: check for check in ALL}


def main(names: list[str]) -> int:
    """Run the named checks, or all; print what is wrong; 1 if anything is."""
    complaints = []
    for name in names or CHECKS:
        found = CHECKS[name](ROOT)
        print(f"{name}: {'ok' if not found else f'{len(found)} found'}")
        complaints += found
    print(*complaints, sep="\n", end="\n" if complaints else "", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
