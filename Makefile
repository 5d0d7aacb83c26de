# `make demo` and `make test` do all set-up themselves and reuse it the next time.

PYTHON := $(firstword $(foreach p,python3.12 python3.11 python3,$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-gpu faults setup lint unit clean

demo: setup
	$(VENV)/bin/optpipe run recipes/practise.toml

test: setup lint unit

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "optpipe needs Python 3.11 or later: none was found on the PATH"; exit 3; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[cpu,openvino,dev]'
	@touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# One thread: the tests' networks are too small for more, and on a busy machine threads wait for each other.
# Two processes: in a single one, which exports and builds for all tests, the interpreter was seen to crash.
unit: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m 'not gpu and not slow' tests/backends tests/faults $(wildcard tests/test_[a-k]*.py)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m 'not gpu and not slow' $(wildcard tests/test_[l-z]*.py)

test-slow: setup
	$(VENV)/bin/python -m pytest -m slow

# On a machine with an NVIDIA GPU. What needs more than `setup` installs (the extra [nvidia]) is skipped, and says so.
test-gpu: setup
	$(VENV)/bin/python -m pytest -m gpu

# The fault campaigns; writes what they come to into docs/reliability.md. One alone: make faults CAMPAIGNS=inputs
faults: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python -m faults $(CAMPAIGNS)

clean:
	rm -rf $(VENV) runs build *.egg-info
