#!/usr/bin/env python3
"""Smaller sizes for a network of 1000 classes, taught without labels by photographs of other things

A switchable network whose sizes have the BatchNorms of the largest one is tuned at a smaller size. Only the weight and
bias of that size's BatchNorms learn, by AdamW with a cosine schedule, from the answers of the network at its largest
size, so this stays as it is. It is judged on validation photographs of ImageNet in folders named by WordNet ids: top-1
among 1000 classes, none of which the photographs for tuning are chosen for.

    python experiments/label_free.py --model local-dir:FOLDER --train DIR --test DIR --sizes 96

--test takes the images whose names begin with ILSVRC2012_val, so that none of them is one that the network was trained
with. Variants that are in --output already are not repeated. `kl` is the divergence from the answers at the largest
size, and `agree` the share of equal answers, on photographs from --train that do not teach.
"""
import csv
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from _shared import create_parser
from PIL import Image
from timm.data import create_transform

from timm_rs import PrivateBN
from timm_rs.data.datasets import imagenet_classes
from timm_rs.data.resample import downscale

VARIANTS = {'as it is': (0, 0.), 'one pass': (1, 1e-3), 'two passes, rate 5e-3': (2, 5e-3)}  # passes, rate
COLUMNS = (
    'size', 'variant', 'photographs', 'steps', 'lr', 'top1', 'kl', 'agree', 'test_images', 'seconds')


def main():
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('--model', required=True, help='switchable network of 1000 classes, e.g. local-dir:FOLDER')
    add('--train', required=True, metavar='DIR', help='photographs that teach, in any folders')
    add('--test', required=True, metavar='DIR', help='validation photographs of ImageNet, in folders of WordNet ids')
    add('--test-crop-pct', type=float, default=1., metavar='P', help='crop of the test photographs (default: 1)')
    add('--sizes', type=int, nargs='+', default=[96], metavar='N', help='sizes to teach (default: 96)')
    add('--variants', nargs='+', default=list(VARIANTS), choices=VARIANTS, help='what to try (default: all)')
    add('--photographs', type=int, default=3200, metavar='N', help='for tuning (default: %(default)s)')
    add('--held-out', type=int, default=256, metavar='N', help='photographs to compare answers on (default: 256)')
    add('-b', '--batch-size', type=int, default=64, metavar='N', help='images (default: %(default)s)')
    add('--cache', type=Path, default=Path('output/label_free'), metavar='DIR', help='decoded images and answers')
    parser.set_defaults(output=Path('results/label_free_1000.csv'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = timm.create_model(args.model, pretrained=True).eval()
    model.requires_grad_(False)
    rows = list(csv.DictReader(args.output.open())) if args.output.exists() else []
    for size in args.sizes:
        for variant in args.variants:
            done = [r for r in rows if (r['size'], r['variant']) == (str(size), variant)]
            if not done:
                done = [run(args, model, size, variant)]
                rows += done
                with args.output.open('w', newline='') as f:
                    writer = csv.DictWriter(f, COLUMNS)
                    writer.writeheader()
                    writer.writerows(rows)
                print(*done[0].values(), flush=True)


def run(args, model, size, variant):
    """Tune a copy of the BatchNorms of one size and return a row of the table."""
    passes, lr = VARIANTS[variant]
    images, answers = cached(args, 'train', lambda: answer(args, model, slice(args.photographs)))
    layers = [m for m in model.modules() if isinstance(m, PrivateBN)]
    for layer in layers:
        layer[size].load_state_dict(layer[model.resolutions[0]].state_dict())
    start = time.process_time()
    steps = passes * (len(images) // args.batch_size)
    if steps:
        tune(args, model, layers, size, images, answers, lr, steps)
    seconds = time.process_time() - start
    top1 = test(args, model, size)
    kl, agree = compare(args, model, size)
    return dict(
        size=size, variant=variant, photographs=len(images) if steps else 0, steps=steps, lr=lr or '', top1=top1,
        kl=round(kl, 4), agree=round(agree, 1), test_images=len(cached(args, f'test_{size}', None)[1]),
        seconds=round(seconds))


def tune(args, model, layers, size, images, answers, lr, steps):
    parameters = [p for layer in layers for p in layer[size].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    network = model.at(size)
    for p in parameters:
        p.requires_grad_(True)
    for step in range(steps):
        place = step % (len(images) // args.batch_size) * args.batch_size
        if not place:
            order = torch.randperm(len(images), generator=generator)
        index = order[place:place + args.batch_size]
        logits = network(shrink(args, model, images[index], size))
        log_p, log_q = (F.log_softmax(z, dim=-1) for z in (answers[index].float(), logits))
        loss = F.kl_div(log_q, log_p, reduction='batchmean', log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            print(f'  {size} px, step {step} of {steps}: {loss.item():.3f}', flush=True)
    for p in parameters:
        p.requires_grad_(False)


def shrink(args, model, images, size):
    """Return uint8 images of the largest size as the network's input of a size."""
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    x = downscale((images.float() / 255 - mean) / std, size, config['interpolation'])
    return x.contiguous(memory_format=torch.channels_last)


def cached(args, name, make):
    path = args.cache / f'{name}.pt'
    if not path.exists():
        args.cache.mkdir(parents=True, exist_ok=True)
        torch.save(make(), path)
    return torch.load(path, mmap=True)


@torch.no_grad()
def answer(args, model, part):
    """Return photographs of --train, and the logits for them at the largest size."""
    paths = sorted(Path(args.train).rglob('*.jp*g'))
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))[part].tolist()
    images = read(model, [paths[i] for i in order], model.resolutions[0], model.pretrained_cfg['crop_pct'])
    network = model.at(model.resolutions[0])
    logits = [network(shrink(args, model, batch, model.resolutions[0])) for batch in images.split(32)]
    return images, torch.cat(logits).half()


def read(model, paths, size, crop_pct):
    """Return images as uint8 [N, 3, size, size]."""
    transform = create_transform(
        size, interpolation=model.pretrained_cfg['interpolation'], crop_pct=crop_pct, use_prefetcher=True)
    return torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])


def compare(args, model, size):
    """Return the divergence from the answers at the largest size on photographs that do not teach, and agreement."""
    images, target = cached(args, 'held_out', lambda: answer(args, model, slice(-args.held_out, None)))
    with torch.no_grad():
        logits = torch.cat([model.at(size)(shrink(args, model, batch, size)) for batch in images.split(64)])
    log_p, log_q = (F.log_softmax(z.float(), dim=-1) for z in (target, logits))
    kl = F.kl_div(log_q, log_p, reduction='batchmean', log_target=True)
    return kl.item(), 100 * (target.argmax(1) == logits.argmax(1)).double().mean().item()


def test(args, model, size):
    """Return top-1 in percent among 1000 classes."""
    def make():
        ids, _ = imagenet_classes(1000)
        paths = sorted(Path(args.test).rglob('ILSVRC2012_val*'))
        return read(model, paths, size, args.test_crop_pct), torch.tensor([ids.index(p.parent.name) for p in paths])

    images, target = cached(args, f'test_{size}', make)
    with torch.no_grad():
        logits = torch.cat([model.at(size)(shrink(args, model, batch, size)) for batch in images.split(64)])
    return round(100 * (logits.argmax(1) == target).double().mean().item(), 2)


if __name__ == '__main__':
    main()
