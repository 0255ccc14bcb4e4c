# `make narrate` runs the main job, `make test` the tests. Each sets up what it needs in a virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VIDEO ?=
QUERY ?=
MODEL ?=

.PHONY: narrate test checkpoint checkpoint-code clean

narrate: $(VENV)/.installed
	@$(BIN)/python cli.py narrate $(if $(VIDEO),"$(VIDEO)") $(if $(MODEL),--model "$(MODEL)") $(if $(QUERY),--query "$(QUERY)")

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n auto

# The embedded checkpoint and its sample, from nothing: under two hours on two cores of a CPU. The sample is the first
# held-out clip of 24 frames in which six things happen, with four colours and all four sides.
TRAINED := outputs/shapes_pairs
checkpoint: $(VENV)/.installed-test
	$(BIN)/python train/sft.py --config train/configs/shapes_alignment.yaml
	$(BIN)/python train/sft.py --config train/configs/shapes_narration.yaml
	$(BIN)/python train/sft.py --config train/configs/shapes_pairs.yaml
	mkdir -p space/checkpoint space/samples
	cp $(TRAINED)/*.json $(TRAINED)/*.safetensors $(TRAINED)/*.jinja $(TRAINED)/*.py space/checkpoint/
	$(BIN)/python train/data/shapes.py space/samples/shapes.mp4 --seed 1009678

# The code that travels with the embedded checkpoint, after a change to it.
checkpoint-code:
	cp *_videollm_mod.py chat_template.jinja space/checkpoint/

# pip is upgraded first: an old one cannot read this project's licence field. Quiet twice, since an editable install of a
# package that is its own folder has setuptools warn of what is meant.
$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.installed: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --quiet --editable ".[train,dev]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
