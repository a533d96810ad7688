"""The layering of the source tree, read from the source itself."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill_kernels import backends, codegen

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "distill_kernels"
LONGEST = 450  # lines; a file that passes this is split by what it computes
MOST_FILES = 12  # of a folder


def modules():
    """Source path by dotted name, as installed: the folder python/ is distill_kernels.api."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "python", f"{PACKAGE}.api")):
        for path in sorted(folder.rglob("*.py")):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
BACKENDS = [name for name in MODULES if name.startswith(f"{PACKAGE}.backends.")]
BACKEND_NAMES = sorted({name.split(".")[2] for name in BACKENDS})


def imports_of(name, tree):
    """(module, imported name or None, line) of every import in a module of the package, at its top or inside a function."""
    package = name if MODULES.get(name, Path()).name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                if f"{base}.{alias.name}" in MODULES or f"{base}.{alias.name}" in (f"{PACKAGE}._cuda", f"{PACKAGE}._native"):
                    yield f"{base}.{alias.name}", None, node.lineno
                else:
                    yield base, alias.name, node.lineno


EDGES = sorted(
    {(name, target, line) for name, tree in TREES.items() for target, _, line in imports_of(name, tree) if target.startswith(PACKAGE)}
)


def layer(name):
    """The layer of a module, short: the folder that it is in, a backend's own, or itself where it is in none."""
    parts = name.split(".")
    if name == PACKAGE:
        return "facade"
    if parts[1] == "backends" and len(parts) > 2:
        return f"backend:{parts[2]}"
    if parts[1] == "api":
        return "api" if len(parts) == 2 else f"api/{parts[2]}"
    return parts[1]


# What each layer imports of the package beside itself, from the ground up: what it imports is above it in this list.
ALLOWED = {
    "divergences": set(),
    "memory": set(),
    "codegen": {"divergences"},
    "reference": {"divergences"},  # and nothing that ships imports it
    "call": {"divergences"},
    "listed": {"divergences", "call"},
    "products": {"call"},
    "estimators": {"divergences", "call", "products"},
    "schedule": {"memory", "call", "products", "estimators"},
    "backends": {"call", "estimators", "schedule"},  # and one backend at a time, by name, in load()
    # And never another backend.
    "backend:cuda": {"_cuda", "divergences", "call", "estimators", "schedule"},
    "backend:native": {"_native", "divergences", "memory", "call", "listed", "estimators", "schedule"},
    "backend:torch": {"divergences", "call", "listed", "products", "estimators", "schedule"},
    "backend:triton": {"divergences", "call", "listed", "products", "estimators", "schedule"},
    "ops": {"divergences", "memory", "call", "listed", "estimators", "schedule", "backends"},
    "api/user_error": set(),
    "api/progress_bar": set(),
    "api/losses": {"divergences", "call", "ops"},
    "api/models": {"api/user_error"},
    "api/measuring": {"divergences", "call", "schedule", "backends", "api/user_error", "api/progress_bar", "api/losses"},
    "api/cache": {"call", "products", "estimators", "api/user_error", "api/losses", "api/models"},
    "api/trainers": {"api/losses", "api/models", "api/cache"},
    "api/runs": {"api/user_error", "api/progress_bar", "api/losses", "api/models", "api/measuring", "api/cache"},
    "api/command_line": {"divergences", "call", "api/user_error", "api/models", "api/measuring", "api/cache", "api/runs"},
    "api": {"api/losses", "api/models", "api/measuring", "api/cache", "api/trainers"},
    "facade": {"api", "divergences"},
}
# `from distill_kernels import divergences` in a module below the façade names a module, not the façade.


def test_every_module_has_a_layer():
    assert {layer(name) for name in MODULES} == set(ALLOWED)
    assert {"torch", "native", "triton"} <= set(BACKEND_NAMES)


def test_layers_stand_on_those_named_before():
    names = list(ALLOWED)
    for place, name in enumerate(names):
        above = ALLOWED[name] - set(names[:place]) - {name, "_cuda", "_native"}
        assert not above, f"{name} may import {above}, which stand above it"


def test_what_a_layer_may_import_it_does():
    used = {name: {layer(target) for source, target, _ in EDGES if layer(source) == name} - {name} for name in ALLOWED}
    assert used == ALLOWED


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_only(name):
    wrong = [
        f"{name}:{line} imports {target}"
        for source, target, line in EDGES
        if source == name and layer(target) not in ALLOWED[layer(name)] | {layer(name)}
    ]
    assert not wrong


def test_nothing_that_ships_imports_the_reference():
    assert not [f"{name}:{line}" for name, target, line in EDGES if layer(target) == "reference"]


def test_imports_have_no_cycle():
    graph = {name: {target for source, target, _ in EDGES if source == name and target in MODULES} - {name} for name in MODULES}
    state = {}

    def visit(name, path):
        assert state.get(name) != "open", f"cycle: {' → '.join([*path, name])}"
        if name not in state:
            state[name] = "open"
            for target in graph[name]:
                visit(target, [*path, name])
            state[name] = "done"

    for name in graph:
        visit(name, [])


def test_only_the_choice_of_a_backend_imports_by_name():
    users = {name for name, tree in TREES.items() for target, _, _ in imports_of(name, tree) if target == "importlib"}
    assert users == {f"{PACKAGE}.backends"}


def test_names_are_imported_from_the_module_that_defines_them():
    wrong = []
    for name, tree in TREES.items():
        if layer(name) == "facade":
            continue
        for target, imported, line in imports_of(name, tree):
            if imported in (None, "*") or target not in TREES:
                continue
            defined = set()
            for node in ast.walk(TREES[target]):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    defined.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    defined.add(node.id)
            if imported not in defined:
                wrong.append(f"{name}:{line} imports {imported} from {target}, which does not define it")
    assert not wrong


def test_no_private_name_crosses_a_module():
    wrong = []
    for name, tree in TREES.items():
        aliases = set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    base = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
                    if base in MODULES:
                        aliases.add(alias.asname or alias.name)
                    from_package = isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(PACKAGE))
                    if from_package and re.match("_[^_]", alias.name) and base not in (f"{PACKAGE}._cuda", f"{PACKAGE}._native"):
                        wrong.append(f"{name}:{node.lineno} imports {base}")
        for node in ast.walk(tree):
            private = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            if private and isinstance(node.value, ast.Name) and node.value.id in aliases:
                wrong.append(f"{name}:{node.lineno} uses {ast.unparse(node)}")
    assert not wrong


def broad_handlers(tree):
    for node in ast.walk(tree):
        kinds = []
        if isinstance(node, ast.ExceptHandler):
            kinds = [None] if node.type is None else [ast.unparse(n) for n in ast.walk(node.type)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            kinds = [ast.unparse(argument) for argument in node.args]
        if {None, "Exception", "BaseException"} & set(kinds):
            yield node.lineno


def test_no_handler_swallows_every_exception():
    trees = TREES | {"setup": ast.parse((ROOT / "setup.py").read_text())}
    assert not [f"{name}:{line}" for name, tree in trees.items() for line in broad_handlers(tree)]


def test_no_environment_switch_but_the_build_one():
    def reads_environment(node):
        return isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")

    assert not [f"{name}:{n.lineno}" for name, tree in TREES.items() for n in ast.walk(tree) if reads_environment(n)]
    assert set(re.findall(r"""environ[^\n]*?["']([A-Z_]+)["']""", (ROOT / "setup.py").read_text())) <= {
        "DISTILL_KERNELS_REQUIRE_NATIVE",
        "DISTILL_KERNELS_CUDA",
        "CUDA_HOME",  # the toolkit's own
        "CUDAARCHS",  # CMake's own
        "CXX",  # the compilers' own
    }


SOURCES = [*MODULES.values(), *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()), ROOT / "setup.py"]


def test_files_are_named_by_what_they_compute():
    empty_words = {"utils", "util", "misc", "helpers", "helper", "common", "v2", "new", "old", "tools", "stuff"}
    everything = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert not [str(path) for path in everything if set(re.split(r"[_\W]+", path.stem.lower())) & empty_words]


FOLDERS = sorted({path.parent for top in ("python", PACKAGE, "tests", "benchmarks") for path in (ROOT / top).rglob("*.py")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_folders_are_small_and_say_what_is_inside(folder):
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MOST_FILES
    if folder.relative_to(ROOT).parts[0] == "tests":
        return  # tests/README.md says it
    says = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    name = next((name for name, path in MODULES.items() if path == folder / "__init__.py"), None)
    assert says
    if name is not None and layer(name) not in ("facade", "api"):
        imported = re.search(r"It imports ([^.]*)\.", says)
        names = {found.removeprefix("api/") for found in ALLOWED[layer(name)] - {"_cuda", "_native"}}
        assert set(re.findall(r"`(\w+)`", imported[1])) == names


def test_every_folder_of_tests_is_named_in_their_readme():
    folders = {path.parent.relative_to(ROOT / "tests") for kind in ("*.py", "*.cpp") for path in (ROOT / "tests").rglob(kind)} - {Path(".")}
    named = re.findall(r"^ *- `([\w/]+)/`: \S", (ROOT / "tests" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {*folders, *(folder.parent for folder in folders if len(folder.parts) > 1)} == {Path(name) for name in named}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_is_too_long(path):
    if path.parent.name == "generated":
        pytest.skip("printed, not written")
    lines = len(path.read_text().splitlines())
    assert lines <= (92 if path.name == "setup.py" else LONGEST)


# C++


CPP = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inc", ".cpp", ".cu", ".cuh"))


def includes_of(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_kernels_know_nothing_of_torch_or_python():
    assert CPP
    for path in CPP:
        foreign = [i for i in includes_of(path) if re.match(r"(torch|ATen|c10|Python\.h|numpy|caffe2)", i)]
        assert not foreign, path
        if path.name != "bindings.cpp":
            assert not [i for i in includes_of(path) if i.startswith("pybind11")], path
            assert "pybind11" not in path.read_text() and "PyObject" not in path.read_text(), path


def test_quoted_includes_exist_in_the_tree():
    for path in CPP:
        for quoted in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            assert (path.parent / quoted).resolve().is_file(), f"{path} includes {quoted}"


def test_setup_compiles_and_depends_on_every_cpu_file():
    """A file that the build does not know is not rebuilt when it changes, or is not built at all."""
    text = (ROOT / "setup.py").read_text()
    for path in (p for p in CPP if "cuda" not in p.parts and p.suffix == ".cpp"):
        assert path.relative_to(ROOT / "csrc").with_suffix("").as_posix() in text, path
    for path in (p for p in CPP if "cuda" not in p.parts and p.suffix != ".cpp" and p.parent.name == "csrc"):
        assert path.name in text, path


def test_generated_headers_are_what_codegen_prints_and_nothing_else():
    folder = ROOT / "csrc" / "generated"
    files = codegen.generated_files()
    assert {path.name for path in folder.iterdir()} == set(files)
    for name, text in files.items():
        assert (folder / name).read_text() == text
        assert text.startswith("// Generated by distill_kernels/codegen.py")
    assert not [p for p in CPP if p.parent != folder and "Generated by" in p.read_text()]


def test_codegen_check_tells_a_header_that_was_edited(tmp_path, monkeypatch):
    monkeypatch.setattr(codegen, "GENERATED", tmp_path / "generated")
    monkeypatch.setattr(sys, "argv", ["codegen"])
    assert codegen.main() == 0
    monkeypatch.setattr(sys, "argv", ["codegen", "--check"])
    assert codegen.main() == 0
    edited = tmp_path / "generated" / "divergences.h"
    edited.write_text(edited.read_text().replace("log_p", "log_q", 1))
    assert codegen.main() == 1
    edited.unlink()
    assert codegen.main() == 1


# Imports that run


def run_python(*arguments, **environment):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=os.environ | environment, cwd="/")


def test_import_takes_no_optional_package_with_it():
    program = (
        "import sys, torch; before = set(sys.modules); import distill_kernels; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    made = run_python("-c", program)
    assert made.returncode == 0, made.stderr
    packages = set(made.stdout.split()) - set(sys.stdlib_module_names)
    assert PACKAGE in packages
    # Whatever of torch had not been loaded yet is torch's affair; nothing else is needed.
    assert packages <= {PACKAGE, "torch", "numpy"}


@pytest.mark.parametrize("absent", ["triton", "transformers", "matplotlib", "gguf", "accelerate", "tqdm", "psutil"])
def test_no_module_but_its_users_imports_an_optional_package_at_its_top(absent):
    trainer = f"{PACKAGE}.api.trainers.distillation_trainer"
    allowed = {"triton": {name for name in MODULES if layer(name) == "backend:triton"}, "transformers": {trainer}}
    top = [
        name
        for name, tree in TREES.items()
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for target, _, _ in imports_of(name, ast.Module([node], []))
        if target.partition(".")[0] == absent
    ]
    assert set(top) <= allowed.get(absent, set())


def test_import_from_a_tree_that_is_not_installed_says_what_to_run(tmp_path):
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    # Without `site` no editable installation is found; torch's folder is put on the path by hand.
    packages = Path(torch.__file__).resolve().parents[1]
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(packages)!r}]; import distill_kernels"
    made = run_python("-S", "-c", program)
    assert made.returncode == 1
    last = made.stderr.strip().splitlines()[-1]
    assert re.match(r"ImportError: distill_kernels is not installed: .*`pip install -e \.`", last), made.stderr
    assert "During handling" not in made.stderr


def test_an_error_inside_the_api_is_not_mistaken_for_a_missing_installation(tmp_path):
    """Something else that the API imports and does not find is that module's error."""
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tmp_path / PACKAGE / "api").mkdir()
    (tmp_path / PACKAGE / "api" / "__init__.py").write_text("import a_module_that_is_absent\n")
    packages = Path(torch.__file__).resolve().parents[1]
    made = run_python("-S", "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(packages)!r}]; import distill_kernels")
    assert made.stderr.strip().splitlines()[-1] == "ModuleNotFoundError: No module named 'a_module_that_is_absent'"


def test_public_names_are_the_ones_announced():
    import distill_kernels
    from distill_kernels import api

    assert set(api.__all__) <= set(distill_kernels.__all__)
    for name in distill_kernels.__all__:
        assert getattr(distill_kernels, name, None) is not None
        assert getattr(distill_kernels, name).__doc__
    assert api.__all__ == sorted(api.__all__)


@pytest.mark.parametrize("name", backends.ORDER)
def test_backends_have_the_functions_of_the_protocol(name):
    backend, wanted = backends.load(name), {n: f for n, f in vars(backends.Backend).items() if inspect.isfunction(f) and n[0] != "_"}
    assert set(wanted) == {"describe", "why_not", "schedule", "run", "multiply_kept", "run_listed"}
    for function, declared in wanted.items():
        if function == "run_listed" and not hasattr(backend, function):
            continue
        _, *parameters = inspect.signature(declared).parameters
        assert list(inspect.signature(getattr(backend, function)).parameters) == parameters, function
