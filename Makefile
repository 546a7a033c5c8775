# `make test` and `make demo` each set up what they need in .venv, and work alone in a fresh clone.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
ALL := $(VENV)/.all
WORKERS ?= 2

.PHONY: setup test test-gpu test-versions demo lint bench bench-gpu docs pages wheel clean

setup: $(ALL)

$(READY): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[torch,retinanet]"
	touch $@

# All frameworks, and the tools of development. `tensorflow-cpu` stands in for the extra
# `tensorflow`, which is several times as large.
$(ALL): $(READY)
	$(RUN) -m pip install --quiet --constraint constraints.txt \
		--editable ".[torch,jax,retinanet,onnx,docs,dev]" tensorflow-cpu keras
	touch $@

test: $(ALL)
	FOCAL_BACKENDS= FOCAL_REQUIRE_ALL=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) \
		--dist loadfile --no-loadscope-reorder

# On a machine with packages of its own: make test-gpu RUN=python3 ALL=
test-gpu: $(ALL)
	$(RUN) -m pytest -q tests/gpu

# Fresh environments with other versions, about 8 GB each, under build/versions: docs/versions.md.
SETS ?= floors gpu-image newest
PYTHONS ?= python3.11 python3.12 python3.13
test-versions:
	$(PYTHON) -m tests.tools.versions $(SETS) --pythons $(PYTHONS)

# About two minutes of training on two cores; STEPS=200 makes it a short trial. Stopped, it resumes.
STEPS ?= 2200
demo: $(READY)
	$(RUN) -m focal train --data shapes --preset tiny --image-size 128x128 --steps $(STEPS) --out runs/demo \
		$(if $(wildcard runs/demo),--resume)
	$(RUN) -m focal evaluate runs/demo/weights.safetensors --data shapes --split test --out runs/demo/test.json

lint: $(ALL)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(ALL)
	$(RUN) -m benchmarks

# RUN and ALL as for test-gpu. DATA is a folder in the COCO format, MINUTES is for each part.
OUT ?= runs/gpu
MINUTES ?= 9
bench-gpu: $(ALL)
	PYTHONPATH=. $(RUN) -m benchmarks.gpu --out $(OUT) --minutes $(MINUTES) $(if $(DATA),--data $(DATA))

docs: $(ALL)
	$(RUN) -m mkdocs build --strict --site-dir build/site

# The sdist, the wheel from it, and that wheel in an environment with NumPy and nothing else.
wheel: $(ALL)
	rm -rf build/wheel
	$(RUN) -m build --no-isolation --outdir build/wheel/dist
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --constraint constraints.txt build/wheel/dist/*.whl
	build/wheel/venv/bin/python -m pip check
	cd build/wheel && venv/bin/python ../../.ci/installed.py

# Pictures of the home page and two more, at desktop and phone width. Needs Chromium.
pages: docs
	$(RUN) docs/tools/pictures.py build/site docs/pictures/pages index numerics reproduction

clean:
	rm -rf $(VENV) runs dist build
