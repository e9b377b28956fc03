"""Makes the auto classes of `transformers` know RepL models, without importing `transformers` for it.

`import lopt_hf` stays cheap: they are registered when `transformers` loads its auto classes, or at once if it has.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["register_when_transformers_is_loaded"]

AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def _register() -> None:
    from lopt_hf.repl.configuration_dynamic import RepLModelConfig
    from lopt_hf.repl.configuration_repl import FoldedRepLConfig

    auto_config = sys.modules[AUTO_CONFIG].AutoConfig
    for config_class in (FoldedRepLConfig, RepLModelConfig):
        auto_config.register(config_class.model_type, config_class, exist_ok=True)


class _AutoConfigImporter(MetaPathFinder, Loader):
    """Finds one module, once, by asking the other finders, loads it as its own loader would, and registers then."""

    own_loader: Loader

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.own_loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own_loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.own_loader.exec_module(module)
        _register()


def register_when_transformers_is_loaded() -> None:
    """Registers now or later; calling it again does no harm."""
    if AUTO_CONFIG in sys.modules:
        _register()
    elif not any(isinstance(finder, _AutoConfigImporter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoConfigImporter())
