"""The laws of the house: shape, import rule, sizes, names, flags that are read."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

from common import flags
from wav2vec2.config import TRAIN_SECTIONS
from wav2vec2.inference_config import InferenceConfig
from wav2vec2.logging import INFERENCE_METRICS, METRICS

LEAVES = (
    "errors",
    "entry",
    "flags",
    "rng",
    "schedules",
    "control_groups",
    "host_memory",
    "distributed",
    "labels",
    "memory",
    "preemption",
    "lock",
    "watchdog",
)
SERVICES = (
    "metrics",
    "logger",
    "checkpoint",
    "checkpoint_writer",
    "torch_file",
    "pickle_check",
    "precision",
    "optim",
    "ema",
    "sharding",
    "health",
    "data",
)
BLOCKS = (
    "data_config",
    "run_config",
    "health_config",
    "config",
    "inference_config",
    "norms",
    "dropout",
    "gradients",
    "attention",
    "convolutions",
)
ASSEMBLY = (
    *("arg_parser", "build", "build_data", "config_checks", "data_checks", "decoding", "evaluate"),
    *("bad_batch", "culprits", "health_rules", "latency", "layout", "logging", "memory_probe", "run", "start"),
    *("transcribe", "convert"),
)
LAYERS = [  # from the bottom; an import points down or sideways
    {f"common.{name}" for name in LEAVES},
    {f"common.{name}" for name in SERVICES},
    {f"wav2vec2.{name}" for name in BLOCKS},
    {"wav2vec2.model"},
    {"wav2vec2.criterion"},
    {"wav2vec2.task"},
    {f"wav2vec2.{name}" for name in ASSEMBLY},
    {"train", "inference", "utils", "benchmarks"},
]
TOP_LEVEL = {
    *("train.py", "inference.py", "common", "wav2vec2", "scripts", "utils", "tests", "Dockerfile", "requirements.txt"),
    *("README.md", "docs", "benchmarks", "pyproject.toml", "constraints.txt", "requirements-dev.txt", "Makefile"),
    *(".pre-commit-config.yaml", ".ci", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", ".gitignore", ".dockerignore"),
    ".shellcheckrc",
}


def tracked() -> list[Path]:
    """Files of the checkout that git knows or would add."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [Path(name) for name in names if (ROOT / name).is_file()]


def sources() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py" and path.parts[0] != "tests"]


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def layer(module: str) -> int | None:
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


def imports(path: Path) -> set[str]:
    """Modules of the project that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    ours = {module_name(source) for source in sources()}
    return {name for name in found if name in ours}


def test_top_level_has_its_fixed_shape():
    assert {path.parts[0] for path in tracked()} <= TOP_LEVEL


def test_every_module_has_its_layer():
    packages = {"common", "wav2vec2", "utils", "benchmarks", "wav2vec2.convert"}
    assert [path for path in sources() if layer(module_name(path)) is None and module_name(path) not in packages] == []


def test_imports_point_down_or_sideways():
    wrong = [
        f"{path} -> {name}"
        for path in sources()
        for name in imports(path)
        if layer(module_name(path)) is not None and layer(name) is not None and layer(name) > layer(module_name(path))
    ]
    assert wrong == []


def test_imports_have_no_cycle():
    graph = {module_name(path): imports(path) for path in sources()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_common_knows_nothing_about_wav2vec2_and_nothing_imports_a_program():
    for path in sources():
        names = imports(path)
        if path.parts[0] == "common":
            assert not any(name.startswith("wav2vec2") for name in names), path
        if path.parts[0] in ("common", "wav2vec2"):
            assert not any(name.split(".")[0] in ("train", "inference", "utils", "benchmarks") for name in names), path


def test_only_the_owner_reads_the_environment_and_argv():
    for path in sources():
        text = (ROOT / path).read_text()
        if path.parts[0] in ("common", "wav2vec2"):
            names = {ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
            assert not names & {"os.environ", "os.getenv"} or path == Path("common/distributed.py"), path
            assert "sys.argv" not in names, path


def test_no_source_file_is_above_500_lines():
    assert [path for path in sources() if len((ROOT / path).read_text().splitlines()) > 500] == []


def test_train_is_the_algorithm_on_one_screen():
    functions = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.parse((ROOT / "train.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert functions["main"] <= 10
    assert functions["train"] <= 25
    assert functions["train_step"] <= 25
    assert not re.search(r"fp16\b.*:|bf16|mode ==|world_size\(\) [=>]", (ROOT / "train.py").read_text())


def test_no_two_source_files_share_a_name():
    counts = Counter(path.name for path in sources() if path.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_every_module_says_what_it_is_for():
    missing = [path for path in sources() if not ast.get_docstring(ast.parse((ROOT / path).read_text()))]
    assert missing == []


def test_packages_hold_nothing_but_a_docstring():
    for path in sources():
        if path.name == "__init__.py":
            assert len(ast.parse((ROOT / path).read_text()).body) == 1, path


def all_fields() -> dict[str, type]:
    sections = [*TRAIN_SECTIONS.values(), InferenceConfig]
    return {name: section for section in sections for name in section.__dataclass_fields__}


def test_every_flag_is_read_by_something():
    code = "\n".join(
        (ROOT / path).read_text()
        for path in sources()
        if path.parts[0] not in ("utils", "benchmarks") and path.name not in ("config.py", "config_checks.py")
    )
    code += (ROOT / "wav2vec2/config.py").read_text().split("def __post_init__")[1]
    unread = [name for name in all_fields() if not re.search(rf"\.{name}\b|\"--{name}\"", code)]
    assert unread == []


def test_flags_of_training_are_named_once():
    names = [name for section in TRAIN_SECTIONS.values() for name in section.__dataclass_fields__]
    assert len(names) == len(set(names))


def test_flags_are_those_of_the_inventory():
    """A changed command line is a decision: it changes flags.txt and the CHANGELOG with it."""
    inventory = (Path(__file__).parent / "flags.txt").read_text().split()
    assert sorted(all_fields()) == inventory


def test_every_flag_has_help():
    for section in [*TRAIN_SECTIONS.values(), InferenceConfig]:
        for field in section.__dataclass_fields__.values():
            spec = field.metadata["flag"]
            assert isinstance(spec, flags.FlagSpec)
            assert len(spec.help) > 8, field.name


def test_every_metric_says_what_it_means():
    assert all(len(info.description) > 8 for info in [*METRICS.values(), *INFERENCE_METRICS.values()])


def test_files_named_in_the_documents_exist():
    for document in [path for path in tracked() if path.suffix == ".md"]:
        for name in re.findall(
            r"\b(?:scripts|utils|benchmarks|docs|common|wav2vec2)/[\w/]+\.(?:sh|py|md)", (ROOT / document).read_text()
        ):
            assert (ROOT / name).exists(), f"{document}: {name}"
