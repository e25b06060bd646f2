# Short names for what the scripts do; `make check` is what CI runs.
.PHONY: help check test lint format quickstart

help:
	@echo "make check       the test suite, then style and types (what CI runs)"
	@echo "make test        the test suite"
	@echo "make lint        style and types"
	@echo "make format      mend the style"
	@echo "make quickstart  corpus, pre-training, fine-tuning, WER"

check:
	bash .ci/run

test:
	bash scripts/test.sh

lint:
	bash scripts/lint.sh

format:
	bash scripts/lint.sh --fix

quickstart:
	bash scripts/quickstart.sh
