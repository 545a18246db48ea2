"""How notebooks become pages of the book, and that a link which leads nowhere is found."""

import base64

import pytest
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.book import Page, build, dead_links, stage

TITLE = "# Second\n\n> What it is."


def write_notebook(path, *cells):
    """A notebook of these cells; a text is a Markdown cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(new_notebook(cells=[new_markdown_cell(cell) if isinstance(cell, str) else cell for cell in cells]), path)
    return path


@pytest.fixture
def repository(tmp_path):
    """A front page, a tutorial, two chapters, and two files that they lead to."""
    write_notebook(tmp_path / "nbs/index.ipynb", "# Front\n\n[one](00_first.ipynb), [how](../HOWTO.md)")
    write_notebook(tmp_path / "nbs/tutorials/01_start.ipynb", "# Start", "[there](../01_second.ipynb#Why-Not?), [home](../../README.md)")
    write_notebook(tmp_path / "nbs/00_first.ipynb", "# First", new_code_cell("#| default_exp first"))
    write_notebook(tmp_path / "nbs/01_second.ipynb", TITLE, new_code_cell("#| default_exp second"),
                   "## Why Not?\n\nBecause\n$$a < b$$\n($b > a$).")
    (tmp_path / "README.md").write_text("# Front")
    (tmp_path / "HOWTO.md").write_text("# How\n\n[settings](settings.ini), `[no link](missing)`")
    (tmp_path / "settings.ini").write_text("[DEFAULT]")
    return tmp_path


@pytest.fixture
def page(tmp_path):
    """The page that a chapter with these cells becomes."""
    def make(*cells):
        return Page(write_notebook(tmp_path / "nbs/01_second.ipynb", TITLE, new_code_cell("#| default_exp second"), *cells), tmp_path)
    return make


def test_directives_are_not_shown_and_hidden_cells_are_left_out(page):
    text = page(new_code_cell("#| export\nx = 1"), new_code_cell("#|slow\n#| cuda\ny = 2"), new_code_cell("#| hide\nsecret = 3"),
                new_code_cell("#| eval: false\nz = 4")).text
    assert all(code in text for code in ("\nx = 1\n", "\ny = 2\n", "\nz = 4\n"))
    assert "#|" not in text and "default_exp" not in text and "secret" not in text


def test_the_library_is_told_from_the_lesson(page):
    library, lesson, both = page(new_code_cell("#| export\nx = 1"), new_code_cell("y = 2"),
                                 new_code_cell("#| export\n#| cuda\n#| slow\nz = 3")).text.split('<div class="cell')[1:]
    assert library.startswith(' library"><span class="label">flowbook.second</span>')
    assert lesson.startswith('">\n') and "flowbook" not in lesson
    assert both.startswith(' library"><span class="label">flowbook.second · needs a GPU · takes longer</span>')


def test_a_chapter_has_its_number_and_says_its_module(page):
    title, what, module = page().text.split("\n\n")
    assert (title, what) == ("# [01]{.number} Second", "> What it is.") and "the module <code>flowbook.second</code>" in module


@pytest.mark.parametrize("source, folded", [
    ("#| export\nimport os\nfrom re import sub", True),
    ("import os\nif True: from re import sub\ntry: import fcntl\nexcept ImportError: fcntl = None", True),
    ("import os\nx = 1", False),
    ("%time\nimport os", False),
    ("# a remark", False),
])
def test_cells_that_only_import_are_folded(page, source, folded):
    assert ("<details" in page(new_code_cell(source)).text) is folded


def test_outputs_are_shown_as_they_are_stored(page):
    picture = {"image/png": base64.b64encode(b"dots").decode(), "text/plain": "<Figure>"}
    outputs = [new_output("stream", text="\x1b[31mred\x1b[0m\n"), new_output("display_data", data=picture),
               new_output("execute_result", data={"text/html": "<b>\n\nrich</b>", "text/plain": "plain"}),
               new_output("execute_result", data={"text/markdown": "| a |\n|---|\n| [b](00_first.ipynb) |", "text/plain": "<Markdown>"}),
               new_output("execute_result", data={"text/plain": "'a ``` b'"})]
    chapter = page(new_code_cell("show()", outputs=outputs))
    [(name, contents)] = chapter.pictures.items()
    assert contents == b"dots" and f"]({name})" in chapter.text
    for shown in ("```text\nred\n```", "```{raw} html\n<b>\n\nrich</b>\n```", "\n\n| a |\n|---|\n| [b](00_first.ipynb) |\n\n",
                  "````text\n'a ``` b'\n````"):
        assert shown in chapter.text
    assert "plain" not in chapter.text and "<Figure>" not in chapter.text and "<Markdown>" not in chapter.text


def test_the_contents_come_from_the_folder_and_links_lead_to_pages(repository, tmp_path):
    stage(repository, to := tmp_path / "pages")
    front = (to / "index.md").read_text()
    assert [line for line in front.splitlines() if line.startswith((":caption:", "0", "tutorials/", "about/"))] == [
        ":caption: Tutorials", "tutorials/01_start", ":caption: Chapters", "00_first", "01_second",
        ":caption: About", "about/HOWTO", "about/settings.ini"]
    assert "[one](00_first.md), [how](about/HOWTO.md)" in front
    assert "[there](../01_second.md#why-not), [home](../index.md)" in (to / "tutorials/01_start.md").read_text()
    assert "[settings](settings.ini.md), `[no link](missing)`" in (to / "about/HOWTO.md").read_text()


def test_dead_links_and_what_would_need_the_network_are_found(tmp_path):
    (tmp_path / "b.html").write_text('<h2 id="here">Here</h2>')
    (tmp_path / "a.html").write_text('<p id="me"><a href="#me"></a> <a href="b.html#here"></a> <a href="https://example.org/x"></a></p>')
    assert dead_links(tmp_path) == []
    (tmp_path / "a.html").write_text('<a href="c.html"></a> <a href="b.html#gone"></a> <img src="attachment:x.png"> '
                                     '<script src="https://example.org/x.js"></script>')
    assert sorted(dead_links(tmp_path)) == [
        "a.html: loads attachment:x.png from the network", "a.html: loads https://example.org/x.js from the network",
        "a.html: the link to b.html#gone leads nowhere", "a.html: the link to c.html leads nowhere"]


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_book_is_made_and_a_dead_link_fails(repository, tmp_path, capsys):
    pytest.importorskip("sphinx", reason="needs `make .venv/book`")
    assert build(repository, tmp_path / "good") == []
    text = (tmp_path / "good" / "01_second.html").read_text()
    assert r'<span class="together">(<span class="math notranslate nohighlight">\(b &gt; a\)</span>).</span>' in text
    assert r"\[a &lt; b\]" in text
    write_notebook(repository / "nbs/02_third.ipynb", "# Third\n\n[one](00_frist.ipynb)", new_code_cell("#| default_exp third"))
    assert "Sphinx complained (above)" in build(repository, tmp_path / "bad")
    assert "02_third.md" in capsys.readouterr().err
