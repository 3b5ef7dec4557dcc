# make demo: the whole paper in miniature on painted pictures.   make test: every test.   Both first make .venv and install what they need.
PYTHON ?= python3

.PHONY: demo test clean

demo: .venv/installed
	.venv/bin/python train.py --stage 1 --out runs/demo-stage1
	.venv/bin/python train.py --stage 2 --init runs/demo-stage1/last.pt --out runs/demo-stage2
	.venv/bin/python evaluate.py --ckpt runs/demo-stage2/best.pt --data demo

test: .venv/installed-tests
	.venv/bin/python -m pytest -q tests

clean:
	rm -rf .venv runs/demo-stage1 runs/demo-stage2

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	.venv/bin/python -m pip install -q --no-deps -r tests/requirements.txt
	touch $@
