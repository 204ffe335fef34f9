# Two commands are all there is to know: `make report` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# By a path, and so also for a script that lies beside the clone and sees a folder of that name.
COMPAT := --config-settings editable_mode=compat

.PHONY: report test lab clean

report: .venv/installed ## execute every notebook and write reports/fast/index.html
	$(BIN)/gnetlab report $(ARGS)

test: .venv/installed ## linter, tests, and the notebooks at their fast profile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n auto --dist worksteal $(ARGS)

lab: .venv/installed ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

# Once, and again only when the project's requirements change.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gnetlab needs Python 3.11 or newer; $$($(PYTHON) --version) was found." \
	       "Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing into .venv (once; PyTorch alone is some gigabytes)"
	@if command -v uv >/dev/null; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) .venv && \
	  UV_CONSTRAINT="$${UV_CONSTRAINT:-$$PIP_CONSTRAINT}" \
	  uv pip install --quiet --python $(BIN)/python $(COMPAT) --editable '.[test,counters,browser]'; \
	else \
	  $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet $(COMPAT) --editable '.[test,counters,browser]'; \
	fi
	@touch $@

clean: ## remove what the commands made, the virtual environment included
	rm -rf .venv reports build *.egg-info .pytest_cache .ruff_cache
	find gnetlab tests notebooks benchmarks \( -name __pycache__ -o -name .ipynb_checkpoints \) \
	  -prune -exec rm -rf {} +
