# rnnbook. Everything needs only Python >= 3.11 and make; `make help` lists the targets.
#   PYTHON=...       the interpreter to build on           (default: the first suitable one found)
#   CONSTRAINTS=     install without the pinned set        (default: constraints.txt)
#   JOBS=...         processes that run tests at a time    (default: 2)

VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
JOBS        ?= 2
PYTHON      ?=

PY     := $(VENV)/bin/python
READY  := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q
EXPORT_CHECK := tests/test_laws.py::test_law_4_export_is_current

.DEFAULT_GOAL := help
.PHONY: help book test lab site run export bench evidence clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

book: $(READY)  ## set up, execute every notebook, write the site, and say where it is
	$(PY) book/execute.py nbs _build/nbs
	$(PY) book/build.py --source _build/nbs --out _build/html

test: $(READY)  ## set up, then check the export, the tests, every notebook and the site
	@echo "== Is the export current?"
	@$(PYTEST) $(EXPORT_CHECK)
	@echo "== The site, from the stored outputs"
	@$(PY) book/build.py --source nbs --out _build/test/html
	@echo "== The tests, and every notebook cell by cell"
	@RNNBOOK_SITE=_build/test/html $(PYTEST) --nbval-lax --nbval-current-env -n $(JOBS) --dist loadfile \
		--deselect $(EXPORT_CHECK) tests nbs

lab: $(READY)  ## open JupyterLab at the book's index, with one thread: the book's networks are too small for more
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/jupyter lab $$([ "$$(id -u)" != 0 ] || echo --allow-root) nbs/index.ipynb

site: $(READY)  ## write the site from the outputs stored in the notebooks, in seconds
	$(PY) book/build.py --source nbs --out _build/html

run: $(READY)  ## execute one notebook in place: make run NB=02_rnn
	@test -f "nbs/$(NB).ipynb" || { echo "make run: no nbs/$(NB).ipynb; say for example: make run NB=02_rnn" >&2; exit 1; }
	$(PY) book/execute.py --in-place nbs/$(NB).ipynb

export: $(READY)  ## write rnnbook/ from the notebooks, and clean their metadata
	$(VENV)/bin/nbdev_export
	$(VENV)/bin/nbdev_clean

bench: $(READY)  ## measure speed side by side (takes minutes; results are printed)
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(PY) $$script || exit 1; done

evidence: $(READY)  ## complete the records of the long runs (interrupt it as you like; it goes on where it stopped)
	$(PY) benchmarks/records/evidence.py

clean:  ## remove what was built (the environment in .venv stays)
	rm -rf _build build dist *.egg-info .pytest_cache .hypothesis
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -print | xargs rm -rf

# The environment is made once, and again only when what it is made from has changed.
$(READY): settings.ini setup.py pyproject.toml $(CONSTRAINTS)
	@found=; for candidate in $(or $(PYTHON),python3 python python3.14 python3.13 python3.12 python3.11); do \
		if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
		then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "No suitable Python: the book needs Python 3.11 or later with its venv module." >&2; \
		echo "Looked for: $(or $(PYTHON),python3 python python3.14 python3.13 python3.12 python3.11)." >&2; \
		echo "On Debian or Ubuntu, 'apt install python3-venv' adds the module. To name an interpreter: make PYTHON=/path/to/python3.12 book" >&2; \
		exit 1; \
	fi; \
	if ! $(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "Creating $(VENV) with $$($$found --version). Installing takes about two minutes, once."; \
		$$found -m venv --clear $(VENV) || exit 1; \
	fi
	$(PY) -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev,book]'
	@touch $@
