"""The house rules of docs/design.md, held against the code: who imports whom, what loads when, how large it is."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import containerkit as ck

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGE = "containerkit"
MODULE_LINES = 450
FUNCTION_LINES = 60
OWN_PROCESS = {"__main__", "quickstart", "launcher", "keeper", "starter"}  # may print and exit
FACE = "__init__"  # the lazy public face may name everything

# What the privileged helper loads of the library, beside linux/: what it needs before it enters a root, no policy.
LAUNCHER_MODULES = {
    "containerkit",
    "containerkit.errors",
    "containerkit.errors.base",
    "containerkit.errors.container",
    "containerkit.isolation",
    "containerkit.isolation.keeper",
    "containerkit.isolation.launcher",
    "containerkit.isolation.messages",
    "containerkit.isolation.operations",
    "containerkit.isolation.plan",
    "containerkit.isolation.starter",
}
# Each of these costs a good part of a whole container start.
SLOW_MODULES = {
    "attr",
    "attrs",
    "requests",
    "urllib3",
    "subprocess",
    "dataclasses",
    "inspect",
    "pathlib",
    "logging",
    "asyncio",
}


def _files() -> dict[str, str]:
    """Module name -> path, for every module of the package."""
    found = {}
    for directory, _, names in os.walk(os.path.join(REPOSITORY, PACKAGE)):
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(directory, name)
                module = os.path.relpath(path, REPOSITORY).removesuffix(".py").replace(os.sep, ".")
                found[module.removesuffix(".__init__")] = path
    return found


FILES = _files()


@functools.cache
def _tree(module: str) -> ast.Module:
    with open(FILES[module], encoding="utf-8") as file:
        return ast.parse(file.read(), FILES[module])


def _imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name if name in FILES else str(node.module)


def _room(module: str) -> str:
    """The row of the table that a module belongs to: ``linux`` for containerkit.linux.mount."""
    return module.split(".")[1] if "." in module else FACE


@functools.cache
def table() -> dict[str, frozenset[str]]:
    """Room -> every room that it may import, as docs/design.md says it, by way of others too."""
    with open(os.path.join(REPOSITORY, "docs", "design.md"), encoding="utf-8") as file:
        house = file.read().partition("## The house\n")[2].partition("\n## ")[0]
    rows = [line.strip().strip("|").split("|") for line in house.splitlines() if line.startswith("| `")]
    allowed: dict[str, frozenset[str]] = {}
    for place, _, may in rows:
        above = frozenset({*allowed, FACE}) if "everything above" in may else frozenset(re.findall(r"`(\w+)`", may))
        reachable = above.union(*(allowed.get(room, ()) for room in above))
        rooms = re.findall(r"`(\w+)(?:/|\.py)`", place)
        own = frozenset(rooms) if len(rooms) > 1 else frozenset()
        allowed.update(dict.fromkeys(rooms, reachable | own))
    return allowed


def test_the_table_in_the_design_names_every_room() -> None:
    assert {"errors", "linux", "state", "image", "registry", "isolation", "container", "host"} <= set(table())
    assert {_room(module) for module in FILES} - {FACE} <= set(table())


def test_registry_and_isolation_never_meet() -> None:
    assert "isolation" not in table()["registry"]
    assert "registry" not in table()["isolation"]


LAYERS = f"{PACKAGE}.image.layers"
BELOW_LAYERS = {f"{PACKAGE}.image.{name}" for name in ("digest", "limits", "stream", "model")}


@pytest.mark.parametrize("module", sorted(module for module in FILES if module.startswith(f"{LAYERS}.")))
def test_layers_know_nothing_of_images_blobs_or_the_state_root(module: str) -> None:
    known = {name for _, name in _imports(module) if name.startswith((f"{PACKAGE}.image.", f"{PACKAGE}.state"))}
    assert not {name for name in known if not name.startswith(LAYERS)} - BELOW_LAYERS


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    room = _room(module)
    allowed = {*table(), FACE} if room == FACE else {room, *table().get(room, ())}
    wrong = [
        f"{FILES[module]}:{line}: {name}"
        for line, name in _imports(module)
        if name.split(".")[0] == PACKAGE and _room(name) not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("module", sorted(module for module in FILES if _room(module) != "linux"))
def test_ctypes_stays_in_linux(module: str) -> None:
    assert not [line for line, name in _imports(module) if name.split(".")[0] in {"ctypes", "_ctypes", "cffi"}]


@pytest.mark.parametrize("module", sorted(FILES))
def test_modules_and_functions_stay_small(module: str) -> None:
    with open(FILES[module], encoding="utf-8") as file:
        assert sum(1 for _ in file) <= MODULE_LINES
    functions = [node for node in ast.walk(_tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES]


@pytest.mark.parametrize("module", sorted(module for module in FILES if module.split(".")[-1] not in OWN_PROCESS))
def test_a_library_neither_prints_nor_exits(module: str) -> None:
    calls = [node for node in ast.walk(_tree(module)) if isinstance(node, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    assert not names & {"print", "input", "exit", "quit", "sys.exit", "os._exit"}


def loaded_by(statement: str, *flags: str) -> set[str]:
    """The modules that a statement loads in a fresh interpreter, over what the interpreter itself has loaded."""
    setup = f"import sys; sys.path.insert(0, {REPOSITORY!r}); before = set(sys.modules)"
    code = f"{setup}\n{statement}\nnew = sorted(set(sys.modules) - before)\nimport json; print(json.dumps(new))"
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_importing_the_library_costs_next_to_nothing() -> None:
    assert len(loaded_by("import containerkit", "-I")) <= 12


def test_the_launcher_loads_its_own_few_modules() -> None:
    loaded = loaded_by("import containerkit.isolation.launcher", "-I", "-S")
    ours = {name for name in loaded if name.split(".")[0] == PACKAGE}
    assert {name for name in ours if not name.startswith("containerkit.linux")} <= LAUNCHER_MODULES
    assert {name.split(".")[0] for name in loaded} - {PACKAGE} <= sys.stdlib_module_names
    assert not loaded & (SLOW_MODULES | {"sqlite3", "json", "hashlib"})


def test_importing_the_start_path_loads_nothing_slow() -> None:
    assert not loaded_by("import containerkit.host, containerkit.container.containers", "-I") & SLOW_MODULES


@pytest.mark.kernel
@pytest.mark.usefixtures("busybox_image")
def test_running_a_first_container_loads_nothing_slow(host: ck.Host) -> None:
    run = f"import containerkit as ck; ck.Host(root={host.root!r}).run('busybox:1', ['/bin/true'], check=True)"
    assert not loaded_by(run, "-I") & SLOW_MODULES
