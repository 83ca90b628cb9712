# make demo   environment, install, and the main job on a real network and real photographs
# make test   environment, install, and every test
# make bench  environment, install, and times beside OpenVINO and ONNX Runtime, written to deploy/benchmarks (OPTIONS="--nets resnet18")
# make gpu-bundle  environment, install, and what a machine with a GPU needs to check and time our libraries, in gpu-bundle/ (OPTIONS="--nets resnet50")
# make gpu-check   on that machine: every layer exactly, then times beside PyTorch's, written to OUT (OPTIONS="--resume")
# make check  the fast inner loop: the formatter, ruff, mypy, the house, arithmetic, passes, importers, the tiny end-to-end test
# make format what `make check` asks of the formatter
VENV := .venv
PYTHON := $(VENV)/bin/python
PRODUCT := hawq_tvm relay_passes schedules deploy
SOURCES := $(PRODUCT) tests

.PHONY: demo test bench check format clean gpu-bundle gpu-check

demo: $(VENV)/demo.stamp
	$(PYTHON) -m hawq_tvm.studies.demo

test: $(VENV)/test.stamp
	$(PYTHON) -m pytest -n 2 --dist worksteal

# The zoo's networks come from PyTorch, hence two extras.
bench: $(VENV)/bench,torch.stamp
	$(PYTHON) -m hawq_tvm.studies.table $(OPTIONS)

gpu-bundle: $(VENV)/bench,torch,cuda.stamp
	$(PYTHON) -m hawq_tvm.bench.gpu.gpu_bundle $(OPTIONS)

# No environment: the machine with the GPU has its own Python, NumPy and PyTorch, and no network.
GPU_PYTHON := python3
OUT := gpu.json
gpu-check:
	@test -f gpu-bundle/gpu_check.py || { echo "gpu-check: no bundle in gpu-bundle/: make it with make gpu-bundle, on a machine with nvcc, and copy it here" >&2; exit 3; }
	$(GPU_PYTHON) gpu-bundle/gpu_check.py --out $(OUT) $(OPTIONS)

check: $(VENV)/test.stamp
	$(VENV)/bin/ruff format --check --quiet $(SOURCES)
	$(VENV)/bin/ruff check --quiet $(SOURCES)
	$(VENV)/bin/mypy $(PRODUCT)
	$(PYTHON) -m pytest -q -n 2 -m "not slow" tests/test_tiny.py tests/test_house.py tests/arith tests/passes tests/frontend

format: $(VENV)/test.stamp
	$(VENV)/bin/ruff check --fix --quiet $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

$(VENV)/%.stamp: pyproject.toml deploy/environment.sh
	bash deploy/environment.sh $(VENV) $*

clean:
	rm -rf $(VENV) .demo .bench build *.egg-info
