# Every target makes the environment that it needs in .venv; nothing has to be activated.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help train test lab check export readme book torture bench reproduce clean
.DELETE_ON_ERROR:

help: ## show this list
	@echo "make ..."
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

train: .venv/package ## train a flow of handwritten digits and draw from it; goes on where it was stopped
	$(BIN)/flowbook prepare digits
	$(BIN)/flowbook train --resume

# One thread each: notebooks and tests run side by side, and threads that wait for a busy processor make small networks ten times slower.
test: .venv/dev ## run the cells of all notebooks, then pytest's quick tests
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --timing
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=logical --maxprocesses=4

# ARGS are JupyterLab's own, as in `make lab ARGS="--no-browser --port 9000"`.
lab: .venv/dev ## open the chapters in JupyterLab
	JUPYTER_CONFIG_PATH="$(CURDIR)/tools/jupyter" $(BIN)/jupyter-lab nbs $(ARGS)

check: .venv/dev ## are notebooks, package and README in step, the chapters in order, the linter content?
	$(BIN)/python tools/check.py

export: .venv/dev ## after changing notebooks: clean them, write the package and the README
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tools/readme.py

readme: .venv/dev ## write the README from nbs/index.ipynb
	$(BIN)/python tools/readme.py

book: .venv/book ## make an HTML book of the notebooks as they are stored: book/index.html
	$(BIN)/python -m tools.book

torture: .venv/dev ## kill a run a hundred times at random moments; it must end as if nothing had been
	FLOWBOOK_KILLS=$${FLOWBOOK_KILLS:-100} FLOWBOOK_TORTURE_SEED=$${FLOWBOOK_TORTURE_SEED:-$$(date +%s)} OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -s tests/test_kills.py -k random

bench: .venv/peers ## measure what a step costs beside other trainers, starting, saving, pairing and watching (benchmarks/results/)
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/pairing.py
	$(BIN)/python benchmarks/view.py

# ARGS are the script's own, as in `make reproduce ARGS="otcfm --seeds 0 1 2"`.
reproduce: .venv/dev ## run a published table again, seed by seed; goes on where it was stopped (benchmarks/results/c2ot.json)
	$(BIN)/python benchmarks/c2ot.py $(ARGS)

clean: ## remove caches and the book (never environments, data or runs)
	find . -path './.venv*' -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -print0 | xargs -0 rm -rf
	rm -rf .pytest_cache .ruff_cache .hypothesis book

# The environment. `package`, `dev`, `peers` and `book` are empty files that say what is installed.

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	"The versions in constraints.txt need Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	"Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/package: settings.ini setup.py constraints.txt | .venv/bin/python
	@echo "Installing flowbook and what it needs into .venv (PyTorch is large: some minutes the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/dev: .venv/package
	@echo "Installing the development tools into .venv"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# torchcfm's couplings and flows need none of what it asks for, and its torchvision may not fit the torch that is there.
.venv/peers: .venv/dev
	@echo "Installing the other libraries that tests and benchmarks compare with into .venv"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[peers]'
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps torchcfm
	@touch $@

.venv/book: .venv/dev
	@echo "Installing what makes the book into .venv"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[book]'
	@touch $@
