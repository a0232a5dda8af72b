"""Networks as files that run without timm"""
from .export import ExportError, export_int8, export_resolution, export_switchable

__all__ = ['ExportError', 'export_int8', 'export_resolution', 'export_switchable']
