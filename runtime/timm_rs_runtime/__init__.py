"""Deployment: one ONNX file for all resolutions, and what runs it

What is imported here needs NumPy, Pillow and ONNX Runtime alone. Writing such a file (timm_rs.export.export) needs
torch and timm.
"""
from .adaptive import AdaptiveSession, Controller, Prediction, QueueFullError
from .cascade import Cascade, CascadePrediction, CascadeSession
from .images import ImageError
from .preprocess import Preprocessing
from .session import Session

__all__ = [
    'AdaptiveSession',
    'Cascade',
    'CascadePrediction',
    'CascadeSession',
    'Controller',
    'ImageError',
    'Prediction',
    'Preprocessing',
    'QueueFullError',
    'Session',
]
