# Four commands: run, test, lab, site. They need python3 (3.10 or later), make and, once, a network for pip.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help run test lab site install lock clean

help:
	@echo "promptbook: a notebook-first course on prompt learning"
	@echo ""
	@echo "  make run    compare the methods of CLIP prompt learning: a table and a figure in minutes"
	@echo "  make test   everything CI checks: export, notebooks, outputs, site links, unit tests"
	@echo "  make lab    open JupyterLab at the first chapter"
	@echo "  make site   build the site into _docs/ (needs Quarto)"
	@echo ""
	@echo "Each makes $(VENV) first if it is missing. Also: make install, make lock, make clean."

# The lock fits Python 3.11 and later; on 3.10 the ranges of settings.ini decide.
# torch goes first and alone, so that a CPU build is taken where pip is offered one.
$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "promptbook needs Python 3.10 or later; choose one with: make run PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    lock="-c constraints.txt"; torch=$$(grep '^torch==' constraints.txt); \
	else \
	    lock=""; torch="torch"; echo "constraints.txt is for Python 3.11 and later: installing by the ranges of settings.ini"; \
	fi; \
	echo "installing $$torch"; $(PIP) install --quiet "$$torch" && \
	echo "installing promptbook and its tools"; $(PIP) install --quiet $$lock -e '.[dev]'
	@touch $@

install: $(STAMP)

run: $(STAMP)
	@$(BIN)/promptbook reproduce clip-baselines --quick --workers 2

test: $(STAMP)
	@$(BIN)/python tests/run_all.py

lab: $(STAMP)
	@$(BIN)/python -m jupyter lab nbs/20_clip.ipynb

site: $(STAMP)
	@if command -v quarto >/dev/null; then PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_docs && echo "the site is in _docs/index.html"; \
	else echo "The site needs Quarto: get it from https://quarto.org/docs/get-started (or 'conda env create -f environment.yml'), then run 'make site' again."; exit 1; fi

# Rewrite the lock from what is installed now (after a deliberate upgrade; run 'make test' before committing it).
lock: $(STAMP)
	@{ sed -n '/^#/p' constraints.txt; $(PIP) freeze --exclude-editable --exclude pip --exclude promptbook | sed -e 's/+cpu$$//' -e '/^nvidia-/d;/^triton/d;/^cuda-/d' ; } > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) _docs _proc build *.egg-info
