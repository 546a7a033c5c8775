"""The house rules: who may import whom, one interface in every framework, documented."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from backends import BACKENDS, REQUIRE_ALL, Backend

import focal
import focal.numpy

ROOT = Path(focal.__file__).parent
FRAMEWORKS = {
    "torch": {"torch", "triton"},
    "jax": {"jax", "flax", "optax"},
    "tensorflow": {"tensorflow", "keras"},
}
OWN_IMPORTS = {"torch": ["torch"], "jax": ["jax"], "tensorflow": ["tensorflow", "keras"]}
HEAVY = {"torch", "jax", "tensorflow", "keras", "flax", "PIL", "matplotlib"}
ADAPTERS = ("numpy", *FRAMEWORKS)
PRESENT = [name for name in ADAPTERS if (ROOT / name).is_dir()]

PUBLIC = """
    sigmoid_focal_loss sparse_sigmoid_focal_loss softmax_focal_loss sigmoid_focal_loss_star
    quality_focal_loss varifocal_loss heatmap_focal_loss asymmetric_loss
    balanced_cross_entropy smooth_l1_loss giou_loss hard_example_mask
    box_area box_iou generalized_box_iou encode_boxes decode_boxes clip_boxes nms batched_nms
    anchors match_anchors assign_targets subsample
""".split()
CONSTANTS = ["AnchorConfig", "expected_initial_loss", "inverse_frequency_alpha", "prior_bias"]
REPLICAS = "num_positives"  # with the parameter that names the replicas in each framework
CLOSED_FORMS = [
    "sigmoid_focal_loss_grad",
    "sigmoid_focal_loss_hess",
    "sigmoid_focal_loss_star_grad",
    "softmax_focal_loss_grad",
]


def sources(*packages: str) -> Iterator[Path]:
    for package in packages:
        yield from (ROOT / package).rglob("*.py")


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Full names of the modules that a file imports, functions included."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(path: Path, allowed: set[str], frameworks: set[str]) -> list[str]:
    """Imports from focal that are not allowed, and frameworks other than those named."""
    forbidden = set().union(*FRAMEWORKS.values()) - frameworks
    wrong = []
    for name in imports(path):
        head, *rest = name.split(".")
        if head in forbidden or (head == "focal" and rest[0] not in allowed):
            wrong.append(f"{path.relative_to(ROOT)}: {name}")
    return wrong


@functools.cache
def loaded_by(module: str) -> set[str]:
    """Top-level packages in a fresh interpreter that has imported the module."""
    command = [sys.executable, "-c", f"import {module}, sys; print(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


# ---------------------------------------------------------------- imports


def test_every_adapter_is_tested() -> None:
    assert set(PRESENT) == set(BACKENDS) - {"array_api_strict"}


def test_core_imports_only_core() -> None:
    assert [v for path in sources("core") for v in violations(path, {"core"}, set())] == []


@pytest.mark.parametrize("name", PRESENT)
def test_adapters_import_core_and_their_own_framework(name: str) -> None:
    own = FRAMEWORKS.get(name, set()) - {"keras"}
    allowed = {"core", "kernels", name} | ({"keras"} if name == "tensorflow" else set())
    assert [v for path in sources(name) for v in violations(path, allowed, own)] == []


def test_the_front_imports_only_core() -> None:
    assert violations(ROOT / "__init__.py", {"core"}, set()) == []


def test_keras_imports_an_adapter_only_when_a_loss_is_made() -> None:
    """So `focal.tensorflow` can have its names, and no circle begins."""
    path = ROOT / "keras.py"
    assert violations(path, {"core", *ADAPTERS}, set().union(*FRAMEWORKS.values())) == []
    first = {name.split(".")[1] for name in imports(path, True) if name.startswith("focal.")}
    assert first == {"core"}
    frameworks = {name.split(".")[0] for name in imports(path)} & set().union(*FRAMEWORKS.values())
    assert frameworks == {"keras"}
    users = {p for p in ROOT.rglob("*.py") if any(n.startswith("focal.keras") for n in imports(p))}
    assert users == {ROOT / "tensorflow" / "__init__.py"}


def module_file(name: str) -> Path:
    """The file of a module, or of the module that a name is in."""
    path = ROOT.joinpath(*name.split(".")[1:])
    while not path.with_suffix(".py").is_file() and not (path / "__init__.py").is_file():
        path = path.parent
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_no_imports_in_a_circle() -> None:
    """Not even those within functions."""
    graph = {
        path: {module_file(name) for name in imports(path) if name.split(".")[0] == "focal"}
        for path in ROOT.rglob("*.py")
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # an error, if there is one
    assert set(order) == set(graph)
    assert order.index(ROOT / "keras.py") < order.index(ROOT / "tensorflow" / "__init__.py")


def test_importing_keras_loads_only_what_keras_does() -> None:
    if not REQUIRE_ALL:
        pytest.importorskip("keras")
    assert loaded_by("focal.keras") & HEAVY <= loaded_by("keras")


def test_kernels_import_only_core() -> None:
    every = set().union(*FRAMEWORKS.values())
    wrong = [v for path in sources("kernels") for v in violations(path, {"core", "kernels"}, every)]
    assert wrong == []


def test_only_adapters_reach_the_kernels() -> None:
    reached = [p for p in sources("core", "retinanet") if "focal.kernels" in p.read_text()]
    assert reached == []


def test_retinanet_imports_a_framework_only_in_its_own_files() -> None:
    """retinanet/torch is PyTorch's; what is shared names no framework at its top level."""
    wrong = []
    for path in sources("retinanet"):
        own = path.parent.name if path.parent.name in FRAMEWORKS else None
        names = {n.split(".")[0] for n in imports(path, top_level_only=own is None)}
        adapters = {
            n.split(".")[1]
            for n in imports(path, top_level_only=own is None)
            if n.startswith("focal.")
        }
        allowed = FRAMEWORKS[own] if own else set()
        for name in names & (set().union(*FRAMEWORKS.values()) - allowed):
            wrong.append(f"{path.relative_to(ROOT)}: {name}")
        for name in adapters & (set(FRAMEWORKS) - {own}):
            wrong.append(f"{path.relative_to(ROOT)}: focal.{name}")
    assert wrong == []


def test_rooms_of_the_retinanet_import_one_way() -> None:
    """What a detector is, then data, the frameworks, the training, the reports, a whole run."""
    rank = {"data": 1, "torch": 2, "jax": 2, "tensorflow": 2, "training": 3, "report": 4}
    rank["run.py"] = rank["run"] = 5
    wrong = []
    for path in sources("retinanet"):
        own = path.relative_to(ROOT / "retinanet").parts
        # A file that is in no room imports from one only where it is asked to work.
        for name in imports(path, top_level_only=len(own) == 1):
            if name.startswith("focal.retinanet."):
                if rank.get(name.split(".")[2], 0) > rank.get(own[0], 0):
                    wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []
    users = {p for p in ROOT.rglob("*.py") if any(n.startswith("focal.cli") for n in imports(p))}
    assert users - set(sources("cli")) == {ROOT / "__main__.py"}


def test_testing_imports_core_and_numpy_and_nobody_imports_it() -> None:
    """A framework is imported when a loss is checked in it."""
    allowed = {"core", "files", "numpy", "testing"}
    assert [v for path in sources("testing") for v in violations(path, allowed, set())] == []
    others = set(ROOT.rglob("*.py")) - set(sources("testing"))
    assert [p for p in others if any(n.startswith("focal.testing") for n in imports(p))] == []


@pytest.mark.parametrize("module", ["focal", "focal.numpy", "focal.testing"])
def test_importing_loads_no_framework(module: str) -> None:
    assert loaded_by(module) & HEAVY == set()


def test_importing_retinanet_loads_no_framework() -> None:
    assert loaded_by("focal.retinanet") & set().union(*FRAMEWORKS.values()) == set()


def test_drawing_boxes_does_not_import_matplotlib() -> None:
    """`focal predict` would start half a second later."""
    pytest.importorskip("PIL")
    assert "matplotlib" not in loaded_by("focal.retinanet.report.draw")


@pytest.mark.parametrize("name", [name for name in PRESENT if name != "numpy"])
def test_importing_an_adapter_loads_no_other_framework(name: str) -> None:
    if not REQUIRE_ALL:
        pytest.importorskip(name)
    # A framework may load others by itself: TensorFlow does JAX, and Keras does matplotlib.
    itself = set().union(*(loaded_by(own) for own in OWN_IMPORTS[name]))
    assert loaded_by(f"focal.{name}") & HEAVY <= FRAMEWORKS[name] | itself


def test_nothing_is_downloaded_and_no_pickle_is_run() -> None:
    """No module that can reach a network; PyTorch's files are read as tensors only."""
    network = {"urllib", "http", "ftplib", "socket", "ssl", "requests", "httpx", "huggingface_hub"}
    wrong = []
    for path in ROOT.rglob("*.py"):
        heads = {name.split(".")[0] for name in imports(path)}
        text = path.read_text()
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in heads & network]
        if text.count("torch.load(") != len(
            re.findall(r"torch\.load\([^)]*weights_only=True", text)
        ):
            wrong.append(f"{path.relative_to(ROOT)}: torch.load without weights_only=True")
        wrong += [
            f"{path.relative_to(ROOT)}: {word}"
            for word in ("torch.hub", "pickle.load", "eval(", "exec(")
            if re.search(rf"(?<![\w.]){re.escape(word)}", text)
        ]
    assert wrong == []


# ---------------------------------------------------------------- one interface


def signature(function: object) -> list[tuple[str, object, object]]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [(p.name, p.kind, p.default) for p in parameters]


@pytest.mark.parametrize("name", PUBLIC)
def test_same_signature_everywhere(backend: Backend, name: str) -> None:
    assert signature(getattr(backend.F, name)) == signature(getattr(focal.numpy, name))


def test_public_names(backend: Backend) -> None:
    if backend.name == "array_api_strict":
        public = set(vars(backend.F))
        assert {*PUBLIC, *CLOSED_FORMS} <= public
        return
    public = set(backend.F.__all__)
    assert {*PUBLIC, *CONSTANTS, REPLICAS} <= public
    closed_forms = set(CLOSED_FORMS) if backend.name == "numpy" else set()
    assert {name for name in public if name.endswith(("_grad", "_hess"))} == closed_forms
    assert all(hasattr(backend.F, name) for name in public)


def test_replicas_are_counted_in_the_idiom_of_each(backend: Backend) -> None:
    own = {"torch": ["group"], "jax": ["axis_name"], "tensorflow": []}
    idiom = own.get(backend.name, ["over_replicas"])
    function = getattr(backend.F, REPLICAS)
    labels, *rest = inspect.signature(function).parameters.values()
    assert labels.name == "labels" and [p.name for p in rest] == idiom
    assert all(p.default is None for p in rest)
    text = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Raises:", "Example:", "Source:", *idiom):
        assert section in text
    count = backend.numpy(function(backend.asarray(np.array([2, -1, 0, -2]))))
    assert (count.shape, count.dtype, count) == ((), np.float32, 2)
    assert backend.numpy(function(backend.asarray(np.array([-1, -2])))) == 1


RENAMED = {"asymmetric_focal_loss": "asymmetric_loss", "AsymmetricFocalLoss": "AsymmetricLoss"}


@pytest.mark.parametrize("name", PRESENT)
def test_former_names_warn_and_are_the_new_ones(name: str) -> None:
    if not REQUIRE_ALL:
        pytest.importorskip(name)
    module = importlib.import_module(f"focal.{name}")
    present = {old: new for old, new in RENAMED.items() if new in module.__all__}
    assert present and not set(present) & set(module.__all__)
    for old, new in present.items():
        with pytest.warns(DeprecationWarning, match=f"^focal.{name}.{old} .*; use {new}$") as said:
            assert getattr(module, old) is getattr(module, new)
        assert said[0].filename == __file__
    with pytest.raises(AttributeError, match=f"^module 'focal.{name}' has no attribute 'nothing'$"):
        _ = module.nothing


def test_names_of_the_front() -> None:
    assert sorted(focal.__all__) == CONSTANTS
    for name in CONSTANTS:
        assert getattr(focal, name) is getattr(focal.numpy, name)


# ---------------------------------------------------------------- documentation

DOCUMENTED = [*PUBLIC, *CLOSED_FORMS, *CONSTANTS, REPLICAS]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_has_every_section(name: str) -> None:
    public = getattr(focal.numpy, name)
    text = inspect.getdoc(public) or ""
    is_class = inspect.isclass(public)
    for section in ("Attributes:" if is_class else "Args:", "Raises:", "Example:", "Source:"):
        assert f"\n{section}" in text, f"{name} lacks {section}"
    assert is_class or "\nReturns:" in text
    assert ">>> " in text.partition("\nExample:")[2]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_names_every_parameter(name: str) -> None:
    public = getattr(focal.numpy, name)
    text = inspect.getdoc(public) or ""
    for parameter in inspect.signature(public).parameters:
        assert f"\n    {parameter}: " in text


@pytest.mark.parametrize("name", PUBLIC)
def test_binding_keeps_name_and_docstring(backend: Backend, name: str) -> None:
    function = getattr(backend.F, name)
    assert (function.__name__, function.__module__) == (name, backend.F.__name__)
    text, original = inspect.getdoc(function), inspect.getdoc(getattr(focal.numpy, name))
    if backend.name != "numpy":  # whose example it is, is said in the others
        note = (
            f"This is focal.numpy; {backend.F.__name__} takes and returns arrays of its framework."
        )
        original = original.replace("Example:\n", f"Example:\n    {note}\n\n")
    assert text == original


@pytest.mark.parametrize("name", PUBLIC)
def test_binding_keeps_source_and_annotations(backend: Backend, name: str) -> None:
    function = getattr(backend.F, name)
    if backend.name != "tensorflow":  # AutoGraph follows what `getsource` follows
        assert inspect.getsource(function).startswith(f"def {name}(")
    hints = typing.get_type_hints(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}
