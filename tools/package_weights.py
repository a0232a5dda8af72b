#!/usr/bin/env python3
"""Put a trained network into the package, with its configuration and its card

    python validate_rs.py DIR --model rs_resnet10t --checkpoint FILE --resolutions 48 40 32 24 --num-classes 10 \
        --crop-pct 1 --interpolation bilinear --results-file metrics.json
    python tools/package_weights.py FILE --model rs_resnet10t --tag imagenette --resolutions 48 40 32 24 \
        --data-dir DIR --metrics metrics.json --recipe 'python benchmarks/paper_table.py ...'

Writes into timm_rs/models/weights: <model>.<tag>.safetensors in half precision, .json, what create_model has to know,
and .md.
"""
import argparse
import json
import os
import textwrap
from pathlib import Path

import timm
from safetensors.torch import save_file
from timm.data import ImageNetInfo

import timm_rs
from timm_rs.checkpoint import read_checkpoint
from timm_rs.evaluate import ENSEMBLE, count_madds, count_parameters
from timm_rs.hub.push import read_metrics
from timm_rs_runtime.files import atomic_path, atomic_write

FOLDER = Path(timm_rs.__file__).parent / 'models' / 'weights'


def main():
    parser = argparse.ArgumentParser(description='Put a trained network into the package.')
    add = parser.add_argument
    add('weights', metavar='FILE', help='state dict of the network')
    add('--model', required=True, metavar='NAME', help='rs_* model')
    add('--tag', required=True, metavar='NAME', help='data set that it was trained on')
    add('--resolutions', type=int, nargs='+', required=True, metavar='N')
    add('--data-dir', required=True, metavar='DIR', help='its train/ names the classes, by WordNet id')
    add('--metrics', required=True, metavar='FILE', help='results of validate_rs.py')
    add('--recipe', required=True, metavar='COMMAND', help='command that trained it')
    args = parser.parse_args()

    name = f'{args.model}.{args.tag}'
    info, synsets = ImageNetInfo(), sorted(p.name for p in Path(args.data_dir, 'train').iterdir())
    labels = [info.label_name_to_description(s).split(',')[0] for s in synsets]
    weights = read_checkpoint(args.weights).state_dict
    model = timm.create_model(args.model, num_classes=len(labels), resolutions=args.resolutions)
    place = {k: model.pretrained_cfg[k] for k in ('first_conv', 'classifier')}
    FOLDER.mkdir(exist_ok=True)
    with atomic_path(FOLDER / f'{name}.safetensors', overwrite=True) as partial:
        save_file(
            {k: v.half().contiguous() if v.is_floating_point() else v for k, v in weights.items()},
            partial, metadata=dict(format='pt'))
        os.chmod(partial, 0o644)
    records = dict(
        resolutions=sorted(args.resolutions, reverse=True),
        pretrained_cfg=dict(
            num_classes=len(labels), input_size=(3, *[max(args.resolutions)] * 2), pool_size=None,
            interpolation='bilinear', crop_pct=1., mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
            label_names=labels, license='apache-2.0', **place))
    with atomic_write(FOLDER / f'{name}.json', overwrite=True) as f:
        f.write(json.dumps(records, indent=2) + '\n')
    with atomic_write(FOLDER / f'{name}.md', overwrite=True) as f:
        f.write(card(name, model, labels, read_metrics(args.metrics), args))
    print(f'{name}: {(FOLDER / f"{name}.safetensors").stat().st_size / 1e6:.1f} MB')


def card(name, model, labels, metrics, args):
    text = textwrap.fill(
        f'A Resolution Switchable Network with {count_parameters(model) / 1e6:.2f} million parameters, trained from '
        f'scratch on {args.tag.capitalize()} only, to try things out offline. It knows {len(labels)} classes: '
        f"{', '.join(labels)}.", 120)
    madds = {r: count_madds(model, r) / 1e6 for r in model.resolutions}
    madds[ENSEMBLE] = sum(madds.values())
    rows = '\n'.join(
        f"| {'ensemble' if key == ENSEMBLE else f'{key} px'} | {row['top1']:.2f} | {row['top5']:.2f} | "
        f"{madds[key]:.1f} |"
        for key, row in metrics.items())
    command = ' \\\n    '.join(textwrap.wrap(args.recipe, 114, break_on_hyphens=False, break_long_words=False))
    return f"""\
# {name}

{text}

| size | top-1 (%) | top-5 (%) | millions of MAdds |
|---|---|---|---|
{rows}

Whole validation images at each size (`crop_pct` 1), weights in half precision. Trained by

```
{command}
```
"""


if __name__ == '__main__':
    main()
