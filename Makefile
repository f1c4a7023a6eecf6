# Every target sets up what it needs, once (scripts/setup.sh). PYTHON=python3.12 chooses the
# interpreter that .venv is made with.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin

# The Python that Tinkex.CustomLoss starts.
export TINKEX_CUSTOM_LOSS_PYTHON := $(CURDIR)/$(BIN)/python
# Elixir wants a UTF-8 locale, and this is the one that every Debian has.
export LC_ALL := C.UTF-8

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

.PHONY: setup
setup: ## install Elixir, and the package with its extras in .venv, if they are not there
	@scripts/setup.sh

.PHONY: demo demo-python
demo: setup ## train a small language model from Elixir (TEXT=path for another text)
	@mix compile
	@scripts/demo.sh docs/examples/demo.exs

demo-python: setup ## the same with the official SDK, over HTTP
	@$(BIN)/python docs/examples/demo.py

.PHONY: demo-rl demo-rl-elixir
demo-rl: setup ## GRPO with regularizers, from samples to a resumed checkpoint
	@$(BIN)/python docs/examples/grpo.py

demo-rl-elixir: setup ## the same from Elixir
	@mix compile
	@scripts/demo.sh docs/examples/grpo.exs

.PHONY: test test-elixir test-python test-sdk-lowest
test: setup ## run all tests, Elixir's and Python's
	@$(MAKE) --keep-going test-elixir test-python test-sdk-lowest

test-elixir: setup ## run the Elixir tests, and those of both languages through the port
	mix test

test-python: setup ## run the Python tests
	$(BIN)/pytest

# The newest is .venv's own.
test-sdk-lowest: setup ## run the tests of the training client with the oldest tinker that is supported
	PYTHONPATH=.venv/tinker-lowest $(BIN)/pytest --no-header -q $(addprefix tests/python/test_, \
		call_queue.py client_defaults.py failed_steps.py linear.py sdk.py training_client.py)

# W&B and Trackio bring other versions of what the tests have; theirs lie apart.
.PHONY: test-loggers
test-loggers: setup ## run the tests of the sinks with the real W&B and Trackio
	@$(BIN)/python -m pip install --quiet --upgrade --target .make/loggers wandb trackio
	PYTHONPATH=.make/loggers $(BIN)/pytest --no-header -q tests/python/test_adapters.py

.PHONY: chaos fuzz soak
chaos: setup ## make ten thousand calls under faults of every kind (CHAOS_SEED repeats a run)
	@MIX_ENV=test mix do compile, run tests/bridge/chaos.exs

fuzz: setup ## decode a million mutated and random frames on either side (FUZZ_SEED repeats a run)
	@MIX_ENV=test mix do compile, run tests/fuzz/frames.exs
	@PYTHONPATH=python $(BIN)/python tests/fuzz/frames.py 1000000 $(or $(FUZZ_SEED),4)

soak: setup ## make a hundred thousand calls, small and large, and watch the memory
	@MIX_ENV=test mix do compile, run tests/bridge/soak.exs

# New examples each time; PROPERTIES_SEED=N repeats a run.
.PHONY: properties
properties: setup ## draw 3000 new compositions for each property (EXAMPLES=n for another number)
	@seed=$${PROPERTIES_SEED:-$$(od -An -N3 -tu4 /dev/urandom | tr -d ' ')}; \
		echo "PROPERTIES_SEED=$$seed"; \
		$(BIN)/pytest -m hypothesis --hypothesis-profile=new --hypothesis-seed=$$seed

.PHONY: replays
replays: setup ## keep 200 random compositions of each language and replay them (REPLAYS=n for another number)
	@REPLAYS=$(or $(REPLAYS),200) $(BIN)/pytest -q tests/python/test_replay.py -k bit_equal
	@REPLAYS=$(or $(REPLAYS),200) mix test tests/bridge/record_test.exs --only replays

.PHONY: lint lint-elixir lint-python lint-tree
lint: setup ## check formatting, types, warnings, links of the docs
	@$(MAKE) --keep-going lint-elixir lint-python lint-tree site

lint-elixir: setup
	mix format --check-formatted
	MIX_ENV=dev mix compile --force --warnings-as-errors
	MIX_ENV=test mix compile --force --warnings-as-errors

lint-python: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: dialyzer
dialyzer: setup ## check the types of the Elixir side (minutes, the first time)
	@scripts/dialyzer.sh

# A path of one machine works on that machine alone.
lint-tree:
	@! git grep -nIE '(^|[^[:alnum:]_.~-])/(home|root|Users|work|opt)/' || \
		{ echo 'These lines name a path that other machines do not have.'; exit 1; }

.PHONY: bench bench-compare growth
bench: setup ## measure: one line a figure, NAME VALUE (target T) ok|short (ONLY="bridge native")
	@mix compile
	@$(BIN)/python tests/bench/run.py $(ONLY)

bench-compare: setup ## measure this tree beside another: BASE=commit (ONLY="bridge native")
	@$(BIN)/python tests/bench/compare.py $(BASE) $(ONLY)

growth: setup ## time and memory from 1,000 values to 64 million (LARGEST=n), and of 16,384 datums
	@mix compile
	@PYTHONPATH=python $(BIN)/python tests/bench/growth.py --largest $(or $(LARGEST),66000000)

.PHONY: pictures
pictures: setup ## make the pictures of docs/ from the run in docs/runs/demo
	@$(BIN)/python -m tinker_custom_loss report docs/runs/demo -o .make/report.html --svg .make/pictures
	@for picture in docs/pictures/*.svg; do cp .make/pictures/$${picture##*/} $$picture; done

# A link that leads nowhere is an error, and so is a page that the navigation lacks.
.PHONY: site
site: setup ## build docs/ as a site in .make/site, with search, that asks no other host for anything
	@mix run --no-start -r scripts/elixir_reference.exs -e 'ElixirReference.write(".make/reference-elixir.md")'
	@scripts/site.sh $(BIN)/python

.PHONY: clean
clean: ## remove all that make made
	rm -rf .venv .make _build .mypy_cache .ruff_cache .pytest_cache .hypothesis
