# make demo: the whole paper in miniature, on painted images. make test: the tests. make test-all:
# those that take long. Each first makes .venv and installs what it needs.
PYTHON ?= python3
# Waiting threads sleep instead of spinning: three times as fast where programs share the cores.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

.PHONY: demo test test-all clean

demo: .venv/installed
	.venv/bin/python -m tools.demo

test: .venv/installed-tests
	.venv/bin/python -m pytest -q -m 'not slow' tests

test-all: .venv/installed-tests
	.venv/bin/python -m pytest -q -m slow tests

clean:
	rm -rf .venv runs/demo

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	.venv/bin/python -m pip install -q --no-deps -r tests/requirements.txt
	touch $@
