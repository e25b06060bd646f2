"""The environment is made with the tested versions, offline here, and a torch that the machine brings is kept."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASH = os.environ.get("TEST_BASH") or shutil.which("bash") or "bash"
BASE_PYTHON = getattr(sys, "_base_executable", "") or sys.executable
FILES = ("requirements.txt", "requirements-dev.txt", "constraints.txt", "Dockerfile")


def names(path):
    """Package names in a requirements or constraints file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [re.match(r"[A-Za-z0-9._-]+", line) for line in lines if not line.startswith(("#", "-"))]
    return [match.group().lower().replace("_", "-") for match in found if match]


REQUIREMENTS = names(ROOT / "requirements.txt")


def pinned(name):
    """The version in constraints.txt for the Python that runs the tests."""
    pins = re.findall(rf"^{name}==([^;\s]+)(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    old = sys.version_info < (3, 11)
    return next(version for version, marker in pins if not marker or ("<" in marker) == old)


def write_wheel(folder, name, version, requires=()):
    """A package with nothing inside, as pip sees packages."""
    stem = name.replace("-", "_")
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {other}\n" for other in requires)
    info = f"{stem}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{stem}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A folder of stub packages: what the requirements name in the pinned versions, and newer ones beside them."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in [*REQUIREMENTS, "dllogger"]:
        version = "1.0.0" if name == "dllogger" else pinned(name)
        write_wheel(folder, name, version, requires=["torch>=2.0"] if name == "librosa" else [])
        write_wheel(folder, name, "99.0")
    return folder


@pytest.fixture
def machine(tmp_path, wheels):
    """A bare machine with a checkout in a folder with a space, and python3 without packages."""
    return Machine(tmp_path, wheels)


class Machine:
    """Runs setup_env.sh away from the network and from the packages of this machine."""

    def __init__(self, folder, wheels):
        self.folder, self.wheels = folder, wheels
        self.checkout = folder / "my checkout"
        self.bin = folder / "bin"
        self.bin.mkdir()
        shutil.copytree(ROOT / "scripts", self.checkout / "scripts")
        for name in FILES:
            shutil.copy(ROOT / name, self.checkout)
        self.write_python()

    def write_python(self, *lines, name="python3", real=BASE_PYTHON):
        """A python3 on PATH that does the given lines of shell before it becomes the real one."""
        script = self.bin / name
        script.write_text("\n".join(["#!/bin/sh", *lines, f'exec "{real}" "$@"', ""]), encoding="utf-8")
        script.chmod(0o755)
        return script

    def write_torch(self, version, packages=None):
        """Let python3 have a torch: in its user packages, as in the system's, unless a folder is named."""
        if packages is None:
            packages = self.folder / "user/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        info = packages / f"torch-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n", encoding="utf-8")
        (packages / "torch.py").write_text(f"__version__ = {version!r}\n", encoding="utf-8")

    def environment(self, **variables):
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "PYTHONUSERBASE": str(self.folder / "user"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_NO_CACHE_DIR": "1",
            **variables,
        }

    def run(self, *command, **variables):
        return subprocess.run(
            command,
            env=self.environment(**variables),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )

    def setup(self, *arguments, **variables):
        return self.run(BASH, str(self.checkout / "scripts/setup_env.sh"), *arguments, **variables)

    def versions(self, python):
        """Versions that an interpreter finds of what the requirements name."""
        listing = f"from importlib.metadata import version\nfor n in {REQUIREMENTS!r}: print(n, version(n))"
        result = self.run(str(python), "-c", listing)
        assert result.returncode == 0, result.stderr
        return dict(line.split() for line in result.stdout.splitlines())


def has_pip(python):
    return subprocess.run([python, "-c", "import ensurepip"], capture_output=True).returncode == 0


needs_venv = pytest.mark.skipif(not has_pip(BASE_PYTHON), reason="this Python cannot make environments with pip")


@needs_venv
def test_a_torch_that_the_machine_brings_is_kept_and_setup_is_quick_when_run_again(machine):
    machine.write_torch("2.12.1+stub")
    made = machine.setup()
    assert made.returncode == 0, made.stderr
    python = machine.checkout / ".venv/bin/python"
    assert made.stdout == f"{python}\n"
    settings = (machine.checkout / ".venv/pyvenv.cfg").read_text(encoding="utf-8")
    assert "include-system-site-packages = true" in settings
    expected = {name: pinned(name) for name in REQUIREMENTS}
    assert machine.versions(python) == {**expected, "torch": "2.12.1+stub"}
    where = machine.run(str(python), "-c", "import torch; print(torch.__file__)").stdout
    assert where.startswith(str(machine.folder / "user"))

    nothing = machine.folder / "nothing"
    nothing.mkdir()
    again = machine.setup(PIP_FIND_LINKS=str(nothing))
    assert (again.returncode, again.stdout, again.stderr) == (0, made.stdout, "")

    with (machine.checkout / "requirements.txt").open("a", encoding="utf-8") as requirements:
        requirements.write("dllogger\n")
    changed = machine.setup()
    assert changed.returncode == 0, changed.stderr
    assert "Successfully installed dllogger-99.0" in changed.stderr
    assert machine.versions(python)["torch"] == "2.12.1+stub"


@needs_venv
def test_a_torch_that_is_too_old_is_not_used(machine):
    machine.write_torch("2.5.0")
    made = machine.setup()
    assert made.returncode == 0, made.stderr
    settings = (machine.checkout / ".venv/pyvenv.cfg").read_text(encoding="utf-8")
    assert "include-system-site-packages = false" in settings
    python = machine.checkout / ".venv/bin/python"
    assert machine.versions(python) == {name: pinned(name) for name in REQUIREMENTS}


@needs_venv
def test_the_steps_of_the_dockerfile_do_not_replace_the_torch_of_the_container(machine):
    """Run its RUN steps here; only the folder /opt and the address of dllogger are exchanged."""
    text = (machine.checkout / "Dockerfile").read_text(encoding="utf-8")
    instructions = re.findall(r"^([A-Z]+)\s+((?:.*\\\n)*.*)$", text, re.MULTILINE)
    machine.write_torch("2.12.0a0+5aff3928d8.nv26.05")
    pins = machine.folder / "constraint.txt"  # NGC's /etc/pip/constraint.txt
    pins.write_text("torch==2.12.0a0+5aff3928d8.nv26.05\nNumPy==99.0\n", encoding="utf-8")
    variables, copied, ran = {"PIP_CONSTRAINT": str(pins)}, [], 0
    for name, value in instructions:
        if name == "ENV":
            for word in shlex.split(value):
                variable, _, content = word.partition("=")
                content = content.replace("/opt/", f"{machine.folder}/opt/")
                variables[variable] = content.replace("$PATH", f"{machine.bin}:/usr/bin:/bin")
        elif name == "COPY":
            copied += [word for word in value.split() if "/" in word or "." in word]
        elif name == "RUN":
            url = "git+https://github.com/NVIDIA/dllogger@v1.0.0#egg=dllogger"
            assert url in value
            command = f"cd '{machine.checkout}' && {value.replace(url, 'dllogger==1.0.0')}"
            result = machine.run(BASH, "-c", command, **variables)
            assert result.returncode == 0, result.stderr
            ran += 1
    assert ran == 1
    needed = {"requirements.txt", "requirements-dev.txt", "constraints.txt", "scripts/lib.sh", "scripts/setup_env.sh"}
    assert needed <= set(copied)
    found = machine.versions(f"{variables['VIRTUAL_ENV']}/bin/python")
    assert found["torch"] == "2.12.0a0+5aff3928d8.nv26.05"
    assert found["numpy"] == "99.0"  # the container's pin goes before ours
    assert found["jiwer"] == pinned("jiwer")
    # inside the container the recipes' set-up has nothing left to do
    again = machine.setup(**variables)
    assert (again.stdout, again.stderr) == (f"{variables['VIRTUAL_ENV']}/bin/python\n", "")


def test_the_dockerfile_builds_on_a_named_ngc_image():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    instructions = [line for line in lines if re.match(r"[A-Z]+ ", line)]
    base = re.fullmatch(r"ARG FROM_IMAGE_NAME=nvcr\.io/nvidia/pytorch:(\d\d)\.(\d\d)-py3", instructions[0])
    assert base
    assert (int(base[1]), int(base[2])) >= (26, 2)  # the first with torch 2.11
    assert instructions[1] == "FROM ${FROM_IMAGE_NAME}"


class FakePip:
    """An active environment whose pip only writes down what it is asked."""

    def __init__(self, machine):
        self.folder = machine.folder / "active"
        subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", self.folder], check=True)
        self.packages = next((self.folder / "lib").glob("python*")) / "site-packages"
        package = self.packages / "pip"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(
            "import pathlib, sys\n"
            "log = pathlib.Path(sys.prefix, 'pip.log')\n"
            "log.write_text((log.read_text() if log.exists() else '') + ' '.join(sys.argv[1:]) + '\\n')\n",
            encoding="utf-8",
        )

    @property
    def calls(self):
        log = self.folder / "pip.log"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return [line for line in lines if "--version" not in line]

    @property
    def pins(self):
        lines = (self.folder / "wav2vec2-constraints.txt").read_text(encoding="utf-8").splitlines()
        return [line for line in lines if "==" in line and not line.startswith("#")]


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON"])
def test_an_active_environment_is_used_and_keeps_its_torch(variable, machine):
    active = FakePip(machine)
    machine.write_torch("2.13.1+cu132", active.packages)
    value = active.folder / "bin/python" if variable == "PYTHON" else active.folder
    result = machine.setup(**{variable: str(value)})
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{active.folder}/bin/python\n"
    assert not (machine.checkout / ".venv").exists()
    (call,) = active.calls
    assert f"-r {machine.checkout}/requirements.txt -c {active.folder}/wav2vec2-constraints.txt" in call
    assert "torch==2.13.1+cu132" in active.pins
    assert "torch==2.13.0" not in active.pins


def test_a_python_that_is_an_environment_itself_lends_its_torch_and_its_pip(machine):
    """As in images whose PATH begins with an environment that nobody activated; here without ensurepip, too."""
    other = FakePip(machine)
    machine.write_torch("2.11.0a0+nv", other.packages)
    before = sorted(path for path in other.folder.rglob("*") if "__pycache__" not in str(path))
    no_ensurepip = 'case "$2" in "import ensurepip") exit 1 ;; esac'
    machine.write_python(no_ensurepip, real=other.folder / "bin/python")
    made = machine.setup()
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"{machine.checkout}/.venv/bin/python\n"
    torch = machine.run(made.stdout.strip(), "-c", "import torch; print(torch.__file__)").stdout
    assert torch == f"{other.packages}/torch.py\n"
    other.folder, lender = machine.checkout / ".venv", other.folder
    assert len(other.calls) == 1
    assert "torch==2.11.0a0+nv" in other.pins
    assert sorted(path for path in lender.rglob("*") if "__pycache__" not in str(path)) == before


def test_development_requirements_include_the_others(machine):
    active = FakePip(machine)

    def setup(*arguments):
        assert machine.setup(*arguments, VIRTUAL_ENV=str(active.folder)).returncode == 0
        return len(active.calls)

    assert setup() == 1
    assert setup() == 1
    assert setup("--dev") == 2
    assert "requirements-dev.txt" in active.calls[-1]
    assert setup("--dev") == 2
    assert setup() == 2
    (machine.checkout / "constraints.txt").write_text("torch==2.14.0\n", encoding="utf-8")
    assert setup() == 3


def test_versions_that_the_container_pins_are_left_to_it(machine):
    active = FakePip(machine)
    pins = machine.folder / "pins.txt"
    pins.write_text("NumPy==2.1.0\nscikit_learn==1.0\n# jiwer==1\ngit+https://example.org/x\n", encoding="utf-8")
    assert machine.setup(VIRTUAL_ENV=str(active.folder), PIP_CONSTRAINT=str(pins)).returncode == 0
    left = {pin.split("==")[0].lower().replace("_", "-") for pin in active.pins}
    assert left == {*names(ROOT / "constraints.txt")} - {"numpy", "scikit-learn"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['case "$2" in *print*) echo 3.9 ;; esac', "exit 1"], ["Python 3.9", "3.10 or newer", "PYTHON"]),
        (['case "$2" in "import venv") exit 1 ;; esac'], ["venv", "apt-get install"]),
        (['case "$2" in "import ensurepip") exit 1 ;; esac'], ["venv", "apt-get install"]),
        (["exit 127"], ["does not run", "PYTHON"]),
    ],
)
def test_a_python_that_will_not_do_is_one_line_with_the_remedy(lines, words, machine):
    if lines[-1] == "exit 1":
        lines[0] = lines[0].replace("echo 3.9", "echo 3.9; exit 0")
    machine.write_python(*lines)
    result = machine.setup(PYTHONNOUSERSITE="1")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert all(word in line for word in words), line
    assert not (machine.checkout / ".venv").exists()


def test_no_python_at_all_is_one_line_with_the_remedy(machine):
    for name in ("bash", "dirname", "cat"):
        (machine.bin / name).symlink_to(shutil.which(name))
    (machine.bin / "python3").unlink()
    result = machine.setup(PATH=str(machine.bin))
    assert result.returncode == 2
    assert "install Python 3.10 or newer" in result.stderr
    assert result.stderr.count("\n") == 1
    result = machine.setup(PYTHON="/no/such/python")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "/no/such/python" in result.stderr


@needs_venv
def test_an_environment_that_cannot_be_made_is_one_line_that_names_the_variable(machine):
    (machine.folder / "file").touch()
    (machine.folder / "mine").mkdir()
    (machine.folder / "mine" / "thesis.txt").touch()
    for place in ("file", "file/deep", "mine"):
        result = machine.setup(VENV_DIR=str(machine.folder / place))
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith(f"error: VENV_DIR={machine.folder / place}: ")
    assert (machine.folder / "mine" / "thesis.txt").exists()


def test_every_requirement_has_a_tested_version():
    pins = names(ROOT / "constraints.txt")
    for name in [*REQUIREMENTS, *names(ROOT / "requirements-dev.txt")]:
        assert name in pins
    assert "torch==2.13.0\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_the_license_is_apache_2_with_the_projects_authors():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "Copyright 2026 the project's authors" in text
