#!/usr/bin/env bash
# Make the environment: `setup_env.sh [--dev]` installs what is missing and prints the interpreter that has it.
# SPDX-License-Identifier: Apache-2.0
#
# The active environment (VIRTUAL_ENV or CONDA_PREFIX) is used as it is; without one, .venv is made in the checkout
# (VENV_DIR: elsewhere) from PYTHON (default python3). PYTHON given beside an active environment wins over it.
# Where that Python has a torch that will do, as on GPU machines and in NGC containers, .venv sees its packages, and
# nothing replaces that torch. --dev adds what tests and linters need. Run again, it takes a second.
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

OLDEST_PYTHON=3.10
OLDEST_TORCH=2.11 # by the first two numbers: NGC's 2.11.0a0 counts

requirements=requirements.txt
case "${1:-}" in
    '') ;;
    --dev) requirements="requirements-dev.txt" ;;
    *) usage_error "$1: the only option of setup_env.sh is --dev" ;;
esac

# check_python PYTHON: it exists and is new enough
check_python() {
    local version
    if ! command -v "$1" >/dev/null 2>&1; then
        usage_error "$1: not found; install Python $OLDEST_PYTHON or newer, or set PYTHON to one"
    fi
    if ! version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
        usage_error "$1: does not run; set PYTHON to a Python $OLDEST_PYTHON or newer"
    fi
    if ! "$1" -c "import sys; sys.exit(sys.version_info < (${OLDEST_PYTHON/./,}))"; then
        usage_error "$1: is Python $version; install Python $OLDEST_PYTHON or newer, or set PYTHON to one"
    fi
}

# torch_of PYTHON: version and folder of its torch if that is new enough, else nothing
torch_of() {
    "$1" - "$OLDEST_TORCH" <<'PYTHON_END'
import importlib.metadata, re, sys

oldest = tuple(map(int, sys.argv[1].split(".")))
try:
    torch = importlib.metadata.distribution("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit()
release = re.match(r"(\d+)\.(\d+)", torch.version)
if release and tuple(map(int, release.groups())) >= oldest:
    print(torch.version, torch.locate_file(""))
PYTHON_END
}

# make_environment BASE FOLDER: a virtual environment that sees BASE's packages when BASE has torch
make_environment() {
    local base=$1 folder=$2 found options=() packages
    if ! "$base" -c 'import venv' 2>/dev/null; then
        usage_error "$base: has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"
    fi
    found=$(torch_of "$base")
    if [ -n "$found" ]; then options=(--system-site-packages); fi
    if ! "$base" -c 'import ensurepip' 2>/dev/null; then
        # the packages of BASE can include pip, which then serves the new environment too
        if [ -z "$found" ] || ! "$base" -c 'import pip' 2>/dev/null; then
            usage_error "$base: cannot make environments; install its venv (Debian, Ubuntu: apt-get install python3-venv)"
        fi
        options+=(--without-pip)
    fi
    if [ -e "$folder" ] && [ ! -f "$folder/pyvenv.cfg" ] && [ -n "$(ls -A "$folder" 2>/dev/null)" ]; then
        usage_error "VENV_DIR=$folder: there is something else, which would be lost; set VENV_DIR to another folder"
    fi
    make_folder VENV_DIR "$folder"
    note "Making $folder with $base${found:+, which has torch ${found%% *}}"
    if ! "$base" -m venv --clear ${options[@]+"${options[@]}"} "$folder" >&2; then
        usage_error "VENV_DIR=$folder: no environment could be made there; set VENV_DIR to another folder"
    fi
    if [ -n "$found" ] && [ -z "$(torch_of "$folder/bin/python")" ]; then
        # BASE is an environment itself: its own packages are not those of the system
        packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        printf '%s\n' "${found#* }" >"$packages/base-environment.pth"
    fi
}

# fingerprint PYTHON FILE...: changes when the interpreter or one of the files does
fingerprint() {
    "$1" - "$@" <<'PYTHON_END'
import hashlib, pathlib, sys

digest = hashlib.sha256(sys.version.encode())
for path in sys.argv[2:]:
    digest.update(pathlib.Path(path).read_bytes())
print(digest.hexdigest())
PYTHON_END
}

# pin TORCH: the tested versions, with TORCH in place of torch's, and without what PIP_CONSTRAINT already pins:
# NGC containers list there what they were built and tested with
pin() {
    "$python" - "$ROOT/constraints.txt" "$1" <<'PYTHON_END'
import os, pathlib, re, sys

def name(line):
    found = re.match(r"[A-Za-z0-9._-]+", line.strip())
    return re.sub(r"[-_.]+", "-", found.group()).lower() if found else ""

path, torch = sys.argv[1:]
elsewhere = set()
for other in os.environ.get("PIP_CONSTRAINT", "").split():
    if pathlib.Path(other).is_file():
        elsewhere.update(map(name, pathlib.Path(other).read_text().splitlines()))
for line in pathlib.Path(path).read_text().splitlines():
    if name(line) == "torch" and torch:
        print("torch==" + torch)
    elif not name(line) or name(line) not in elsewhere:
        print(line)
PYTHON_END
}

# is_environment PYTHON: it belongs to a virtual environment
is_environment() { "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; }

own=$(environment_folder)
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -n "${PYTHON:-}" ]; then check_python "$PYTHON"; fi
if [ -n "${PYTHON:-}" ] && is_environment "$PYTHON"; then
    python=$(command -v "$PYTHON")
elif [ -z "${PYTHON:-}" ] && [ -n "$active" ]; then
    python=$active/bin/python
else
    python=$own/bin/python
    if ! "$python" -c '' 2>/dev/null; then
        check_python "${PYTHON:-python3}"
        make_environment "${PYTHON:-python3}" "$own"
    fi
fi
check_python "$python"

prefix=$("$python" -c 'import sys; print(sys.prefix)')
state=$(fingerprint "$python" "$ROOT"/requirements.txt "$ROOT"/requirements-dev.txt "$ROOT"/constraints.txt)
stamp=$prefix/.wav2vec2-$requirements
# the development requirements include the others
for installed in "$stamp" "$prefix/.wav2vec2-requirements-dev.txt"; do
    if [ -f "$installed" ] && [ "$(cat "$installed")" = "$state" ]; then
        printf '%s\n' "$python"
        exit 0
    fi
done

if ! "$python" -m pip --version >/dev/null 2>&1; then
    usage_error "$python: has no pip; install it with $python -m ensurepip, or deactivate that environment"
fi
# A torch that this script did not install stays: it may be built for the machine.
torch=$(torch_of "$python")
if [ "$python" = "$own/bin/python" ]; then
    case "${torch#* }" in "$prefix"/*) torch='' ;; esac
fi
pins=$prefix/wav2vec2-constraints.txt
pin "${torch%% *}" >"$pins"
note "Installing $requirements into $prefix${torch:+, keeping torch ${torch%% *}}"
"$python" -m pip install --disable-pip-version-check -r "$ROOT/$requirements" -c "$pins" >&2
printf '%s\n' "$state" >"$stamp"
printf '%s\n' "$python"
