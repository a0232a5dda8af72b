"""Runs the ONNX files of `timm-rs export` at any of their resolutions; needs NumPy, Pillow and ONNX Runtime only"""
from .adaptive import AdaptiveSession, BudgetError, Prediction, QueueFullError
from .cascade import Cascade, CascadePrediction, CascadeSession
from .controller import Controller
from .errors import UserError
from .images import ImageError
from .lifetime import ClosedError
from .ort import InferenceError
from .preprocess import Preprocessing
from .session import NotFiniteError, Session
from .version import __version__

__all__ = [
    'AdaptiveSession',
    'BudgetError',
    'Cascade',
    'CascadePrediction',
    'CascadeSession',
    'ClosedError',
    'Controller',
    'ImageError',
    'InferenceError',
    'NotFiniteError',
    'Prediction',
    'Preprocessing',
    'QueueFullError',
    'Session',
    'UserError',
    '__version__',
]
