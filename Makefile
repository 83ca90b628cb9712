# make demo   environment, install, and the main job on a real network and real photographs
# make test   environment, install, and every test
# make bench  environment, install, and times beside OpenVINO and ONNX Runtime, written to deploy/benchmarks (OPTIONS="--nets resnet18")
# make gpu-bundle  environment, install, and what a machine with a GPU needs to check and time our libraries, in gpu-bundle/ (OPTIONS="--nets resnet50")
# make gpu-check   on that machine: every layer exactly, then times beside PyTorch's, written to OUT (OPTIONS="--resume")
# make check  the fast inner loop: ruff, mypy, the tiny end-to-end test
VENV := .venv
PYTHON := $(VENV)/bin/python
SOURCES := hawq_tvm relay_passes schedules deploy tests
TYPED := hawq_tvm/arith.py hawq_tvm/threshold_search.py hawq_tvm/cpu.py hawq_tvm/runtime.py hawq_tvm/package_commands.py deploy/archive.py deploy/graph.py deploy/package.py deploy/signature.py hawq_tvm/ops.py hawq_tvm/stages.py hawq_tvm/errors.py hawq_tvm/ranges.py hawq_tvm/thresholds.py hawq_tvm/bench/engine.py hawq_tvm/bench/packaged.py hawq_tvm/bench/gpu_entries.py hawq_tvm/bench/gpu_bundle.py hawq_tvm/bench/gpu_table.py hawq_tvm/bench/on_gpu.py deploy/gpu_runner hawq_tvm/frontend hawq_tvm/quantize hawq_tvm/cuda hawq_tvm/native hawq_tvm/remote hawq_tvm/manifest.py hawq_tvm/gputune relay_passes

.PHONY: demo test bench check clean gpu-bundle gpu-check

demo: $(VENV)/demo.stamp
	$(PYTHON) -m hawq_tvm.demo

test: $(VENV)/test.stamp
	$(PYTHON) -m pytest -n 2 --dist worksteal

# The zoo's networks come from PyTorch, hence two extras.
bench: $(VENV)/bench,torch.stamp
	$(PYTHON) -m hawq_tvm.bench.table $(OPTIONS)

gpu-bundle: $(VENV)/bench,torch,cuda.stamp
	$(PYTHON) -m hawq_tvm.bench.gpu_bundle $(OPTIONS)

# No environment: the machine with the GPU has its own Python, NumPy and PyTorch, and no network.
GPU_PYTHON := python3
OUT := gpu.json
gpu-check:
	@test -f gpu-bundle/gpu_check.py || { echo "gpu-check: no bundle in gpu-bundle/: make it with make gpu-bundle, on a machine with nvcc, and copy it here" >&2; exit 3; }
	$(GPU_PYTHON) gpu-bundle/gpu_check.py --out $(OUT) $(OPTIONS)

check: $(VENV)/test.stamp
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/mypy $(TYPED)
	$(PYTHON) -m pytest -q -m "not slow" tests/test_tiny.py tests/arith

$(VENV)/%.stamp: pyproject.toml deploy/environment.sh
	bash deploy/environment.sh $(VENV) $*

clean:
	rm -rf $(VENV) .demo .bench build *.egg-info
