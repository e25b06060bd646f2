#!/usr/bin/env bash
# Run the test suite on a bare machine: environment, test dependencies, pytest. Arguments go to pytest.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

set_up_environment --dev
# The models of the tests are so small that threads only wait for each other; some tests run two processes.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd "$ROOT" || exit
exec "$PYTHON" -m pytest "$@"
