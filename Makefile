# `make narrate` runs the main job, `make test` the tests. Each sets up what it needs in a virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VIDEO ?=
QUERY ?=
MODEL ?=

.PHONY: narrate test train checkpoint checkpoint-code clean

narrate: $(VENV)/.installed
	@$(BIN)/python cli.py narrate $(if $(VIDEO),"$(VIDEO)") $(if $(MODEL),--model "$(MODEL)") $(if $(QUERY),--query "$(QUERY)")

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n auto

# Under three minutes of the recipe of the embedded checkpoint, from nothing, with a table before and after.
train: $(VENV)/.installed-test
	$(BIN)/python train/recipe.py --size quick

# The embedded checkpoint and its sample, from nothing. The sample is the first held-out clip in which at least five things
# of at least four kinds happen.
TRAINED := outputs/streamworld_cpu/narration
checkpoint: $(VENV)/.installed-test
	$(BIN)/python train/recipe.py --size cpu
	mkdir -p space/checkpoint space/samples
	cp $(TRAINED)/*.json $(TRAINED)/*.safetensors $(TRAINED)/*.jinja $(TRAINED)/*.py space/checkpoint/
	cp $(TRAINED)/loss.png docs/loss.png
	$(BIN)/python train/data/streamworld.py space/samples --split test --world tiny --clip 117 --fps 12

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
