"""The layout: which module may import which, and what importing the package costs."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import keras_gemma2

PACKAGE = Path(keras_gemma2.__file__).parent
# Lower layers first; a module may import only from its own layer or lower ones.
LAYERS = [
    {"config", "distribution", "errors", "folder_swap", "staging", "from_preset", "lora", "processes", "quantization"},
    {"backend"},
    {"layers", "inputs", "text_inputs"},
    {"cache"},
    {"tokenizer", "preprocessor", "plain_text", "chat"},
    {"adapter_set", "adapters", "backbone"},
    {"generation", "training"},
    {"export"},
    {"causal_lm"},
    {"_registration"},
    {"checkpoints"},
    {"presets"},
    {"finetuning", "planning", "serving"},
    {"benchmarks", "cli", "cli_chat", "cli_export", "cli_finetune", "cli_plan", "cli_serve"},
    {"__main__", "__init__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Files whose whole subject is a backend library's own format; they import it inside functions.
EXCEPTIONS = {
    "checkpoints/gemma_pytorch.py",
    "export/graph.py",
    "export/graph_cache.py",
    "export/graph_text.py",
    "export/signatures.py",
}
BACKENDS = {"jax", "tensorflow", "torch", "jaxlib", "tensorflow_text"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path, top_level):
    """Names of imported modules: those of the module's own level, or all, those inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "keras_gemma2":
            yield from (f"keras_gemma2.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def part(module):
    """`keras_gemma2.layers.mask` -> `layers`."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert name in RANK, f"say where {name} belongs"
    for module in imports(path, top_level=True):
        if module.split(".")[0] == "keras_gemma2":
            assert RANK[part(module)] <= RANK[name], f"{name} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_backend_libraries_are_imported_in_backend_only(path):
    name = path.relative_to(PACKAGE).parts[0]
    if name != "backend":
        top_level = str(path.relative_to(PACKAGE)) in EXCEPTIONS
        assert not {module.split(".")[0] for module in imports(path, top_level=top_level)} & BACKENDS


def test_the_three_backends_offer_the_same_functions():
    from keras_gemma2 import backend

    for name in backend.SUPPORTED:
        tree = ast.parse((PACKAGE / "backend" / f"{name}.py").read_text(encoding="utf-8"))
        public = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
        public |= {alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names} & set(backend.FUNCTIONS)
        assert public == set(backend.FUNCTIONS), name


def test_importing_the_package_imports_nothing_heavy():
    heavy = {"keras", "numpy", "jax", "torch", "tensorflow", "keras_hub"}
    code = f"import sys, keras_gemma2; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names():
    for name in keras_gemma2.__all__:
        assert getattr(keras_gemma2, name) is not None and name in dir(keras_gemma2)
    with pytest.raises(AttributeError, match="no attribute 'Gemma3'.*Gemma2CausalLM"):
        _ = keras_gemma2.Gemma3


def test_another_backend_is_refused_by_name():
    result = subprocess.run(
        [sys.executable, "-c", "from keras_gemma2 import layers"],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "numpy"},
    )
    assert result.returncode != 0 and "runs on the Keras backends jax, tensorflow, torch" in result.stderr


def test_the_readme_is_filled_in_and_names_every_folder():
    readme = Path(__file__).parents[1] / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert not re.search(r"[A-Z]+_(TABLE|COUNT)", text)
    for folder in sorted({path.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE}):
        assert f"  {folder}/" in text, folder
