# make demo: installs into .venv, makes the demo world, trains every stage, evaluates, writes a report, lets you chat.
# make test: installs into .venv and runs the tests.
# make docs-check: runs every command of the course and compares what it prints with the chapter (make test: the short ones).
# make docs: installs Zensical into .venv and builds the documentation site, out/site/index.html.
# make test-report: the same with ten times the examples of the property tests, line coverage, the 20 slowest tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= out/demo
DATA := dataset/demo
RESULTS = $(DEMO)/results
EVAL = python eval_model.py --save_dir $(DEMO) --preset demo --max_new_tokens 96
STARTED := $(shell date +%s)
STUDENT = --hidden_size 64 --num_hidden_layers 5 --max_steps 400 --learning_rate 5e-3  # as in configs/demo/distill.yaml

.PHONY: demo demo-run test test-report docs docs-check lint bench clean

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed requirements-docs.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

demo: $(VENV)/.installed
	$(MAKE) --no-print-directory demo-run STARTED=$(STARTED) PATH="$(abspath $(BIN)):$(PATH)"

# The stages, with whatever python is on the PATH. DATA_FLAGS and TRAIN_FLAGS shorten them in the tests.
demo-run:
	python dataset/make_demo.py --out_dir $(DATA) $(DATA_FLAGS)
	python train_tokenizer.py --config configs/demo/tokenizer.yaml --save_dir $(DEMO) \
	    --data_path $(DATA)/pretrain_train.jsonl,$(DATA)/sft_train.jsonl --valid_path $(DATA)/pretrain_valid.jsonl
	python train_pretrain.py --config configs/demo/pretrain.yaml --save_dir $(DEMO) \
	    --data_path $(DATA)/pretrain_train.jsonl --valid_path $(DATA)/pretrain_valid.jsonl --overwrite $(TRAIN_FLAGS)
	python train_sft.py --config configs/demo/sft.yaml --save_dir $(DEMO) \
	    --data_path $(DATA)/sft_train.jsonl --valid_path $(DATA)/sft_valid.jsonl --overwrite $(TRAIN_FLAGS)
	mkdir -p $(RESULTS)
	$(EVAL) --model_mode 0 --perplexity $(DATA)/pretrain_valid.jsonl
	$(EVAL) --from_weight pretrain --max_new_tokens 32 --task_file $(DATA)/sft_test.jsonl --output $(RESULTS)/pretrain.json
	$(EVAL) --task_file $(DATA)/sft_test.jsonl --pairs_file $(DATA)/dpo_test.jsonl --answer_pairs \
	    --output $(RESULTS)/full_sft.json
	python train_lora.py --config configs/demo/lora.yaml --save_dir $(DEMO) --data_path $(DATA)/identity_train.jsonl \
	    --valid_path $(DATA)/identity_test.jsonl --replay_path $(DATA)/sft_train.jsonl --overwrite $(TRAIN_FLAGS)
	python train_lora.py --config configs/demo/lora.yaml --save_dir $(DEMO) --data_path $(DATA)/identity_train.jsonl \
	    --valid_path $(DATA)/identity_test.jsonl --replay_path "" --lora_name identity_alone --overwrite $(TRAIN_FLAGS)
	$(EVAL) --task_file $(DATA)/identity_test.jsonl --output $(RESULTS)/full_sft_identity_test.json
	for name in identity identity_alone; do for file in identity_test sft_test; do \
	    $(EVAL) --lora_name $$name --task_file $(DATA)/$$file.jsonl --output $(RESULTS)/$${name}_$$file.json || exit 1; \
	done; done
	python train_dpo.py --config configs/demo/dpo.yaml --save_dir $(DEMO) --data_path $(DATA)/dpo_train.jsonl \
	    --valid_path $(DATA)/dpo_test.jsonl --overwrite $(TRAIN_FLAGS)
	$(EVAL) --model_mode 2 --task_file $(DATA)/sft_test.jsonl --pairs_file $(DATA)/dpo_test.jsonl --answer_pairs \
	    --output $(RESULTS)/rlhf.json
	python train_pretrain.py --config configs/demo/pretrain.yaml --save_dir $(DEMO) $(STUDENT) \
	    --data_path $(DATA)/pretrain_train.jsonl --valid_path $(DATA)/pretrain_valid.jsonl --overwrite $(TRAIN_FLAGS)
	python train_distill.py --config configs/demo/distill.yaml --save_dir $(DEMO) \
	    --data_path $(DATA)/pretrain_train.jsonl --valid_path $(DATA)/pretrain_valid.jsonl --overwrite $(TRAIN_FLAGS)
	python train_sft.py --config configs/demo/sft.yaml --save_dir $(DEMO)/direct --from_weight $(DEMO)/rlhf_128 --epochs 1 \
	    --data_path $(DATA)/direct_train.jsonl --valid_path "" --overwrite $(TRAIN_FLAGS)
	python train_reason.py --config configs/demo/reason.yaml --save_dir $(DEMO) --data_path $(DATA)/reason_train.jsonl \
	    --valid_path $(DATA)/reason_test.jsonl --replay_path $(DATA)/sft_train.jsonl --overwrite $(TRAIN_FLAGS)
	$(EVAL) --from_weight $(DEMO)/direct/full_sft_128 --model_mode 3 --task_file $(DATA)/reason_test.jsonl \
	    --output $(RESULTS)/direct.json
	$(EVAL) --model_mode 3 --task_file $(DATA)/reason_test.jsonl --output $(RESULTS)/reason.json
	$(EVAL) --from_weight reason --task_file $(DATA)/sft_test.jsonl --output $(RESULTS)/reason_sft_test.json
	$(EVAL) --task_file $(DATA)/tools_test.jsonl --output $(RESULTS)/full_sft_tools_test.json
	python train_sft.py --config configs/demo/tools.yaml --save_dir $(DEMO)/tools --from_weight $(DEMO)/full_sft_128 \
	    --data_path $(DATA)/tools_train.jsonl --valid_path "" --overwrite $(TRAIN_FLAGS)
	for file in tools_test sft_test; do \
	    $(EVAL) --from_weight $(DEMO)/tools/full_sft_128 --task_file $(DATA)/$$file.jsonl \
	        --output $(RESULTS)/tools_$$file.json || exit 1; \
	done
	python dataset/demo_table.py --save_dir $(DEMO)
	python dataset/demo_report.py --save_dir $(DEMO) --data_dir $(DATA) --started $(STARTED)
	python eval_model.py --save_dir $(DEMO) --preset demo --model_mode 3 --temperature 0 --history_turns 0

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-report: $(VENV)/.installed-dev
	MINILLM_FUZZ_EXAMPLES=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov=minillm --cov-report=term:skip-covered --durations=20

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/site/build.py

docs-check: $(VENV)/.installed-dev
	MINILLM_DOCS=1 $(BIN)/python -m pytest tests/docs -n 2 --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/hf_parity.py
	$(BIN)/python benchmarks/allocator.py
	$(BIN)/python benchmarks/long_context.py
	$(BIN)/python benchmarks/moe.py
	$(BIN)/python benchmarks/lora_vs_peft.py
	$(BIN)/python benchmarks/lora_init.py
	$(BIN)/python benchmarks/lora_remedies.py
	$(BIN)/python benchmarks/lora_sweep.py
	$(BIN)/python benchmarks/loss_memory.py
	$(BIN)/python benchmarks/stages.py
	$(BIN)/python benchmarks/torture.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/plan_memory.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/serve.py

clean:
	rm -rf $(DEMO) $(DATA) .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
