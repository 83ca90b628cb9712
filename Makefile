# make demo   environment, install, and the main job on a real network and real photographs
# make test   environment, install, and every test
# make bench  environment, install, and times beside OpenVINO and ONNX Runtime, written to deploy/benchmarks (OPTIONS="--nets resnet18")
# make check  the fast inner loop: ruff, mypy, the tiny end-to-end test
VENV := .venv
PYTHON := $(VENV)/bin/python
SOURCES := hawq_tvm relay_passes schedules deploy tests
TYPED := hawq_tvm/arith.py hawq_tvm/ops.py hawq_tvm/stages.py hawq_tvm/errors.py hawq_tvm/ranges.py hawq_tvm/thresholds.py hawq_tvm/bench/engine.py hawq_tvm/bench/packaged.py hawq_tvm/frontend hawq_tvm/quantize hawq_tvm/cuda hawq_tvm/gputune relay_passes

.PHONY: demo test bench check clean

demo: $(VENV)/demo.stamp
	$(PYTHON) -m hawq_tvm.demo

test: $(VENV)/test.stamp
	$(PYTHON) -m pytest -n 2 --dist worksteal

# The zoo's networks come from PyTorch, hence two extras.
bench: $(VENV)/bench,torch.stamp
	$(PYTHON) -m hawq_tvm.bench.table $(OPTIONS)

check: $(VENV)/test.stamp
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/mypy $(TYPED)
	$(PYTHON) -m pytest -q -m "not slow" tests/test_tiny.py tests/arith

$(VENV)/%.stamp: pyproject.toml deploy/environment.sh
	bash deploy/environment.sh $(VENV) $*

clean:
	rm -rf $(VENV) .demo .bench build *.egg-info
