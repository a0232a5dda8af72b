#!/usr/bin/env python3
"""What int8 costs in accuracy: one file for all sizes in float32 and in int8, on real images

Both files are written by timm-rs export and run by timm_rs_runtime.Session; int8 was calibrated on training images,
accuracy is measured on validation images. Wanted: within 1 point of float32 at every size.

    timm-rs export MODEL -o float32.onnx
    timm-rs export MODEL -o int8.onnx --quantize int8 --data-dir DIR
    python experiments/int8_accuracy.py --model float32.onnx --int8 int8.onnx --data-dir DIR

Writes results/int8_accuracy.json: a row per size, with the command and the machine.
"""
import numpy as np
from _shared import add_deployed_arguments, create_parser, print_table, write_results

from timm_rs_runtime import Session
from timm_rs_runtime.fitting import label_folders
from timm_rs_runtime.images import split_folder


def main():
    parser = create_parser(__doc__)
    add_deployed_arguments(parser)
    parser.add_argument('--int8', required=True, metavar='FILE.onnx', help='file of timm-rs export --quantize int8')
    args = parser.parse_args()

    sessions = [Session(path, args.threads, decode='exact') for path in (args.model, args.int8)]
    images, labels = label_folders(split_folder(args.data_dir, args.split), sessions[0], args.most)
    rows = []
    for resolution in sessions[0].resolutions:
        answers = np.array([
            [int(session.predict(image, resolution).argmax()) for image in images] for session in sessions])
        float32, int8 = (100 * (answers == labels).mean(1)).tolist()
        rows.append(dict(
            resolution=resolution, float32_top1=round(float32, 2), int8_top1=round(int8, 2),
            difference=round(int8 - float32, 2), agreement=round(100 * float((answers[0] == answers[1]).mean()), 2),
            images=len(images)))
        print(rows[-1], flush=True)
    print_table(list(rows[0]), rows)
    write_results(args, rows)


if __name__ == '__main__':
    main()
