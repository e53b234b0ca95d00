"""The rules of the house: floors, docstrings, declared requirements, a clean tree, peace with the other `kernels`."""

import ast
import functools
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# What core_jax sees of afrl_jax: its public face, and what both recipes need - the built-in world and the readers, how
# a document is shown, two objectives, ranking metrics, the service's errors and style, the command lines' manners, what
# scoring costs on a slice.
FACE = (
    "scoring", "schema", "data", "answer_format", "sft", "stepwise_grpo", "ranking_metrics", "serve", "command_line",
    "plan",
)  # fmt: skip
# The floors below each package; kernels import jax alone, configs nothing.
BELOW = {
    "kernels": (),
    "sharding": ("kernels",),
    "lm_jax": ("kernels", "sharding"),
    "afrl_jax": ("kernels", "sharding", "lm_jax"),
    "core_jax": ("kernels", "sharding", "lm_jax", *(f"afrl_jax.{module}" for module in FACE)),
    "configs": (),
}
HOUSE = {*BELOW, "benchmarks", "notebooks", "scripts", "tests"}
MODULES = sorted(path for package in BELOW for path in (REPOSITORY / package).rglob("*.py"))


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(REPOSITORY))


def imports(path: pathlib.Path, tree: ast.AST) -> set[str]:
    """Dotted names of every module, or name in a module, that the code imports, relative ones resolved."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(REPOSITORY).parent.parts
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def requirements(file: str) -> set[str]:
    """Normalized names of the distributions a requirements file pins, those of its `-r` files included."""
    names = set()
    for line in (REPOSITORY / file).read_text().splitlines():
        if line.startswith("-r "):
            names |= requirements(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{file}: {line!r} is not pinned exactly"
            names.add(normalized(line.split("==")[0]))
    return names


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@functools.cache
def distributions_of_packages() -> dict[str, list[str]]:
    return importlib.metadata.packages_distributions()


def undeclared(names: set[str], declared: set[str]) -> set[str]:
    """The imports that neither the standard library, nor the house, nor a declared distribution provides."""
    tops = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - HOUSE
    providers = distributions_of_packages()
    return {top for top in tops if declared.isdisjoint(normalized(name) for name in providers.get(top, ()))}


def tracked() -> list[pathlib.Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout: what is tracked is unknown")
    return [path for name in listing.stdout.split("\0") if name and (path := REPOSITORY / name).is_file()]


@pytest.mark.parametrize("package", BELOW)
def test_imports_go_down_only(package):
    allowed = (package, *BELOW[package])
    climbing = {
        f"{name_of(path)} imports {name}"
        for path in (REPOSITORY / package).rglob("*.py")
        for name in imports(path, ast.parse(path.read_text()))
        if name.split(".")[0] in HOUSE and not is_within(name, allowed)
    }
    assert not climbing


@pytest.mark.parametrize(("package", "allowed"), [("kernels", {"jax"}), ("configs", {"__future__", "ml_collections"})])
def test_the_lowest_and_the_highest_floor_need_next_to_nothing(package, allowed):
    free = set(sys.stdlib_module_names) if package == "kernels" else set()
    for path in (REPOSITORY / package).rglob("*.py"):
        tops = {name.split(".")[0] for name in imports(path, ast.parse(path.read_text()))}
        assert tops <= allowed | free | {package}, name_of(path)


def test_what_runs_imports_only_what_requirements_txt_pins():
    """Two exceptions: a function may look for torch, no module needs it; and one program is Beam from end to end."""
    declared = requirements("requirements.txt")
    for path in MODULES:
        if name_of(path) == "afrl_jax/data/logged_judgments.py":
            continue
        tree = ast.parse(path.read_text())
        assert undeclared(imports(path, tree), declared) <= {"torch"}, name_of(path)
        for node in list(ast.walk(tree)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = []
        assert undeclared(imports(path, tree), declared) == set(), f"{name_of(path)} needs it to be imported"


def test_tests_and_benchmarks_import_only_what_requirements_test_txt_pins():
    declared = requirements("requirements-test.txt")
    for folder in HOUSE - set(BELOW):
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert undeclared(imports(path, ast.parse(path.read_text())), declared) == set(), name_of(path)


def test_modules_and_public_functions_have_docstrings():
    silent = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            silent.append(name_of(path))
        if path.is_relative_to(REPOSITORY / "configs"):
            continue  # the module's docstring is that of the experiment; its one function returns it
        silent += [
            f"{name_of(path)}: {node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node)
        ]
    assert not silent


def test_no_tracked_file_is_large():
    assert not [name_of(path) for path in tracked() if path.stat().st_size > 1_000_000]


# Each pattern is spelled so that it does not match itself here.
@pytest.mark.parametrize(
    "private",
    [r"(?<![\w.:/~-])/(?:work|home|root|opt|mnt|Users)/\w", r"index[-_]url|find[-_]links"],
    ids=["path of one machine", "package index address"],
)
def test_nothing_in_the_tree_belongs_to_one_machine(private):
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text
        found = re.search(private, text)
        assert not found, f"{name_of(path)}: {found[0]!r} in {text[found.start() - 40 : found.end() + 40]!r}"


BUILD_TWO_MODELS = """
import pathlib, sys
import kernels, torch, transformers
from transformers.utils.import_utils import is_kernels_available

assert pathlib.Path(kernels.__file__).is_relative_to(sys.argv[1]), kernels.__file__
assert is_kernels_available() == (sys.argv[2] == "used"), "transformers sees another library than the test means"
sizes = dict(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8)
for family in ("Qwen3", "Llama"):
    config = getattr(transformers, family + "Config")(**sizes)
    model = getattr(transformers, family + "ForCausalLM")(config)
    assert model(torch.arange(4)[None]).logits.shape == (1, 4, 16)
assert ("kernels.layer.mode" in sys.modules) == (sys.argv[2] == "used")
"""

# Hugging Face's library as transformers sees it: an `__init__` that gathers its names from its own modules by their
# absolute names, and a folder inside.
NAMESAKE = {
    "kernels/__init__.py": "from kernels.layer import *\nfrom kernels.layer import __all__\n",
    "kernels/layer/__init__.py": """
from kernels.layer.mode import Mode

def use_kernel_forward_from_hub(name):
    return lambda layer: layer

def use_kernelized_func(*functions):
    return lambda layer: layer

CUDAProperties = Device = KernelizeFallback = LayerRepository = LocalLayerRepository = ROCMProperties = Mode
get_kernel = kernelize = register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_mapping = Mode
__all__ = [name for name in globals() if not name.startswith("_")]
""",
    "kernels/layer/mode.py": "class Mode:\n    pass\n",
}


def run_beside_namesake(folder: pathlib.Path, version: str | None, code: str, *arguments: str):
    """Runs code with our packages first on the path and the other library, in that version if any, installed behind."""
    if version is not None:
        metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
        for name, text in (NAMESAKE | {f"kernels-{version}.dist-info/METADATA": metadata}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(folder)])},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("version", "use"),
    [(None, "ignored"), ("0.1.0", "ignored"), (KERNELS_MIN_VERSION, "used")],
    ids=["not installed", "installed, too old for transformers", "installed"],
)
def test_transformers_builds_models_beside_our_kernels(tmp_path, version, use):
    """transformers looks up the distribution `kernels`, then imports from the package of that name: ours."""
    if version is None and any(normalized(d.name) == "kernels" for d in importlib.metadata.distributions()):
        pytest.skip("the library is installed here: its absence cannot be tested")
    build = run_beside_namesake(tmp_path, version, BUILD_TWO_MODELS, str(REPOSITORY), use)
    assert build.returncode == 0, build.stderr


def test_the_namesake_is_not_run_before_it_is_asked_for(tmp_path):
    """Our own folders are imported without it, so training and scoring never pay for it or for the torch it needs."""
    code = """if True:
        import sys
        from kernels import token_logprobs
        assert "kernels.layer" not in sys.modules
        from kernels import Mode
        assert Mode is sys.modules["kernels.layer"].Mode
        import kernels
        assert not hasattr(kernels, "absent")
    """
    run = run_beside_namesake(tmp_path, KERNELS_MIN_VERSION, code)
    assert run.returncode == 0, run.stderr
