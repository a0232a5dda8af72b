"""timm-rs calibrate"""
import argparse
import logging

from timm_rs_runtime.commands.images import add_images, print_read
from timm_rs_runtime.errors import UserError
from timm_rs_runtime.fields import check_argument, integer
from timm_rs_runtime.files import check_new_folder

from ._source import add_source, load, print_saved, read_labels

METHODS = ('copy', 'statistics', 'tune_bn', 'tune_bn_head')  # as in timm_rs.calibrate, which takes seconds to import

EXAMPLES = ['model --resolution 208 --data-dir DIR --output model-208']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    add = parser.add_argument
    add('--resolution', type=int, required=True, metavar='N', help='new input size in pixels')
    add_images(parser, 'images to calibrate on; labels are not used', 'train', 5000)
    add('--test-split', default='', metavar='NAME', help='labelled split to measure the accuracy on, before and after')
    add('--dataset', default='', metavar='NAME', help='kind of data set: "", "digits", or <type>/<name> as in timm')
    add('--input-key', metavar='KEY', help='field of the image in a data set hfds/...')
    add('--target-key', metavar='KEY', help='field of the label, or of the labels of a network of several')
    add('--target-format', choices=('indices', 'multihot'), help='of several labels (default: indices)')
    add('--method', default='tune_bn', choices=METHODS, help='default: %(default)s')
    add('--epochs', type=int, default=2, metavar='N', help='passes over the images (default: %(default)s)')
    add('--lr', type=float, default=1e-3, metavar='LR', help='learning rate (default: %(default)s)')
    add('--batch-size', type=int, default=64, metavar='N', help='images per batch (default: %(default)s)')
    add('--workers', type=int, default=4, metavar='N', help='loader processes (default: %(default)s)')
    add('--device', default='cuda', help='device to run on; without a GPU the CPU is used (default: cuda)')
    add('-o', '--output', required=True, metavar='DIR', help='folder to make')


def run(args: argparse.Namespace) -> None:
    import torch
    from timm.data import create_transform
    from timm.data.model_config import resolve_input_data_config

    from timm_rs.calibrate import add_resolution
    from timm_rs.data.classes import check_labels, count_classes, encode_labels, explain_labels, number_classes
    from timm_rs.data.datasets import choose_img_mode, create_dataset
    from timm_rs.data.readers import CheckedLoader, ReadableDataset
    from timm_rs.hub.convert import save_model
    from timm_rs.train.faults import open_device
    from timm_rs_runtime.unreadable import ReadErrors

    check_new_folder(args.output)
    check_argument('--images', args.images, integer(1, 10 ** 9))
    labels = read_labels(args)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        args.device = 'cpu'
    device = open_device(args)
    model = load(args).model.to(device)
    config = resolve_input_data_config(model)
    size = max(args.resolution, model.resolutions[0])
    channels = config.pop('input_size')[0]
    has_several_labels = model.multilabel_threshold is not None

    def open_images(split, most, then, stand_in):
        dataset = create_dataset(
            args.dataset, args.data_dir, split, input_img_mode=choose_img_mode(channels), input_key=args.input_key,
            target_key=args.target_key, target_format=args.target_format)
        if has_several_labels and (args.dataset or split == args.test_split):
            encode_labels(dataset, model.num_classes, args.target_format)
        dataset.transform = create_transform((channels, size, size), is_training=False, **config)
        if isinstance(dataset, torch.utils.data.IterableDataset):
            raise UserError(f'--dataset {args.dataset} is a stream, expected a folder, digits or hfds/...')
        errors = ReadErrors(args.max_unreadable, then)
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:most]
        readable = torch.utils.data.Subset(ReadableDataset(dataset, errors, stand_in=stand_in), chosen.tolist())
        return dataset, CheckedLoader(readable, errors, batch_size=args.batch_size, num_workers=args.workers)

    loader = test_loader = None
    if args.method != 'copy':
        dataset, loader = open_images(args.split, args.images, 'another one stands in for it', True)
    if args.test_split:
        test_set, test_loader = open_images(args.test_split, None, 'it is left out', False)
        if not has_several_labels and count_classes(test_set) != model.num_classes:
            raise UserError(
                f'--test-split {args.test_split} has {count_classes(test_set) or "no"} classes, the model has '
                f'{model.num_classes}.')
        differ = explain_labels(number_classes(test_set), labels or model.pretrained_cfg.get('label_names'))
        if differ:
            raise UserError(f'--test-split {args.test_split} has other classes than the model: {differ}.')
        check_labels(test_set, model.num_classes)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    add_resolution(model, args.resolution, loader, args.method, epochs=args.epochs, lr=args.lr, test_loader=test_loader)
    if loader is not None:
        unreadable = len(loader.errors.names)
        print_read(len(loader.dataset) - unreadable, unreadable, dataset.source)
    save_model(model.cpu(), args.output, labels)
    print_saved(args.output, model, ' '.join(map(str, model.resolutions)))
