# Everything is run in .venv, which the first command that needs it creates.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The oldest versions that are supported, in an environment of their own
FLOOR := .venv-floor
FLOOR_READY := $(FLOOR)/.ready
# An environment that has tome_fx from its wheel alone
CLEAN := .venv-wheel

.PHONY: help demo test test-all test-floor lint docs wheel bench gpu report clean

help: ## Show the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 12

$(READY): requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	# torch first and by its exact version: what the other packages ask for would bring another build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements-dev.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(FLOOR_READY): requirements-floor.txt pyproject.toml
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements-floor.txt)"
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-floor.txt
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: $(READY) ## A small UNet with and without token merging, against its peers; with JSON=bench/results/demo.json for the docs
	$(BIN)/python -m bench demo $(if $(JSON),--json $(JSON))

test: $(READY) ## Run the fast tests, in JOBS processes: before each commit
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test-all: $(READY) ## Run every test, as CI does
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Transformers are tested with the newest alone.
# The warning is of importing diffusers 0.36 where there is no CUDA: the option can go when the floor is past that.
test-floor: $(FLOOR_READY) ## Run the library's fast tests on the oldest torch and diffusers supported, in JOBS processes
	$(FLOOR)/bin/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal \
		--ignore tests/cuda_code --ignore tests/benchmarks --ignore tests/test_packaging.py --ignore tests/test_docs.py \
		--ignore-glob "tests/test_transformer*.py" -k "not test_flux" \
		-W "ignore:User provided device_type of 'cuda':UserWarning"

lint: $(READY) ## Check style, types, and that the pages' numbers are those of bench/results
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m bench report --check

# Other packages are those of .venv: a path in a .pth file brings what lies there, and not the editable tome_fx beside it.
wheel: $(READY) ## Build wheel and sdist, check them, and use the wheel in an environment of its own
	rm -rf dist $(CLEAN)
	$(BIN)/python -m build --quiet --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m venv --without-pip $(CLEAN)
	$(BIN)/python -m pip --python $(CLEAN)/bin/python install --quiet --disable-pip-version-check --no-deps dist/*.whl
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(CLEAN)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/others.pth
	cd / && $(CURDIR)/$(CLEAN)/bin/python -I -m tome_fx info
	cd / && $(CURDIR)/$(CLEAN)/bin/python -I $(CURDIR)/.ci/use_wheel.py

# Not --quiet: what it hides is not counted as an error. The variable stills what the theme says of another generator.
docs: $(READY) ## Build the pages as a site in out/site; a link, an anchor or a docstring that is wrong is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(READY) ## Measure what two cores can; with JSON=bench/results/cpu.json for the docs
	$(BIN)/python -m bench latency --suite cpu --breakdown $(if $(JSON),--json $(JSON))

# With the Python at hand, whose torch sees the GPU, and not .venv: the other packages of requirements-dev.txt must be in it
gpu: ## On a GPU: tests, latency, weights and times, into FOLDER; stopped after MINUTES, the same command goes on
	$(PYTHON) -m bench gpu $(if $(MINUTES),--minutes $(MINUTES)) $(if $(FOLDER),--folder $(FOLDER))

report: $(READY) ## Write the pages' tables and plots from bench/results
	$(BIN)/python -m bench report

clean: ## Remove the environment and what was built
	rm -rf $(VENV) $(FLOOR) $(CLEAN) out build dist *.egg-info
