"""Imports go down one list, `import gpumlp` is light, and what it offers is listed."""

import ast
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gpumlp
from gpumlp.optimizers import OPTIMIZERS
from gpumlp.schedules import SCHEDULES

PACKAGE = Path(gpumlp.__file__).parent

# A module imports only from lines below its own. data/ and backends/ count as one module each.
LINES = """
__main__
cli
train_command           from data and flags to a network's file
commands                what the command line's other commands do
estimators              scikit-learn's manners; needs it
sklearn_training        its rules of training in the library's terms
__init__                what `import gpumlp` offers
perceptron plots
trainer
checkpoints             a folder of training states: which is kept, which is taken up
training_state          a fit on disk, at any step
callbacks
files                   models on disk: a file is read by building a network, so this stands above it
diagnostics             the gradient check, and the health of a network
device_step             the same on a device, recorded and replayed
streaming               data that stay on the host, on their way to a device
train_step
evaluation              loss and metrics without training
fit_data                what a fit reads: checked arrays, encoded labels
network
places                  a graph's layers with their names and widths
workspace               the buffers of one forward and backward pass
layers augment
backends
losses
averaging               the moving average of a network's weights
optimizers
lbfgs                   one iteration of an optimizer that needs more than a row of the table
optimizer_state         an optimizer at work on one network
schedules initializers metrics activations
data
random
container               the file format
"""
RANK = {name: rank for rank, line in enumerate(LINES.split("\n")) for name in line.split("  ")[0].split()}

# Within a function a module may also reach above itself: methods that hand a network over to a module about networks.
FORWARDED = {
    ("network", "files"),  # save and pickle
    ("network", "diagnostics"),  # gradient_check and diagnose
    ("__init__", "estimators"),  # which need scikit-learn
}

CORE = {"numpy", "tqdm", "safetensors"}  # installed always; everything else is an extra
# The modules that are about an extra.
EXTRAS = {"estimators": "sklearn", "perceptron": "sklearn", "backends.cupy_runtime": "cupy"}

SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))
}  # "trainer", "data.checks", "data.__init__"


def imports(name):
    """(what, whether within a function) of every import that runs; ours as "gpumlp.data.checks", others as "numpy"."""
    found = set()

    def visit(node, lazily):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return  # for type checkers alone
        if isinstance(node, ast.Import):
            found.update((alias.name, lazily) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = ["gpumlp", *name.split(".")][: -node.level] if node.level else []
            base = ".".join([*home, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix("gpumlp.")
                found.add((f"gpumlp.{inner}" if is_module(inner) and base.startswith("gpumlp") else base, lazily))
        for child in ast.iter_child_nodes(node):
            visit(child, lazily or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(SOURCES[name].read_text("utf-8")), False)
    return found


def is_module(name):
    return name in SOURCES or f"{name}.__init__" in SOURCES


def line_of(name):
    """The module of LINES that a dotted name belongs to: "data.checks" → "data", "gpumlp" itself → "__init__"."""
    inner = name.removeprefix("gpumlp").lstrip(".")
    return inner.split(".")[0] if inner else "__init__"


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down_the_list(name):
    own = line_of(name)
    assert own in RANK, f"say in LINES where {own} stands"
    for target, lazily in imports(name):
        if target.split(".")[0] != "gpumlp" or line_of(target) == own:
            continue
        down = RANK[line_of(target)] > RANK[own]
        assert down or (lazily and (own, line_of(target)) in FORWARDED), (
            f"{name} imports {target}, which stands above it"
        )


def test_the_list_names_nothing_that_is_not_there():
    there = {line_of(name) for name in SOURCES}
    assert set(RANK) <= there
    used = {(line_of(name), line_of(target)) for name in SOURCES for target, lazily in imports(name) if lazily}
    assert used >= FORWARDED


def test_no_module_imports_itself_in_a_circle():
    """Within data/ and backends/, too."""
    graph = {
        name: {t for target, lazily in imports(name) if not lazily and (t := target.removeprefix("gpumlp.")) in SOURCES}
        for name in SOURCES
    }
    assert "backends.base" in graph["backends.numpy_backend"] and "data.checks" in graph["data.splits"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("name", SOURCES)
def test_extras_are_imported_where_they_are_used(name):
    for target, lazily in imports(name):
        top = target.split(".")[0]
        if not lazily and top not in {"gpumlp", *CORE, *sys.stdlib_module_names}:
            assert EXTRAS.get(name) == top, f"{name} needs {top} to be imported at all; import it within a function"
        if top == "cupy":
            assert name == "backends.cupy_runtime", f"{name} imports cupy; backends/cupy_runtime.py alone may"


HEAVY = {"cupy", "sklearn", "matplotlib", "pandas", "scipy", "torch", "pyarrow", "tensorboardX", "tqdm", "safetensors"}


def test_import_gpumlp_is_light():
    """In a process of its own, neither an extra nor what only some runs need is loaded beyond what NumPy loads."""
    code = "import sys, numpy; before = set(sys.modules); import gpumlp; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    loaded = run.stdout.split()
    assert "gpumlp.network" in loaded
    assert not HEAVY & {name.split(".")[0] for name in loaded}
    assert not {"multiprocessing", "asyncio", "unittest", "email"} & {name.split(".")[0] for name in loaded}


def test_all_is_complete_and_sorted():
    names = gpumlp.__all__
    tree = ast.parse(SOURCES["__init__"].read_text("utf-8"))
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(names) == {name for name in imported if not name.startswith("_")}
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    for name in names:
        assert inspect.getdoc(getattr(gpumlp, name)), f"{name} has no docstring"


def test_every_row_that_is_a_class_is_public():
    rows = [*OPTIMIZERS.values(), *(row for row in SCHEDULES.values() if inspect.isclass(row))]
    assert {row.__name__ for row in rows} <= set(gpumlp.__all__)


def test_plots_and_data_are_there_without_a_further_import():
    """As error messages and the documentation name them; in a process of its own, where no test has imported them."""
    code = "import gpumlp as gm; print(gm.plots.learning_curves.__name__, gm.data.encode_labels.__name__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60)
    assert run.stdout == "learning_curves encode_labels\n", run.stderr


@pytest.mark.parametrize("name", ["MLPClassifier", "MLPRegressor", "Perceptron"])
def test_estimators_come_with_scikit_learn_or_say_so(name):
    """In a process of its own, without scikit-learn as far as imports can tell."""
    code = f"import sys; sys.modules['sklearn'] = None; import gpumlp; gpumlp.{name}"
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60)
    assert f'{name} needs scikit-learn: pip install "gpumlp[sklearn]"' in run.stderr
    with pytest.raises(AttributeError, match="module 'gpumlp' has no attribute 'MLPTransformer'"):
        gpumlp.MLPTransformer  # noqa: B018
