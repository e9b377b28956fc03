import ast
import inspect
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
import trl
from trl import DPOTrainer, SFTTrainer

import lopt_hf
from lopt_hf.common.upstream import trainers as upstream_trainers
from lopt_hf.common.upstream.grpo import GRPOTrainer
from lopt_hf.common.upstream.guard import Upstream

PACKAGE = Path(lopt_hf.__file__).parent
UPSTREAM = PACKAGE / "common" / "upstream"
TRAINERS = [getattr(lopt_hf, name) for name in lopt_hf.__all__ if name.endswith("Trainer")]
STANDARD_LIBRARY = {"_ActionsContainer", "_ArgumentGroup", "_actions", "_exit"}
STANDARD_LIBRARY |= {"_format_args", "_get_default_metavar_for_optional"}  # what a formatter of argparse overrides


def _modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in PACKAGE.rglob("*.py"):
        if UPSTREAM not in path.parents:
            yield path, ast.parse(path.read_text())


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def _checked() -> set[str]:
    """The names that the modules of `upstream` look for when they are imported."""
    calls = (node for path in UPSTREAM.glob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    return {
        argument.value
        for call in calls
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".check")
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }


def test_nothing_private_is_imported_elsewhere():
    for path, tree in _modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lopt_hf"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            private = [name for name in names if any(map(_is_private, name.split("."))) and "_typeshed" not in name]
            private += [name for name in names if name.startswith("trl.kernels") or name.endswith("add_fused_lm_head")]
            assert not private, f"{path}: {private} belongs into lopt_hf/common/upstream"


def test_each_private_attribute_of_another_library_is_checked():
    own = {name for _, tree in _modules() for name in _defined(tree)}
    listed = {name for names in upstream_trainers.FIELDS.values() for name in names}
    known = {*own, *_checked(), *listed, *upstream_trainers.CALLED, *STANDARD_LIBRARY}
    for path, tree in _modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _is_private(node.attr):
                assert node.attr in known, f"{path}:{node.lineno}: no module of lopt_hf/common/upstream checks it"


def test_torch_alone_is_enough_for_what_is_of_torch():
    tree = ast.parse((UPSTREAM / "torch.py").read_text())
    imports = (node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module)
    modules = {module.split(".")[0] for module in imports}
    assert modules <= {"collections", "contextlib", "typing", "torch", "lopt_hf"}


def _overrides(trainer: type) -> Iterator[tuple[str, type, type]]:
    """Names of methods, with our class that overrides and the parent whose method it is."""
    ours = [base for base in trainer.__mro__ if base.__module__.startswith("lopt_hf")]
    parents = [base for base in trainer.__mro__ if base.__module__.startswith(("transformers", "trl"))]
    for base in ours:
        for name, member in vars(base).items():
            if _is_private(name) and inspect.isfunction(member):
                yield from ((name, base, parent) for parent in parents if name in vars(parent))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_overrides_take_what_the_parent_takes(trainer: type):
    for name, base, parent in _overrides(trainer):
        ours, theirs = inspect.signature(getattr(base, name)), inspect.signature(getattr(parent, name))
        parameters = theirs.parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = [p for p in positional if p.default is p.empty]
        by_name = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
        ours.bind(*positional, **by_name)
        ours.bind(*required[:1], **{p.name: None for p in required[1:]})


def test_overridden_methods_are_listed():
    overridden = {name for trainer in TRAINERS for name, _, _ in _overrides(trainer)}
    assert overridden == {*upstream_trainers.OVERRIDDEN, *upstream_trainers.OVERRIDDEN_GRPO}


@pytest.mark.parametrize("parent", [transformers.Trainer, SFTTrainer, DPOTrainer, GRPOTrainer])
def test_parents_still_set_the_fields_that_ours_read(parent: type):
    sources = "".join(inspect.getsource(base) for base in parent.__mro__ if base is not object)
    for name in upstream_trainers.FIELDS[parent.__name__]:
        assert f"self.{name}" in sources or hasattr(parent, name), name


def test_a_name_that_is_gone_is_one_clear_line():
    upstream = Upstream("trl", "1.16", "1.17")
    with pytest.raises(ImportError) as missing, upstream.names():
        from trl.trainer.utils import _no_such_name  # noqa: F401
    with pytest.raises(ImportError) as lacking:
        upstream.check(SimpleNamespace(_here=1), "_here", "_not_here")
    for raised, name in ((missing, "_no_such_name"), (lacking, "_not_here")):
        message = str(raised.value)
        assert name in message and "_here'" not in message.replace("_not_here'", "")
        assert "\n" not in message and f"trl {version('trl')}" in message
        assert message.endswith("pip install 'trl>=1.16,<1.17'")
    assert version("trl") == trl.__version__
