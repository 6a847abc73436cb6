# Environments are made on first use; torch's bounds in pyproject.toml pick the build that was tested.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
CODE := src tests tools

.PHONY: demo test unit test-slow lint docs docs-serve coverage notebooks bench clean

demo: $(VENV)/.runs
	$(BIN)/triptych demo

# Everything that must hold before a change goes in: style, types, import contracts, words, docs, tests.
test: lint docs unit

unit: $(VENV)/.tests
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(VENV)/.tests
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.tests
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell $(CODE) docs examples README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md
	$(BIN)/python tools/check_words.py
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The site with search, on http://localhost:8000.
docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory site

coverage: $(VENV)/.tests
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --cov --cov-report=term --cov-report=html

notebooks: $(VENV)/.docs
	$(BIN)/python tools/run_notebooks.py

bench: $(VENV)/.tests
	$(BIN)/triptych bench vit

$(VENV)/.runs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'torch>=2.11,<2.14'
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.tests: $(VENV)/.runs
	$(BIN)/python -m pip install --quiet -e '.[test]'
	# References whose own requirements would bring another torch, or Qt.
	$(BIN)/python -m pip install --quiet --no-deps k-diffusion torchsde torchdiffeq trampoline labelme
	# Not among the installed packages: a torchvision without its operators would break whatever imports it.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/references timm 'torchvision==0.28.0'
	touch $@

$(VENV)/.docs: $(VENV)/.runs
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) site htmlcov build dist
