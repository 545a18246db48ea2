"""JupyterLab as a person uses it, in a browser: run the first tutorial and watch it train, stop a run and go on, save and come back.

It needs Debian's Chromium: `apt-get install chromium`, then `pytest -m browser`. Where CI is set, a missing browser is a failure.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from flowbook.checkpoint import read_checkpoint, run_folder
from flowbook.runs import read_summary
from flowbook.tracking import read_metrics

pytestmark = pytest.mark.browser
NEEDS = "needs playwright (`make .venv/dev`) and Debian's Chromium (`apt-get install chromium`), then `pytest -m browser` runs it"
MUST_RUN = bool(os.environ.get("CI"))
sync_api = importlib.import_module("playwright.sync_api") if MUST_RUN else pytest.importorskip("playwright.sync_api", reason=NEEDS)
expect = sync_api.expect

ROOT = Path(__file__).parent.parent
SCREENSHOTS = ROOT / "tests" / "screenshots"
PATIENCE, TRAINING = 60_000, 1_200_000        # Milliseconds; only a test that fails waits for so long
expect.set_options(timeout=PATIENCE)
ERROR = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
Lab = namedtuple("Lab", "address folder log")


# ---- JupyterLab and the browser

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab as `make lab` starts it, but with a copy of the notebooks, and with settings of nobody."""
    home = tmp_path_factory.mktemp("lab")
    folder, log, runtime = home / "nbs", home / "server.log", home / "runtime"
    shutil.copytree(ROOT / "nbs", folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    news = home / "config/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    (home / "tmp").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "WANDB_"))}
    environment |= {"JUPYTER_CONFIG_DIR": home / "config", "JUPYTER_DATA_DIR": home / "data", "JUPYTER_RUNTIME_DIR": runtime,
                    "IPYTHONDIR": home / "ipython", "TMPDIR": home / "tmp", "JUPYTER_CONFIG_PATH": ROOT / "tools/jupyter",
                    "JUPYTER_TOKEN": "secret", "PYTHONPATH": ROOT, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", f"--ServerApp.root_dir={folder}"]
    with open(log, "w") as output:
        server = subprocess.Popen(command, cwd=folder, env={name: str(value) for name, value in environment.items()},
                                  stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 300
        while not list(runtime.glob("jpserver-*-open.html")):       # Written last, when the other file has the port
            assert server.poll() is None and time.monotonic() < end, f"JupyterLab does not start:\n{log.read_text()}"
            time.sleep(0.1)
        yield Lab(json.loads(next(runtime.glob("jpserver-*.json")).read_text())["url"], folder, log)
    finally:
        stop(server)


def stop(server):
    """End the server and its kernels. Each kernel is a process group of its own, so the server's group would not be enough."""
    if server.poll() is None:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        server.terminate()
        for process in psutil.wait_procs(family, timeout=30)[1]:
            process.kill()
        server.wait()


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window."""
    chromium = shutil.which("chromium")
    if chromium is None:
        (pytest.fail if MUST_RUN else pytest.skip)(NEEDS)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, lab, request):
    """`with opened(path) as page`: a notebook whose kernel is ready. What fails inside leaves a screenshot, and shows the server's log."""
    @contextmanager
    def opening(path):
        with browser.new_context(viewport={"width": 1280, "height": 1000}) as context:
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            try:
                # A workspace of its own: the usual one would open the notebook of the test before, too
                page.goto(f"{lab.address}lab/workspaces/{request.node.name}/tree/{path}?token=secret")
                wait_until_ready(page, len(nbformat.read(lab.folder / path, 4).cells))
                yield page
            except Exception as error:
                page.screenshot(path=SCREENSHOTS / f"{request.node.name}.png")
                error.add_note(f"screenshot: {SCREENSHOTS / request.node.name}.png")
                error.add_note("the end of the server's log:\n" + "\n".join(lab.log.read_text().splitlines()[-20:]))
                raise
    return opening


def wait_until_ready(page, cells):
    """All cells are there, and a kernel: without one, JupyterLab would take the order to run cells and not run them."""
    expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(cells)
    expect(page.locator("#jp-main-statusbar").get_by_text(re.compile(r"^(?!No Kernel).* \| Idle$"))).to_be_visible()
    expect(page.locator(".jp-Dialog")).to_have_count(0)


# ---- what a person does

def run_all(page):
    """Run > Run All Cells."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator(".lm-Menu").get_by_text("Run All Cells", exact=True).click()


def run(page, number):
    """Click on a cell, and press Shift+Enter; returns the cell."""
    cell = page.locator(".jp-Notebook .jp-Cell").nth(number)
    cell.locator(".jp-InputPrompt").click()
    page.keyboard.press("Shift+Enter")
    return cell


def press_stop(page):
    """The black square above the notebook."""
    page.locator('.jp-NotebookPanel-toolbar [data-command="notebook:interrupt-kernel"]').click()


def save(page):
    """Ctrl+S; returns when the dot in the tab is gone, which says that something is not saved."""
    page.keyboard.press("Control+s")
    expect(page.locator(".lm-TabBar-tab.jp-mod-current")).not_to_contain_class("jp-mod-dirty")


# ---- what a person sees

def wait_until_run(cell):
    """The cell has a number in place of its star, or something went wrong here or in a cell before it."""
    done = cell.locator(".jp-InputPrompt").get_by_text(re.compile(r"\[\d+\]:"))
    expect(done.or_(cell.page.locator(ERROR)).first).to_be_attached(timeout=TRAINING)


def outputs(cell):
    """What a cell has put out, without errors and warnings: a traceback has words of the program in it."""
    return cell.locator(f".jp-OutputArea-output:not({ERROR})")


def epoch_shown(cell):
    """The number in the only `epoch 12/300` that the cell shows."""
    line = outputs(cell).filter(has_text=re.compile(r"epoch \d+/\d+"))
    expect(line).to_have_count(1)
    return int(re.search(r"epoch (\d+)/\d+", line.text_content())[1])


def assert_line_moves(cell, times=3):
    """While the cell runs, its line shows one epoch after the other, each in place of the one before."""
    epochs = [epoch_shown(cell)]
    for _ in range(times):
        expect(outputs(cell).filter(has_text=re.compile(rf"epoch (?!{epochs[-1]}/)\d+/\d+"))).to_have_count(1)
        epochs.append(epoch_shown(cell))
    expect(cell.locator(".jp-InputPrompt")).to_have_text("[*]:")
    assert epochs == sorted(set(epochs))


def pictures(cell):
    """The pictures in a cell's output, as the browser has them; one that is broken is an error."""
    images = outputs(cell).locator("img")
    expect(images).not_to_have_count(0)
    return [image.evaluate("async image => { await image.decode(); return image.src }") for image in images.all()]


def assert_curves_grow(cell, times=3):
    """While the cell runs, its three plots are drawn anew, each time in the same place, with a training loss of more points."""
    lengths = "cell => [...cell.querySelectorAll('.jp-OutputArea svg polyline')].map(line => line.getAttribute('points').split(' ').length)"
    grown = f"([cell, before]) => ({lengths})(cell)[0] > before"
    for _ in range(times):
        before = cell.evaluate(lengths)
        cell.page.wait_for_function(grown, arg=[cell.element_handle(), before[0] if before else 0])
    expect(outputs(cell).locator("svg")).to_have_count(3)
    expect(cell.locator(".jp-InputPrompt")).to_have_text("[*]:")


def assert_last_picture_and_table(cell):
    """What stays of a training that is finished."""
    expect(outputs(cell).locator("table").filter(has_text="best validation loss")).to_have_count(1)
    assert len(pictures(cell)) == 1


def assert_saved(cell, kind, words=""):
    """A cell of a file has one output of this kind, with these words."""
    assert [words in output.data[kind] for output in cell.outputs if kind in output.get("data", {})] == [True]


# ---- the tests

def test_the_first_tutorial_is_run_watched_saved_and_found_again(lab, opened):
    file = lab.folder / "tutorials/01_first_run.ipynb"
    notebook = nbformat.read(file, 4)
    code = [number for number, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    for number in code:
        notebook.cells[number].outputs = []         # The stored ones must not be taken for those of this run
    nbformat.write(notebook, file)
    training, drawing = (next(number for number in code if call in notebook.cells[number].source)
                         for call in ("trainer.train()", "plot_samples("))

    with opened("tutorials/01_first_run.ipynb") as page:
        cells = page.locator(".jp-Notebook .jp-Cell")
        run_all(page)
        cells.nth(training).scroll_into_view_if_needed()        # JupyterLab has gone to the last cell
        assert_line_moves(cells.nth(training))
        assert_curves_grow(cells.nth(training))
        assert len(pictures(cells.nth(training))) == 1          # Samples, of a network that has just begun to learn
        wait_until_run(cells.nth(code[-1]))
        assert page.locator(ERROR).all_text_contents() == []
        assert_last_picture_and_table(cells.nth(training))
        assert len(pictures(cells.nth(drawing))) == 1

        save(page)
        saved = nbformat.read(file, 4)
        assert [cell.source for cell in saved.cells] == [cell.source for cell in notebook.cells]
        assert all(saved.cells[number].outputs for number in code)
        put_out = [output for number in code for output in saved.cells[number].outputs]
        assert [output for output in put_out if output.output_type == "error" or output.get("name") == "stderr"] == []
        assert_saved(saved.cells[training], "image/png")
        assert_saved(saved.cells[training], "text/html", "best validation loss")
        assert_saved(saved.cells[drawing], "image/png")
        assert file.stat().st_size < 300_000

        texts = {number: outputs(cells.nth(number)).all_text_contents() for number in code}
        drawn = {number: pictures(cells.nth(number)) for number in (training, drawing)}
        asked = []
        page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept()))
        page.reload()
        wait_until_ready(page, len(notebook.cells))
        assert asked == [], "it asked whether to leave although everything was saved"
        for number in code:
            expect(outputs(cells.nth(number))).to_have_text(texts[number])
        assert {number: pictures(cells.nth(number)) for number in drawn} == drawn


STOPPED = re.compile(r"^Training was stopped in epoch \d+, after step [\d,]+\. Call train\(\) again to go on from here, "
                     r'or make a new trainer with resume_path="auto"\s*$')
SETUP = """\
from flowbook.config import TrainingConfig
from flowbook.nets import create_model
from flowbook.randomness import set_seed
from flowbook.trainer import FlowTrainer

def new_trainer(config, **options):
    set_seed(config.seed)
    return FlowTrainer(create_model(config.arch, (2,), **config.arch_options), config, wandb_project=None, **options)"""


@pytest.fixture
def written(lab, configured, request):
    """Write a small notebook: the setup, a cell with trainers by name, each with its own settings, and more cells. Returns its name."""
    def write(trainers, *sources):
        making = [f"{name} = new_trainer(TrainingConfig(**{configured(**settings).to_dict()}))" for name, settings in trainers.items()]
        name = f"{request.node.name}.ipynb"
        notebook = new_notebook(cells=[new_code_cell(source) for source in (SETUP, "\n".join(making), *sources)])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
        nbformat.write(notebook, lab.folder / name)
        return name
    return write


def test_a_run_is_stopped_and_goes_on(opened, written, configured):
    settings = dict(epochs=100_000, patience=0, log_every=1)
    folder = run_folder(configured(**settings).run_name, configured().checkpoint_dir)
    name = written({"trainer": settings}, "trainer.train()", "trainer.train()", """\
config = trainer.config.replace(epochs=trainer.epoch + 20)
trainer = new_trainer(config, resume_path="auto")
trainer.train()["status"]""")
    with opened(name) as page:
        run(page, 0), run(page, 1)
        steps = [0]
        for number in (2, 3):       # Stopped, and the second time stopped again after the same trainer went on
            cell = run(page, number)
            assert_line_moves(cell)
            press_stop(page)
            expect(outputs(cell)).to_contain_text(["interrupted"])
            expect(cell.locator(ERROR)).to_have_text(STOPPED)
            steps.append(read_checkpoint(folder / "last.pt")["step"])
            assert (read_summary(folder)["status"], read_summary(folder)["steps"]) == ("interrupted", steps[-1])
            assert steps[-1] > steps[-2]
        cell = run(page, 4)
        expect(cell).to_contain_text(f"Going on with mlp-icfm-moons-all-none at step {steps[-1]},")
        expect(cell).to_contain_text("'finished'", timeout=TRAINING)
        expect(page.locator(ERROR)).to_have_count(2)
    made = [row["step"] for row in read_metrics(folder) if "train/loss" in row]
    assert made == list(range(1, read_summary(folder)["steps"] + 1)) and len(made) > steps[-1]      # None twice, and none left out


def test_each_training_is_shown_in_its_own_cell(opened, written, tmp_path):
    name = written({"first": dict(epochs=30), "second": dict(epochs=40, checkpoint_dir=str(tmp_path / "others"))},
                   "first.train();", "second.train();")

    def shown(cell):
        return outputs(cell).all_text_contents(), pictures(cell)

    with opened(name) as page:
        run(page, 0), run(page, 1)
        first = run(page, 2)
        wait_until_run(first)
        assert_last_picture_and_table(first)
        of_first = shown(first)
        second = run(page, 3)
        wait_until_run(second)
        assert_last_picture_and_table(second)
        of_second = shown(second)
        assert shown(first) == of_first and of_second[1] != of_first[1]
        run(page, 2)        # It is finished: its end is shown again
        expect(outputs(first)).to_contain_text(["The run mlp-icfm-moons-all-none is finished"])
        wait_until_run(first)
        assert_last_picture_and_table(first)
        assert (pictures(first), shown(second)) == (of_first[1], of_second)
        assert page.locator(ERROR).all_text_contents() == []
