# The whole developer interface. Every target builds what it needs; a fresh machine needs Python 3.11 to 3.13 and no more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Threads of the tests' own processes would fight over the cores with pytest-xdist's.
TEST_ENV := OMP_NUM_THREADS=1
SHARED := $(if $(MANIPI_SHARED),$(MANIPI_SHARED),../shared)

.PHONY: install check demo suites test test-long lint types layers size parity bench bench-cli bench-serve fuzz soak bench-data bench-train bench-infer bench-realtime test-lerobot test-client sim-metaworld sim-libero sim-aloha metaworld docs clean help
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(READY)  ## the development environment in .venv
$(READY): pyproject.toml constraints.txt packages/manipi-client/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e packages/manipi-client -e '.[dev]'
	# openpi's own client asks for a NumPy below 2, and works with ours.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps openpi-client==0.1.2 dm-tree==0.1.10
	@touch $(READY)

demo: $(READY)  ## record, train, serve, drive, report (ten to twenty minutes on two cores)
	$(BIN)/manipi demo

suites: $(READY)  ## the demo's policy in every suite of the tabletop: record, train, evaluate (about an hour on two cores; MODEL=pi0: that one)
	$(BIN)/python benchmarks/suites.py $(if $(MODEL),--model $(MODEL))

# Beside pytest, with their output after it; the exit code of either counts.
CHECKS := $(VENV)/.checks
test: $(READY)  ## everything that has to hold before a commit
	@make --no-print-directory check >$(CHECKS) 2>&1 & checks=$$!; \
	$(TEST_ENV) $(BIN)/python -m pytest -q -n auto --dist worksteal; tests=$$?; \
	wait $$checks; checks=$$?; cat $(CHECKS); test $$tests = 0 -a $$checks = 0

check: lint types layers size  ## what needs no test to run

test-long: $(READY)  ## the long forms: full products, kills at random moments; run before a release
	$(TEST_ENV) $(BIN)/python -m pytest -q -n auto --dist worksteal --long

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright --warnings

layers: $(READY)
	$(BIN)/lint-imports --no-cache

size: $(READY)  ## code lines per package folder, against their budgets
	$(BIN)/python benchmarks/size.py

parity: $(READY)  ## every golden case of the reference, as a table (MANIPI_GOLDEN=folder:folder for others)
	$(TEST_ENV) $(BIN)/python -m pytest -q --no-header --show-capture=no --tb=short -r fE tests/parity

bench: bench-cli bench-serve bench-data bench-train bench-infer bench-realtime  ## every benchmark: a table, and as its last line one JSON object each

bench-cli: $(READY)  ## how long the command line takes to answer
	$(BIN)/python benchmarks/bench_cli.py

bench-serve: $(READY)  ## what the server adds to the bare policy call
	$(BIN)/python benchmarks/bench_serve.py

bench-realtime: $(READY)  ## what real-time chunking adds to sampling and to a control step
	$(BIN)/python benchmarks/bench_realtime.py

fuzz: $(READY)  ## 100,000 bad frames for a policy server, beside a good client (about 15 minutes on two cores)
	$(BIN)/python benchmarks/fuzz_serve.py --frames 100000

soak: $(READY)  ## 32 clients of a policy server at once, ten minutes long (MINUTES=2: shorter)
	$(BIN)/python benchmarks/soak.py --minutes $(if $(MINUTES),$(MINUTES),10)

bench-train: $(READY)  ## a training step beside the plain one, an update, and the stall of a save (about 10 GB of memory)
	$(BIN)/python benchmarks/bench_train.py
	$(BIN)/python benchmarks/bench_update.py
	$(BIN)/python benchmarks/bench_checkpoint.py

bench-infer: $(READY)  ## the engine beside the plain path of a PyTorch port, in one thread (MANIPI_BENCH_DTYPE=float32 where bfloat16 is emulated)
	$(BIN)/python benchmarks/bench_infer.py $(if $(MANIPI_BENCH_DTYPE),--dtype $(MANIPI_BENCH_DTYPE))

bench-data: $(READY)  ## norm stats, loader, RLDS, conversion (MANIPI_LEROBOT_PYTHON=python of lerobot, OPENPI=its repository: beside them)
	$(BIN)/python benchmarks/bench_stats.py $(if $(OPENPI),--openpi $(OPENPI))
	$(BIN)/python benchmarks/bench_loader.py
	$(BIN)/python benchmarks/bench_rlds.py --data $(SHARED)/datasets/synthetic_droid_rlds/droidlike
	$(BIN)/python benchmarks/bench_convert.py $(SHARED)/datasets/aloha_sim_transfer_cube_hdf5

LEROBOT := .venv-lerobot
test-lerobot: $(READY) $(LEROBOT)/.installed  ## lerobot 0.4.4, in an environment of its own, opens what we write
	MANIPI_LEROBOT_PYTHON=$(abspath $(LEROBOT)/bin/python) $(BIN)/python -m pytest -q tests/data/lerobot/test_lerobot_opens.py

$(LEROBOT)/.installed:
	test -x $(LEROBOT)/bin/python || $(PYTHON) -m venv $(LEROBOT)
	$(LEROBOT)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 'datasets>=4,<4.2' \
	  'huggingface_hub>=0.34.2,<0.36' 'av>=15,<16' 'numpy<2.3' packaging jsonlines einops draccus==0.10.0 deepdiff imageio \
	  termcolor tqdm pandas pyserial torchcodec==0.13.0
	$(LEROBOT)/bin/pip install --quiet --disable-pip-version-check --no-deps lerobot==0.4.4 torchvision==0.28.0 accelerate \
	  psutil pyyaml safetensors
	# torchcodec looks for FFmpeg by its plain names, which are those of PyAV's copy but for a hash.
	cd $(LEROBOT)/lib/python*/site-packages/av.libs && for f in libav*-*.so.* libsw*-*.so.*; do \
	  ln -sf $$f $${f%%-*}.so.$$(echo $$f | sed -E 's/.*\.so\.([0-9]+)\..*/\1/'); done
	@touch $@

CLIENT := .venv-client
PYTHON38 ?= python3.8
test-client: $(CLIENT)/.installed  ## the client package's tests on Python 3.8 and NumPy 1 (PYTHON38=its program)
	# websockets 13.1, the last for 3.8, starts a connection's thread before all of the connection is there for it.
	$(CLIENT)/bin/python -m pytest -q -c /dev/null --rootdir . --confcutdir tests/client --import-mode importlib -p no:cacheprovider \
	  -W error -W default::pytest.PytestUnhandledThreadExceptionWarning tests/client

$(CLIENT)/.installed: packages/manipi-client/pyproject.toml $(wildcard packages/manipi-client/src/manipi_client/*.py)
	test -x $(CLIENT)/bin/python || $(PYTHON38) -m venv $(CLIENT)
	# The client is not installed in place: hatchling's newest releases want a newer Python.
	$(CLIENT)/bin/pip install --quiet --disable-pip-version-check pytest ./packages/manipi-client
	@touch $@

# Simulators: pinned packages in an environment of their own, with the client of this checkout. docs/simulators.md
sim-metaworld: $(READY) simulators/metaworld/.venv/.installed  ## MetaWorld: build its environment (0.3 GB), and try the whole loop
	$(BIN)/python simulators/try.py metaworld

sim-libero: $(READY) simulators/libero/.venv/.installed  ## LIBERO: the same (2 GB)
	$(BIN)/python simulators/try.py libero

sim-aloha: $(READY) simulators/aloha/.venv/.installed  ## gym-aloha: the same (0.6 GB)
	$(BIN)/python simulators/try.py aloha

.PRECIOUS: simulators/%/.venv/.installed
sim-%: $(READY) simulators/%/.venv/.installed
	$(BIN)/python simulators/try.py $*

simulators/%/.venv/.installed: simulators/%/requirements.txt packages/manipi-client/pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	# In place: what changes in the client needs no installation.
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e packages/manipi-client
	@touch $@

MODEL := pi05
metaworld: $(READY) simulators/metaworld/.venv/.installed  ## four tasks of MetaWorld: record, train, drive beside controls (about 90 minutes; MODEL=pi0)
	$(BIN)/python benchmarks/learn.py metaworld/four --recipe simulators/metaworld/recipe.py:$(MODEL)_metaworld \
	  --dir runs/metaworld_$(MODEL) --lessons metaworld/lessons --episodes 1575 --noise 0 0.2 0.4 --title "MetaWorld, four tasks, one policy: $(MODEL)" --command "make metaworld MODEL=$(MODEL)"

docs: $(READY)  ## write the file tree of docs/architecture.md, then check the documentation: links, commands, examples
	$(BIN)/python docs/make_tree.py
	$(BIN)/python -m pytest -q tests/docs

clean:
	rm -rf $(VENV) $(LEROBOT) $(CLIENT) simulators/*/.venv .pytest_cache .ruff_cache .import_linter_cache
