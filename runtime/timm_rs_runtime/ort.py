"""ONNX Runtime, as far as it is used here

From 1.29 on it reports its use over the network, unless an environment variable forbids it before the import. Its
thread for that also keeps a process from ending that was forked after the import. timm_rs contacts nobody.
"""
import ctypes
import os
from typing import Dict, List, Optional, Union

import numpy as np

from . import fields
from .errors import UserError, one_line

os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')

import onnxruntime  # noqa: E402

__all__ = ['MAX_THREADS', 'InferenceError', 'abandon', 'open_onnx', 'run']

MAX_THREADS = 1024  # of an inference


class InferenceError(UserError, RuntimeError):
    """ONNX Runtime cannot run a network, for example for lack of memory."""


def open_onnx(
        model: Union[str, bytes],
        threads: Optional[int] = None,
        sizes: Optional[Dict[str, int]] = None,
        optimize: bool = True,
) -> onnxruntime.InferenceSession:
    """Open a model.

    Args:
        model: Name of a file, or its content.
        threads: Threads of an inference, at most MAX_THREADS, all cores if None.
        sizes: Height and width that all inputs will have.
        optimize: Let ONNX Runtime rewrite the graph.

    Raises:
        UserError: It is not an ONNX file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry('session.force_spinning_stop', '1')  # another size's threads take over
    if threads is not None:
        options.intra_op_num_threads = fields.check_argument('threads', threads, fields.integer(1, MAX_THREADS))
        if threads > (os.cpu_count() or 1):  # spinning threads would keep the others from working
            options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    try:
        return onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    except Exception as e:  # there is no common class of its errors
        name = model if isinstance(model, str) else 'This'
        raise UserError(f'{name} is not an ONNX file that ONNX Runtime can load: {one_line(e, 300)}') from e


def run(session: onnxruntime.InferenceSession, inputs: Dict[str, np.ndarray], name: str) -> List[np.ndarray]:
    """Return the outputs of a model.

    Args:
        session: The model.
        inputs: Arrays by name.
        name: The model's file, for the message.

    Raises:
        InferenceError: It cannot be run.
    """
    try:
        return session.run(None, inputs)
    except Exception as e:
        shapes = ', '.join(str(x.shape) for x in inputs.values())
        raise InferenceError(f'Cannot run a batch of {shapes} with {name}: {one_line(e, 300)}') from e


def abandon(session: onnxruntime.InferenceSession) -> None:
    """Never free a session, in a child of the process that opened it.

    Freeing it would wait for threads that only the parent has.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
