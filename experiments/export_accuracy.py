#!/usr/bin/env python3
"""What int8 and fp16 cost in accuracy: files for all sizes in ONNX Runtime, on real images

The files are written by timm-rs export. int8 was calibrated on training images, accuracy is measured on validation
images. Wanted: within 0.3 points of float32 at every size. tools/runtimes.py compares the answers of other runtimes.

    timm-rs export MODEL -o float32.onnx
    timm-rs export MODEL -o fp16.onnx --precision fp16
    timm-rs export MODEL -o int8.onnx --quantize int8 --data-dir DIR
    python experiments/export_accuracy.py --model float32.onnx --others fp16.onnx int8.onnx --data-dir DIR

Writes results/export_accuracy.json: a row per size and file, with the command and the machine.
"""
from _shared import add_deployed_arguments, create_parser, write_results

from timm_rs_runtime import Session
from timm_rs_runtime.fitting import collect_logits, label_folders
from timm_rs_runtime.images import split_folder


def main():
    parser = create_parser(__doc__)
    add_deployed_arguments(parser)
    parser.add_argument('--others', nargs='+', required=True, metavar='FILE.onnx',
                        help='files of the same network in int8 or fp16')
    args = parser.parse_args()
    sessions = [Session(path, args.threads, decode='exact') for path in (args.model, *args.others)]
    images, labels = label_folders(split_folder(args.data_dir, args.split), sessions[0], args.most)
    answers = [{r: x.argmax(-1) for r, x in collect_logits(s, images)[0].items()} for s in sessions]
    rows = []
    for resolution, expected in answers[0].items():
        reference = 100 * float((expected == labels).mean())
        for session, found in zip(sessions, answers):
            top1 = 100 * float((found[resolution] == labels).mean())
            rows.append(dict(
                resolution=resolution, precision=session.metadata['precision'], top1=round(top1, 2),
                difference=round(top1 - reference, 2),
                agreement=round(100 * float((expected == found[resolution]).mean()), 2), images=len(images)))
    write_results(args, rows)


if __name__ == '__main__':
    main()
