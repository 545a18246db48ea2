"""Make the book, HTML in book/, from the notebooks as they are stored, without running them: `make book`.

Each notebook becomes a page of Markdown in a temporary folder, and Sphinx makes HTML of the pages, with MyST to read them and
Furo for their looks; book.css adds the rest. A file outside nbs/ that a page links to becomes a page, too, under "About".
Formulas are set by MathJax, as in JupyterLab, from a copy in the book: no page needs the network.
"""

import ast
import base64
import os
import re
import shutil
import sys
import tempfile
from html.parser import HTMLParser
from importlib.metadata import files
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

from tools.check import directives, notebooks
from tools.readme import INDEX, README, is_left_out

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "flowbook"
FLAGS = {"cuda": "needs a GPU", "slow": "takes longer"}
PICTURES = {"image/svg+xml": ".svg", "image/png": ".png", "image/jpeg": ".jpg"}
CODE_OR_LINK = re.compile(r"```.*?```|`[^`]*`|\]\((?![a-z]+:|/)([^)\s#]*)(#[^)\s]*)?", re.S)  # groups: a relative link's file, its anchor
SETTINGS = {
    "project": PACKAGE, "html_title": PACKAGE, "html_theme": "furo", "html_static_path": ["_static"], "html_css_files": ["book.css"],
    "html_show_copyright": False, "html_copy_source": False, "html_use_index": False, "html_domain_indices": False,
    "extensions": ["myst_parser"], "myst_enable_extensions": ["attrs_inline", "dollarmath"], "myst_heading_anchors": 6,
    "myst_dmath_double_inline": True,  # $$...$$ within a paragraph, which JupyterLab takes, too
    "mathjax_path": "tex-svg.js", "mathjax3_config": {"options": {"enableMenu": False}},  # the menu would load more
    "html_theme_options": {"light_css_variables": {"library": "#1f8a62"}, "dark_css_variables": {"library": "#4fc79c"}},
    "smartquotes": False,  # they make one dash of the two in --resume
    "suppress_warnings": ["misc.highlighting_failure", "myst.header"],  # code without colours, a heading that skips a level
}


# From a file to a page of Markdown

def place(path: Path, root: Path) -> Path:
    """Where a file's page lies: for notebooks as in nbs/, for others under about/. The README is the front page."""
    path = root / INDEX if path == root / README else path
    inside = root / "nbs" in path.parents
    page = path.relative_to(root / "nbs") if inside else Path("about", path.relative_to(root))
    if path.suffix == ".ipynb":
        return page.with_suffix(".md")
    return page if path.suffix in {".md", *PICTURES.values()} else page.with_name(f"{page.name}.md")


class Page:
    """A page of Markdown made from a file; `pictures` (name → contents) lie beside it, `linked` are the files that it leads to."""

    def __init__(self, path: Path, root: Path):
        self.path, self.root, self.place = path, root, place(path, root)
        self.pictures: dict[str, bytes] = {}
        self.linked: list[Path] = []
        if path.suffix == ".ipynb":
            self.text = self.notebook(nbformat.read(path, as_version=4).cells)
        elif path.suffix == ".md":
            self.text = self.markdown(path.read_text(encoding="utf-8"))
        else:
            self.text = f"# {path.name}\n\n" + fenced(path.read_text(encoding="utf-8"), "python" if path.suffix == ".py" else "text")

    def markdown(self, text: str) -> str:
        """Make links to files links to their pages; code stays as it is, and so do links that lead nowhere: Sphinx finds them."""

        def rewrite(match):
            link, anchor = match.groups(default="")
            target = Path(os.path.normpath(self.path.parent / link)) if link else self.path
            target = target / README if target.is_dir() else target
            if not match[0].startswith("](") or not target.is_file() or self.root not in target.parents:
                return match[0]
            self.linked.append(target)
            to = os.path.relpath(place(target, self.root), self.place.parent) if link else ""
            return f"]({to}" + re.sub(r"[^\w#-]", "", anchor.lower())  # JupyterLab's anchors have capitals, MyST's do not

        return CODE_OR_LINK.sub(rewrite, text)

    def notebook(self, cells: list) -> str:
        """A notebook's cells. A chapter says which module it is, and its title has the number of its file."""
        cells = [cell for cell in cells if not is_left_out(cell)]
        words = [word.split() for cell in cells if cell.cell_type == "code" for word in directives(cell.source)]
        module = next((f"{PACKAGE}.{word[1]}" for word in words if word[:1] == ["default_exp"]), None)
        parts = [self.markdown(cell.source) if cell.cell_type == "markdown" else self.code(cell, module) for cell in cells]
        if module:
            parts[0] = parts[0].replace("# ", f"# [{self.path.name.partition('_')[0]}]{{.number}} ", 1)
            parts.insert(1, f'<p class="module">This chapter is the module <code>{module}</code>. '
                            "Cells with a coloured edge are its code.</p>")
        return "\n\n".join(part for part in parts if part) + "\n"

    def code(self, cell, module: str | None) -> str:
        """A code cell with its outputs: marked if it is exported, labelled by its flags, folded if it only imports."""
        words = {word.split()[0] for word in directives(cell.source) if word}
        source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        exported = any(word.startswith("export") for word in words)
        labels = [module or PACKAGE] * exported + [label for flag, label in FLAGS.items() if flag in words]
        label = f'<span class="label">{" · ".join(labels)}</span>' if labels else ""
        kind = "cell library" if exported else "cell"
        parts = []
        if source:
            tag, title = ("details", f"<summary>Imports {label}</summary>") if only_imports(source) else ("div", label)
            parts = [f'<{tag} class="{kind}">{title}\n\n{fenced(source, "ipython3")}\n\n</{tag}>']
        for position, output in enumerate(cell.outputs):
            if text := self.output(output, f"{self.path.stem}-{cell.id}-{position}"):
                parts.append(f'<div class="output">\n\n{text}\n\n</div>')
        return "\n\n".join(parts)

    def output(self, output, name: str) -> str:
        """An output in the richest form that a page can show; `name` is for its picture."""
        if output.output_type in ("stream", "error"):
            text = output.text if output.output_type == "stream" else f"{output.ename}: {output.evalue}"
            return fenced(text, "text") if text.strip() else ""
        if "text/html" in output.data:
            return fenced(output.data["text/html"], "{raw} html")
        if "text/markdown" in output.data:
            return f'<div class="markdown">\n\n{self.markdown(output.data["text/markdown"])}\n\n</div>'
        for kind, suffix in PICTURES.items():
            if kind in output.data:
                data = output.data[kind]
                self.pictures[name + suffix] = data.encode() if suffix == ".svg" else base64.b64decode(data)
                return f"![Figure drawn by the code above]({name}{suffix})"
        return fenced(output.data.get("text/plain", ""), "text")


def only_imports(source: str) -> bool:
    """Is there nothing but imports in this code, be it after an `if` or `try`?"""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # %magics and !commands
        return False
    return bool(statements) and all(isinstance(getattr(statement, "body", [statement])[0], ast.Import | ast.ImportFrom)
                                    for statement in statements)


def fenced(text: str, language: str) -> str:
    """A block between fences that are longer than any in it; without the codes that colour a terminal."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}{language}\n" + re.sub(r"\x1b\[[\d;]*m", "", text).strip("\n") + f"\n{fence}"


# From the pages to the book

def stage(root: Path, folder: Path) -> None:
    """Write the pages, their pictures, and the contents (at the end of the front page), to a folder for Sphinx."""
    paths, contents = notebooks(root), {}
    paths.sort(key=lambda path: (path != root / INDEX, -len(path.parts), path))  # the front page, tutorials, chapters
    for path in paths:  # grows with what the pages lead to
        to = folder / place(path, root)
        to.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in PICTURES.values():
            shutil.copy(path, to)
            continue
        page = Page(path, root)
        to.write_text(page.text, encoding="utf-8")
        for name, picture in page.pictures.items():
            (to.parent / name).write_bytes(picture)
        paths += [linked for linked in dict.fromkeys(page.linked) if linked not in paths and linked != root / README]
        if path != root / INDEX:
            part = page.place.parts[0].capitalize() if len(page.place.parts) > 1 else "Chapters"
            contents.setdefault(part, []).append(page.place.with_suffix("").as_posix())
    with (folder / place(root / INDEX, root)).open("a", encoding="utf-8") as file:
        for part, pages in contents.items():
            file.write("\n" + fenced(f":hidden:\n:caption: {part}\n\n" + "\n".join(pages), "{toctree}") + "\n")


def build(root: Path, to: Path) -> list[str]:
    """Make the book in the empty folder `to`; what is wrong with it is returned, or printed by Sphinx."""
    from sphinx.application import Sphinx

    with tempfile.TemporaryDirectory() as folder:
        pages, static = Path(folder, "pages"), Path(folder, "pages", "_static")
        static.mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("book.css"), static)
        shutil.copy(next(file.locate() for file in files("sphinx-mathjax-offline") if file.name == SETTINGS["mathjax_path"]), static)
        stage(root, pages)
        sphinx = Sphinx(pages, None, to, Path(folder, "doctrees"), "html", SETTINGS, status=None, warning=sys.stderr, warningiserror=True)
        sphinx.connect("html-page-context", keep_together)
        sphinx.build()
    return ["Sphinx complained (above)"] * bool(sphinx.statuscode) + dead_links(to)


def keep_together(sphinx, name: str, template: str, page: dict, tree) -> None:
    """Mark formulas with the brackets and commas around them, for browsers would break the line in between."""
    formula = r'[(\[]*<span class="math[^<]*</span>[^\s\w<]*'
    page["body"] = re.sub(formula, r'<span class="together">\g<0></span>', page.get("body", ""))


# Does every link lead somewhere?

class Links(HTMLParser):
    """The links of a page, with the tags that they are in, and the anchors that others can lead to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors = set(), {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.links |= {(tag, value or "") for name, value in attrs if name in ("href", "src")}
        self.anchors |= {value for name, value in attrs if name == "id"}


def dead_links(book: Path) -> list[str]:
    """Links within the book that lead nowhere, and scripts, styles and pictures that would come from the network."""
    pages, complaints = {path: Links(path) for path in sorted(book.resolve().rglob("*.html"))}, []
    for path, page in pages.items():
        for tag, link in sorted(page.links):
            url, name = urlsplit(link), path.relative_to(book.resolve()).as_posix()
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if url.scheme or url.netloc:
                if tag != "a" and url.scheme != "data":
                    complaints.append(f"{name}: loads {link} from the network")
                elif url.scheme not in ("http", "https", "mailto", "data"):
                    complaints.append(f"{name}: the link to {link} leads nowhere")
            elif not target.is_file() or target in pages and unquote(url.fragment) not in pages[target].anchors:
                complaints.append(f"{name}: the link to {link} leads nowhere")
    return complaints


def main() -> int:
    """Put the book in place of the last one, if nothing is wrong with it; otherwise print what is, and 1."""
    with tempfile.TemporaryDirectory() as folder:
        book = Path(folder, "book")
        if complaints := build(ROOT, book):
            print(*complaints, sep="\n", file=sys.stderr)
            return 1
        shutil.rmtree(ROOT / "book", ignore_errors=True)
        shutil.copytree(book, ROOT / "book", ignore=shutil.ignore_patterns(".*", "_sources"))
    print("book/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
