"""Registration with timm, without importing timm

Importing timm takes seconds and needs torch, which a deployed model (timm_rs.deploy) does without. So the rs_* models
are registered as soon as timm is imported: at once where it is there already, else by whoever imports it.
"""
import importlib
import sys
from typing import Any, Optional

__all__ = ['register_with_timm']


def register_with_timm() -> None:
    """Register the rs_* models now, if timm is imported, or when it will be."""
    if 'timm' in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _TimmFinder())


def _register() -> None:
    importlib.import_module('.rs_models', __package__)


class _TimmFinder:
    """Finds timm as the finders after it do, and lets its loader register our models in the end."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[Any]:
        if name != 'timm':
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, 'find_spec'))
        spec = next((s for s in (f.find_spec(name, path, target) for f in others) if s is not None), None)
        if spec is not None and hasattr(spec.loader, 'exec_module'):
            load = spec.loader.exec_module

            def load_and_register(module: Any) -> None:
                load(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _register()

            spec.loader.exec_module = load_and_register
        return spec
