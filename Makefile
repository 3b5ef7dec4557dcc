# make demo: the whole paper in miniature on painted pictures.   make poems: fine-tuning on poems, the paper's table 6, likewise.   make test: every test.   All first make .venv and install what they need.
PYTHON ?= python3

.PHONY: demo poems test clean

demo: .venv/installed
	@echo "--- A model trained beforehand plays the part of released CLIP weights: only its vision tower will be kept."
	.venv/bin/python train.py --stage 2 --seed 1 --max-steps 160 --out runs/demo-vision
	@echo "--- Stage 1: a fresh Chinese text tower learns; the vision tower is frozen."
	.venv/bin/python train.py --stage 1 --vision-weights runs/demo-vision/best.pt --out runs/demo-stage1
	@echo "--- Stage 2: both towers learn."
	.venv/bin/python train.py --stage 2 --init runs/demo-stage1/best.pt --epochs 6 --out runs/demo-stage2
	@echo "--- Recall among 500 scenes that were never trained on."
	.venv/bin/python evaluate.py --ckpt runs/demo-stage2/best.pt --data demo --report runs/demo.html

poems: .venv/installed
	@echo "--- A model trained on painted landscapes with plain captions plays the part of released weights."
	.venv/bin/python train.py --stage 2 --data landscapes --max-steps 200 --out runs/landscapes
	@echo "--- It is fine-tuned on landscapes whose captions are lines of classical verse."
	.venv/bin/python train.py --recipe small --data poems --init runs/landscapes/best.pt --epochs 15 --out runs/poems
	@echo "--- The paper's table 6: before and after, on poems that were never trained on."
	.venv/bin/python evaluate.py --ckpt runs/poems/start.pt runs/poems/best.pt --data poems --report runs/poems.html

test: .venv/installed-tests
	.venv/bin/python -m pytest -q tests

clean:
	rm -rf .venv runs/demo-vision runs/demo-stage1 runs/demo-stage2 runs/demo.html runs/landscapes runs/poems runs/poems.html

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	.venv/bin/python -m pip install -q --no-deps -r tests/requirements.txt
	touch $@
