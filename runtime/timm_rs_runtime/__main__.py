"""python -m timm_rs_runtime"""
from .commands import COMMANDS, run_command

if __name__ == '__main__':
    run_command(
        'python -m timm_rs_runtime', 'Runs the ONNX files of timm-rs export.', {'timm_rs_runtime.commands': COMMANDS})
