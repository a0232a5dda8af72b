#!/usr/bin/env python3
"""What int8 costs in accuracy: one file for all sizes in float32 and in int8, on real images

Both files are written by timm_rs.export.export and run by timm_rs_runtime.Session. Activations are calibrated on
training images, accuracy is measured on validation images. Folders are classes: named by WordNet id for a network of
the 1,000 ImageNet classes, else in the order of the network's classes. Wanted: within 1 point of float32 at every size.

    python experiments/int8_accuracy.py CHECKPOINT --model mobilenetv2_100 --model-kwargs pad_type=same \
        --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --interpolation bilinear --crop-pct 1.0 \
        --train DIR --val DIR DIR --val-glob 'ILSVRC2012_val_*'

Writes results/int8_accuracy.json: a row per size, with the command and the machine.
"""
import fnmatch
import os
import tempfile

import numpy as np
import torch
from _shared import create_parser, print_table, write_results
from timm.data import ImageNetInfo
from timm.utils import ParseKwargs

from timm_rs.export.export import export_int8, export_switchable
from timm_rs.load import load_model
from timm_rs_runtime import Session
from timm_rs_runtime.images import find_images, split_folder

COLUMNS = ('resolution', 'float32_top1', 'int8_top1', 'difference', 'agreement', 'images')


def main():
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('checkpoint', help='checkpoint or model folder, as timm-rs export takes it')
    add('--model', help='name of the network, where the checkpoint does not tell')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    add('--resolutions', type=int, nargs='+')
    add('--mean', type=float, nargs='+')
    add('--std', type=float, nargs='+')
    add('--interpolation')
    add('--crop-pct', type=float)
    add('--train', required=True, help='folder of images to calibrate on')
    add('--val', required=True, nargs='+', help='folders of class folders of images to evaluate on')
    add('--val-glob', default='*', help='names of the images to evaluate on')
    add('--images', type=int, default=128, help='images to calibrate on (default: %(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = {k: getattr(args, k) for k in ('mean', 'std', 'interpolation', 'crop_pct') if getattr(args, k)}
    model = load_model(
        args.checkpoint, args.model, args.resolutions, model_kwargs=args.model_kwargs, data_config=data).model
    images = [p for folder in args.val for p in find_images(split_folder(folder, 'val'))
              if fnmatch.fnmatch(os.path.basename(p), args.val_glob)]
    labels = label(images, model.num_classes)
    evaluated = set(images)
    train = [p for p in find_images(split_folder(args.train, 'train')) if p not in evaluated]
    train = [train[i * len(train) // args.images] for i in range(args.images)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        export_switchable(model, f'{folder}/float32.onnx')
        export_int8(model, f'{folder}/int8.onnx', train)
        sessions = [Session(f'{folder}/{kind}.onnx', threads=1) for kind in ('float32', 'int8')]
        for resolution in model.resolutions:
            rows.append(evaluate(sessions, images, labels, resolution))
            print(rows[-1], flush=True)
    print_table(COLUMNS, rows)
    write_results(args, rows)


def label(images, num_classes):
    """Return the class of each image by its folder."""
    folders = [os.path.basename(os.path.dirname(image)) for image in images]
    names = ImageNetInfo().label_names() if num_classes == 1000 else sorted(set(folders))
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[folder] for folder in folders])


def evaluate(sessions, images, labels, resolution):
    """Return the row of one size."""
    answers = [[] for _ in sessions]
    for image in images:
        batch = sessions[0].preprocess(image, resolution)[None]
        for session, answer in zip(sessions, answers):
            answer.append(int(session.predict(batch).argmax()))
    float32, int8 = (100 * float(np.mean(np.array(a) == labels)) for a in answers)
    return dict(
        resolution=resolution,
        float32_top1=round(float32, 2),
        int8_top1=round(int8, 2),
        difference=round(int8 - float32, 2),
        agreement=round(100 * float(np.mean(np.array(answers[0]) == np.array(answers[1]))), 2),
        images=len(images),
    )


if __name__ == '__main__':
    main()
