#!/usr/bin/env bash
# Check style and types: ruff, mypy and shellcheck. `lint.sh --fix` mends what ruff can mend.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

set_up_environment --dev
cd "$ROOT" || exit
if [ "${1:-}" = --fix ]; then
    "$PYTHON" -m ruff check --fix .
    "$PYTHON" -m ruff format .
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# not in the environment when the machine's own Python has it
shellcheck=$(dirname -- "$PYTHON")/shellcheck
if [ ! -x "$shellcheck" ]; then shellcheck=shellcheck; fi
"$shellcheck" scripts/*.sh scripts/*.sbatch scripts/docker/*.sh benchmarks/*.sh .ci/run
