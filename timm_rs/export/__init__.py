"""Networks as files that run without timm"""
from .export import (
    export_coreml,
    export_executorch,
    export_int8,
    export_litert,
    export_resolution,
    export_switchable,
)
from .trace import ExportError

__all__ = [
    'ExportError', 'export_coreml', 'export_executorch', 'export_int8', 'export_litert', 'export_resolution',
    'export_switchable']
