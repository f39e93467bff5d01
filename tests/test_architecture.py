"""The rules of the house that a machine can check: who imports whom, what stays light, how long files get."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jorch", "kernels", "tools_server")

RANKS = {
    **dict.fromkeys(("types", "sections", "config"), 0),
    **dict.fromkeys(
        (
            "config_help",
            "config_io",
            "run_folder",
            "metrics",
            "sharding",
            "versions",
            "processes",
            "flops",
            "memory",
            "stopping",
            "stored_arrays",
        ),
        1,
    ),
    **dict.fromkeys(("model", "data", "checkpoint"), 2),
    **dict.fromkeys(("rollout", "train", "export", "serving"), 3),
    **dict.fromkeys(("rl", "synth", "evals"), 4),
    **dict.fromkeys(("quickstart", "bench", "launch", "plan"), 5),
    **dict.fromkeys(("cli", "arguments"), 6),
}
"""A part of jorch may import parts of lower rank, and itself; parts of rank 1 and 6 also each other."""

SIDEWAYS = {("export", "train"), ("serving", "export"), ("serving", "rollout"), ("bench", "plan")}
"""Parts of one rank that may be imported one way: a checkpoint can only be read into the state that was saved, and a
server gets its weights as exported and answers the rollouts; a benchmark takes the published dimensions."""

BRIDGES = {
    "jorch/rollout/tool_client.py": {"tools_server.wire"},
    "jorch/rl/rewards.py": {"tools_server.rewards"},
    "jorch/arguments.py": {"tools_server.config"},  # the keys of `jorch tools-server --help`; pydantic only
    "jorch/evals/tau2.py": {"tools_server.envs.tau2", "tools_server.wire"},  # one reader of tau2's own tasks
}
"""The only files of jorch that may import tools_server, and what of it."""

KERNEL_USERS = {
    "jorch/data/packing.py": "kernels.attention.mask",  # NumPy only
    "jorch/bench/kernels.py": "kernels.bench",
    "jorch/model/attention.py": "kernels",
    "jorch/model/decode.py": "kernels",
    "jorch/model/transformer.py": "kernels.logprob",
    "jorch/train/logprobs.py": "kernels",
}
"""The only files of jorch that may import kernels, and what of it."""

WITHOUT_JAX = (
    "jorch/*.py",
    "jorch/data/*.py",
    "jorch/rollout/*.py",
    "jorch/rl/rewards.py",
    "jorch/rl/advantages.py",
    "jorch/rl/samples.py",
    "jorch/synth/miniature.py",
    "jorch/launch/*.py",
    "tools_server/**/*.py",
)
WITH_JAX = {
    "checkpoint.py",
    "stored_arrays.py",
    "sharding.py",
    "processes.py",
    "quickstart.py",
    "jax_sampler.py",
    "row_batch.py",
}
"""Of the files above, those that may import it after all."""

HEAVY = {"torch", "transformers", "vllm", "tokamax", "mcp", "tensorboard", "tensorboardX", "tau2"}
"""Imported where used, never when a module is."""

NNX_USERS = ("jorch/model/", "jorch/train/state.py")

WITHOUT_AWAIT = ("jorch/model", "jorch/train", "jorch/rl/losses.py", "kernels")


class Import(NamedTuple):
    file: str
    """Relative to the root."""
    line: int
    name: str
    """Dotted, with the imported name: `from jorch.rl import loop` is "jorch.rl.loop"."""
    at_top: bool
    """Runs when the module is imported."""


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


SOURCES = files(*(f"{package}/**/*.py" for package in PACKAGES))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def statements(body: ast.AST, at_top: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below `body`, with whether it runs when the module is imported."""
    for node in ast.iter_child_nodes(body):
        yield node, at_top
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        yield from statements(node, at_top and not inside)


def imports_of(path: Path) -> Iterator[Import]:
    file = path.relative_to(ROOT).as_posix()
    for node, at_top in statements(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import; write the full name"
            yield from (Import(file, node.lineno, f"{node.module}.{a.name}", at_top) for a in node.names)


IMPORTS = [found for path in SOURCES for found in imports_of(path)]


def part_of(name: str) -> str:
    """The part of jorch that a dotted name or a file belongs to: "jorch.rl.loop" is of "rl"."""
    return name.removesuffix(".py").replace("/", ".").split(".")[1]


def places(wrong: list[Import]) -> str:
    return "\n".join(f"{found.file}:{found.line}: {found.name}" for found in wrong)


def test_every_part_of_jorch_has_a_rank() -> None:
    parts = {part_of(path.relative_to(ROOT).as_posix()) for path in SOURCES if path.is_relative_to(ROOT / "jorch")}
    assert parts - {"__init__"} <= RANKS.keys()


def test_jorch_imports_downwards_only() -> None:
    wrong = []
    for found in IMPORTS:
        if not (found.file.startswith("jorch/") and found.name.startswith("jorch.")):
            continue
        importer, imported = part_of(found.file), part_of(found.name)
        if importer == imported or imported == "__version__":
            continue
        upward = RANKS[imported] > RANKS[importer]
        sideways = RANKS[imported] == RANKS[importer] and RANKS[importer] not in (0, 1, 6)
        if upward or (sideways and (importer, imported) not in SIDEWAYS):
            wrong.append(found)
    assert not wrong, places(wrong)


def test_only_the_bridges_reach_into_the_tool_server() -> None:
    wrong = [
        found
        for found in IMPORTS
        if found.file.startswith("jorch/")
        and found.name.startswith("tools_server")
        and not any(found.name.startswith(name) for name in BRIDGES.get(found.file, ()))
    ]
    assert not wrong, places(wrong)


def test_the_tool_server_and_the_kernels_stand_alone() -> None:
    wrong = [
        f for f in IMPORTS if f.file.startswith("tools_server/") and f.name.split(".")[0] in ("jax", "jorch", "kernels")
    ]
    allowed = {*sys.stdlib_module_names, "jax", "numpy", "kernels"}
    wrong += [
        f
        for f in IMPORTS
        if f.file.startswith("kernels/")
        and f.name.split(".")[0] not in allowed
        and (f.file, f.name.split(".")[0]) != ("kernels/rivals.py", "tokamax")  # only measured beside ours
    ]
    wrong += [
        f
        for f in IMPORTS
        if f.file.startswith("jorch/")
        and f.name.startswith("kernels")
        and not f.name.startswith(KERNEL_USERS.get(f.file, "nothing"))
    ]
    assert not wrong, places(wrong)


def test_the_bridges_rest_on_the_standard_library() -> None:
    """The trainer's side must not need what the server needs (pydantic is common to both)."""
    for module in ("wire", "rewards"):
        for found in imports_of(ROOT / "tools_server" / f"{module}.py"):
            assert found.name.split(".")[0] in sys.stdlib_module_names, found


def test_types_need_numpy_at_most() -> None:
    assert {found.name.split(".")[0] for found in imports_of(ROOT / "jorch/types.py")} <= {
        *sys.stdlib_module_names,
        "numpy",
    }


def test_light_modules_load_without_jax() -> None:
    """Also not through what they import."""
    modules = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for path in files(*WITHOUT_JAX)
        if path.name not in WITH_JAX and path.name != "__main__.py"
    ]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    found = {'jax', 'flax', 'torch', 'tensorboardX', 'tau2'} & sys.modules.keys()\n"
        "    assert not found, f'{name} imports {found}'\n"
    )
    command = [sys.executable, "-c", script, *modules]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_heavy_packages_are_imported_where_used() -> None:
    wrong = [found for found in IMPORTS if found.at_top and found.name.split(".")[0] in HEAVY]
    assert not wrong, places(wrong)


def test_nnx_stays_in_the_model() -> None:
    wrong = [f for f in IMPORTS if f.name.split(".")[0] == "flax" and not f.file.startswith(NNX_USERS)]
    assert not wrong, places(wrong)


def test_kernels_init_is_a_docstring() -> None:
    """Hugging Face has a package of the same name, which ours may shadow: it must import without anything."""
    (statement,) = tree_of(ROOT / "kernels/__init__.py").body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)


def test_jitted_code_never_awaits() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        if path.relative_to(ROOT).as_posix().startswith(WITHOUT_AWAIT)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Await | ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_short_and_explain_themselves(path: Path) -> None:
    most = 600 if path.is_relative_to(ROOT / "kernels") else 400
    tree, lines = tree_of(path), path.read_text(encoding="utf-8").count("\n")
    assert lines <= most, f"{lines} lines; the most is {most}"
    assert ast.get_docstring(tree) or not tree.body, "no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"line {node.lineno}: {node.name} has {length} lines; the most is 80"
