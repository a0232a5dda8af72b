#!/usr/bin/env python3
"""What int8 and fp16 cost in accuracy: files for all sizes in ONNX Runtime and OpenVINO, on real images

The files are written by timm-rs export; ONNX Runtime runs them through timm_rs_runtime.Session, OpenVINO with fixed
sides (--openvino). int8 was calibrated on training images, accuracy is measured on validation images. Wanted: within
0.3 points of float32 at every size.

    timm-rs export MODEL -o float32.onnx
    timm-rs export MODEL -o fp16.onnx --precision fp16
    timm-rs export MODEL -o int8.onnx --quantize int8 --data-dir DIR
    python experiments/export_accuracy.py --model float32.onnx --others fp16.onnx int8.onnx --data-dir DIR --openvino

Writes results/export_accuracy.json: a row per size, file and runtime, with the command and the machine.
"""
import numpy as np
from _shared import add_deployed_arguments, create_parser, print_table, write_results

from timm_rs_runtime import Session
from timm_rs_runtime.fitting import label_folders
from timm_rs_runtime.images import split_folder


def main():
    parser = create_parser(__doc__)
    add_deployed_arguments(parser)
    parser.add_argument('--others', nargs='+', required=True, metavar='FILE.onnx',
                        help='files of the same network in int8 or fp16')
    parser.add_argument('--openvino', action='store_true', help='run the files in OpenVINO too')
    args = parser.parse_args()

    sessions = [Session(path, args.threads, decode='exact') for path in (args.model, *args.others)]
    images, labels = label_folders(split_folder(args.data_dir, args.split), sessions[0], args.most)
    rows = []
    for resolution in sessions[0].resolutions:
        runs = {(s.metadata['precision'], 'ONNX Runtime'): s.predict for s in sessions}
        if args.openvino:
            runs.update({
                (s.metadata['precision'], 'OpenVINO'): run_openvino(s.path, resolution, args.threads)
                for s in sessions})
        answers = {key: [] for key in runs}
        for image in images:
            batch = sessions[0].preprocess(image, resolution)[None]
            for key, run in runs.items():
                answers[key].append(int(run(batch).argmax()))
        expected = np.array(next(iter(answers.values())))
        reference = 100 * float((expected == labels).mean())
        for (precision, runtime), found in answers.items():
            top1 = 100 * float((np.array(found) == labels).mean())
            rows.append(dict(
                resolution=resolution, precision=precision, runtime=runtime, top1=round(top1, 2),
                difference=round(top1 - reference, 2), agreement=round(100 * float((expected == found).mean()), 2),
                images=len(images)))
            print(rows[-1], flush=True)
    print_table(list(rows[0]), rows)
    write_results(args, rows)


def run_openvino(path, resolution, threads):
    """Return what runs a file in OpenVINO, compiled for one image of a size."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([1, 3, resolution, resolution])
    compiled = core.compile_model(
        model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': threads})
    return lambda batch: compiled([batch])[0]


if __name__ == '__main__':
    main()
