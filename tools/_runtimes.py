"""Runs one exported file in one runtime, in a process of its own: what crashes there ends only that

    python tools/_runtimes.py JOB.npz < JOB.json

A job names the runtime and the files; the arrays are inputs and expected logits of each size. What is found of each
size is printed as JSON, in the last line.
"""
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import numpy as np

__all__ = ['RUNTIMES', 'installed']

ROUNDS, WARM_UP, MOST_SECONDS = 40, 5, 4.
WEB_BUILD = Path(__file__).resolve().parents[1] / 'examples' / 'browser' / 'node_modules' / 'onnxruntime-web'

Run = Callable[[np.ndarray], np.ndarray]


def onnxruntime(path: str, size: Optional[int]) -> Run:
    os.environ['ORT_DISABLE_TELEMETRY'] = '1'
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for side in ('height', 'width') if size else ():
        options.add_free_dimension_override_by_name(side, size)
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda x: session.run(None, {'images': x})[0]


def openvino(path: str, size: Optional[int]) -> Run:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if size:
        model.reshape([1, 3, size, size])
    compiled = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1})
    return lambda x: compiled([x])[0]


def executorch(path: str, size: Optional[int]) -> Run:
    import torch
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method(f'forward_{size}')
    return lambda x: method.execute([torch.from_numpy(x)])[0].numpy().copy()


def litert(path: str, size: Optional[int]) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(path, num_threads=1).get_signature_runner(f'forward_{size}')
    return lambda x: run(images=x)['logits']


def reference(path: str, size: Optional[int]) -> Run:
    import onnx.version_converter
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    if any(node.op_type == 'DequantizeLinear' for node in model.graph.node):
        model = onnx.version_converter.convert_version(model, 21)  # it has none of operator set 17
    evaluator = ReferenceEvaluator(model)
    return lambda x: evaluator.run(None, {'images': x})[0]


def mnn(path: str, size: Optional[int]) -> Run:
    import _tools  # of MNN; its command mnnconvert installs a package, to report each use over the network
    import MNN.expr as expr
    import MNN.nn

    converted = f'{path}.mnn'
    if not os.path.exists(converted):
        _tools.mnnconvert(['', '-f', 'ONNX', '--modelFile', path, '--MNNModel', converted, '--bizCode', 'timm_rs'])
    manager = MNN.nn.create_runtime_manager(({'backend': 'CPU', 'numThread': 1},))
    network = MNN.nn.load_module_from_file(converted, ['images'], ['logits'], runtime_manager=manager)

    def run(x):
        output = network.forward([expr.const(x, list(x.shape), expr.NCHW)])
        return np.array(expr.convert(output[0] if isinstance(output, list) else output, expr.NCHW).read())
    return run


def tract(path: str, size: Optional[int]) -> Run:
    import tract

    network = tract.onnx().load(path)
    if size:
        network.set_input_fact(0, f'1,3,{size},{size},f32')
    runnable = network.into_model().into_runnable()
    return lambda x: runnable.run([x])[0].to_numpy()


def ncnn(path: str, size: Optional[int]) -> Run:
    import ncnn

    folder = Path(f'{path}-{size}')
    if not folder.exists():
        folder.mkdir()
        (folder / 'model.onnx').write_bytes(Path(path).read_bytes())
        subprocess.run(
            ['pnnx', 'model.onnx', f'inputshape=[1,3,{size},{size}]', 'fp16=0'], cwd=folder, check=True,
            capture_output=True)
    network = ncnn.Net()
    network.opt.num_threads = 1
    if network.load_param(str(folder / 'model.ncnn.param')) or network.load_model(str(folder / 'model.ncnn.bin')):
        raise ValueError('ncnn does not load what pnnx wrote')

    def run(x):
        extractor = network.create_extractor()
        extractor.input('in0', ncnn.Mat(x[0]).clone())
        return np.array(extractor.extract('out0')[1])[None]
    return run


def opencv(path: str, size: Optional[int]) -> Run:
    import cv2

    cv2.setNumThreads(1)
    network = cv2.dnn.readNetFromONNX(path)

    def run(x):
        network.setInput(x)
        return network.forward().copy()
    return run


def onnx2torch(path: str, size: Optional[int]) -> Run:
    import torch
    from onnx2torch import convert

    torch.set_num_threads(1)
    network = convert(path).eval()

    def run(x):
        with torch.inference_mode():
            return network(torch.from_numpy(x)).numpy()
    return run


def iree(path: str, size: Optional[int]) -> Run:
    import iree.compiler.tools
    import iree.runtime

    compiled = f'{path}.vmfb'
    if not os.path.exists(compiled):
        code = f'{path}.mlir'
        subprocess.run(['iree-import-onnx', path, '-o', code, '--opset-version', '17'], check=True, capture_output=True)
        iree.compiler.tools.compile_file(
            code, input_type='onnx', target_backends=['llvm-cpu'], output_file=compiled,
            extra_args=['--iree-llvmcpu-target-cpu=host'])
    module = iree.runtime.load_vm_flatbuffer_file(compiled, driver='local-sync')
    (name,) = [name for name in module.vm_module.function_names if '$' not in name and '__' not in name]
    main = getattr(module, name)
    return lambda x: np.asarray(main(x).to_host())


# name: package, what opens a file, whether for one size
RUNTIMES = {
    'ONNX Runtime, any size': ('onnxruntime', onnxruntime, False),
    'ONNX Runtime, fixed size': ('onnxruntime', onnxruntime, True),
    'ONNX Runtime Web in Node.js, fixed size': ('onnxruntime-web', None, True),
    'OpenVINO, any size': ('openvino', openvino, False),
    'OpenVINO, fixed size': ('openvino', openvino, True),
    'ExecuTorch': ('executorch', executorch, True),
    'LiteRT': ('litert-torch', litert, True),
    "ONNX's reference evaluator": ('onnx', reference, False),
    'MNN': ('MNN', mnn, False),
    'tract, any size': ('tract', tract, False),
    'tract, fixed size': ('tract', tract, True),
    'ncnn, converted by pnnx for each size': ('ncnn', ncnn, True),
    'OpenCV': ('opencv-python-headless', opencv, False),
    'onnx2torch': ('onnx2torch', onnx2torch, False),
    'IREE': ('iree-base-runtime', iree, False),
}


def measure(open_file: Callable, fixed: bool, job: Dict[str, Any], arrays: Any) -> Dict[int, Any]:
    """Return logits and latency of each size, see the table's columns; an error instead where there is one."""
    found, run = {}, None
    for size in job['sizes']:
        try:
            if fixed or run is None:
                run = open_file(job['file'], size if fixed else None)
            inputs = arrays[f'inputs_{size}'][:, None]
            logits = [run(inputs[0])]
            start = time.perf_counter()
            while len(logits) < len(inputs) and time.perf_counter() - start < MOST_SECONDS:
                logits.append(run(inputs[len(logits)]))
            logits = np.concatenate(logits)
        except Exception as e:  # of any class
            found[size] = dict(problem=' '.join(f'{type(e).__name__}: {e}'.split()))
            continue
        found[size] = dict(logits=logits.astype(float).tolist())
        try:
            if str(size) in job['plain']:
                one = open_file(job['plain'][str(size)], size if fixed else None)
                found[size]['latency'] = latency(run, one, inputs[0])
        except Exception as e:  # the plain file is not taken: there is nothing to compare with
            print(f'plain file: {e}', file=sys.stderr)
    return found


def latency(run: Run, one: Run, x: np.ndarray) -> float:
    """Return the median ratio of CPU times of both, which run in turns."""
    ratios, end = [], time.perf_counter() + MOST_SECONDS
    for i in range(WARM_UP + ROUNDS):
        times = []
        for call in (run, one):
            start = time.process_time()
            call(x)
            times.append(time.process_time() - start)
        if i >= WARM_UP:
            ratios.append(times[0] / times[1])
        if ratios and time.perf_counter() > end:
            break
    return statistics.median(ratios)


_NODE = '''
import fs from 'node:fs';
const [build, file, folder, settings] = process.argv.slice(1);
const ort = await import(build);
const {plain, rounds, warmUp} = JSON.parse(settings);
const open = (name, size) => ort.InferenceSession.create(
  new Uint8Array(fs.readFileSync(name)), {freeDimensionOverrides: {height: size, width: size}});
const found = {};
for (const [text, name] of Object.entries(plain)) {
  const size = Number(text);
  try {
    const [all, one] = [await open(file, size), await open(name, size)];
    const values = new Float32Array(new Uint8Array(fs.readFileSync(`${folder}/${size}`)).buffer);
    const length = 3 * size * size, logits = [], ratios = [];
    const input = (i) => ({images: new ort.Tensor(
      'float32', values.subarray(i * length, (i + 1) * length), [1, 3, size, size])});
    for (let i = 0; i < values.length / length; i++) logits.push(Array.from((await all.run(input(i))).logits.data));
    for (let i = 0; i < warmUp + rounds; i++) {
      const times = [];
      for (const session of [all, one]) {
        const start = process.cpuUsage();
        await session.run(input(0));
        const {user, system} = process.cpuUsage(start);
        times.push(user + system);
      }
      if (i >= warmUp) ratios.push(times[0] / times[1]);
    }
    found[text] = {logits, latency: ratios.sort((a, b) => a - b)[ratios.length >> 1]};
  } catch (e) {
    found[text] = {problem: String(e.message ?? e)};
  }
}
console.log(JSON.stringify(found));
'''


def measure_in_node(job: Dict[str, Any], arrays: Any, folder: str) -> Dict[int, Any]:
    for size in job['plain']:
        arrays[f'inputs_{size}'].tofile(os.path.join(folder, size))
    build = (WEB_BUILD / 'dist' / 'ort.node.min.mjs').as_uri()
    settings = dict(plain=job['plain'], rounds=ROUNDS, warmUp=4 * WARM_UP)
    done = subprocess.run(
        ['node', '--input-type=module', '-e', _NODE, build, job['file'], folder, json.dumps(settings)],
        capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {
        size: dict(problem=done.stderr.strip()) for size in job['plain']}


def installed(runtime: str) -> Optional[str]:
    """Return the version of a runtime, None if it is not installed."""
    package, open_file, _ = RUNTIMES[runtime]
    try:
        return version(package) if open_file else json.loads((WEB_BUILD / 'package.json').read_text())['version']
    except (PackageNotFoundError, OSError):
        return None


def main():
    job, arrays = json.load(sys.stdin), np.load(sys.argv[1])
    _, open_file, fixed = RUNTIMES[job['runtime']]
    if open_file is None:
        found = measure_in_node(job, arrays, os.path.dirname(sys.argv[1]))
    else:
        found = measure(open_file, fixed, job, arrays)
    print('\n' + json.dumps(found))


if __name__ == '__main__':
    main()
