"""The console command timm-rs

A sub-command is a row of COMMANDS: its name, one line of help, a function that adds its arguments and one that runs it.
What only one of them needs is imported where it runs.
"""
import argparse
import os
import shlex
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence

from timm_rs.version import __version__
from timm_rs_runtime.errors import OneLineParser, UserError, one_line_errors
from timm_rs_runtime.files import check_new_file, check_new_folder

__all__ = ['COMMANDS', 'Command', 'main']


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        name: Its name.
        help: One line on what it does.
        add_arguments: Adds its arguments to a parser.
        run: Does it; what it raises becomes one line on stderr.
    """
    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _add_source(parser: argparse.ArgumentParser) -> None:
    from timm.utils import ParseKwargs

    add = parser.add_argument
    add('checkpoint', metavar='CHECKPOINT',
        help="file of train_rs.py, of timm or of the authors' code, folder with config.json, hf-hub:user/name, or "
             'name of a pretrained rs_* model')
    add('--model', metavar='NAME', help='name of an rs_* model (default: what the checkpoint tells)')
    add('--resolutions', type=int, nargs='+', metavar='N',
        help='input sizes in pixels (default: what the checkpoint tells, else 224 192 160 128 96)')
    add('--num-classes', type=int, metavar='N', help='number of classes (default: what the checkpoint tells)')
    add('--use-ema', action='store_true', help='take the moving average of the weights')
    add('--label-names', metavar='FILE', help='names of the classes in their order, one a line')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='further model arguments as key=value')
    add('--mean', type=float, nargs='+', metavar='MEAN', help='pixel mean that the weights were trained with')
    add('--std', type=float, nargs='+', metavar='STD', help='pixel standard deviation that they were trained with')
    add('--interpolation', metavar='NAME', help='interpolation of the images')
    add('--crop-pct', type=float, metavar='PCT', help='share of the image that is cropped')


def _load(args: argparse.Namespace) -> Any:
    """Load the checkpoint that the arguments of _add_source tell."""
    from timm_rs.hub.convert import load_model

    data = {k: getattr(args, k) for k in ('mean', 'std', 'interpolation', 'crop_pct')}
    return load_model(
        args.checkpoint,
        args.model,
        args.resolutions,
        args.num_classes,
        args.use_ema,
        model_kwargs=args.model_kwargs,
        data_config={k: v for k, v in data.items() if v},
    )


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument('--output', required=True, metavar='DIR', help='folder to make')
    parser.add_argument('--extract', type=int, metavar='N', help='take this resolution out, as a plain timm model')
    _add_packed(parser)


def _add_packed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--packed', action='store_true', help='write weights of K bits, of a quantized network')


def _convert(args: argparse.Namespace) -> None:
    from timm_rs.hub.convert import save_model

    check_new_folder(args.output)
    labels = _read_labels(args.label_names or _labels_beside(args.checkpoint))
    model = _load(args).model
    what = ' '.join(map(str, model.resolutions))
    if args.extract is not None:
        model, what = model.at(args.extract), args.extract
    save_model(model, args.output, labels, args.packed)
    _print_saved(args.output, model, what)


def _print_saved(output: str, model: Any, resolutions: Any) -> None:
    print(f"{output}: {model.pretrained_cfg['architecture']} at {resolutions}, loaded by "
          f"timm.create_model('local-dir:{output}', pretrained=True)")


def _add_push(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    add = parser.add_argument
    add('repo_id', metavar='USER/NAME', help='repository on the Hub, made if there is none')
    add('--private', action='store_true', help='make it a private one')
    add('--revision', metavar='BRANCH', help='branch to push to, made if there is none (default: main)')
    add('--create-pr', action='store_true', help='open a pull request instead')
    _add_packed(parser)
    add('--message', default='Add model', metavar='TEXT', help='first line of the commit')
    add('--license', metavar='NAME', help='license of the weights (default: apache-2.0)')
    add('--dataset', metavar='NAME', help='data set that the metrics are of (default: that of the training run)')
    add('--results', metavar='FILE',
        help='metrics for the card, of validate_rs.py (default: summary.csv beside the checkpoint)')


def _push(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import disable_progress_bars

    from timm_rs.hub.push import HubError, push_to_hub, read_metrics

    beside = os.path.dirname(args.checkpoint)
    labels = _read_labels(args.label_names or _labels_beside(args.checkpoint))
    loaded = _load(args)
    results = args.results
    if results is None and loaded.epoch is not None and os.path.isfile(os.path.join(beside, 'summary.csv')):
        results = os.path.join(beside, 'summary.csv')
    metrics = read_metrics(results, loaded.epoch) if results else None
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        url = push_to_hub(
            loaded.model,
            args.repo_id,
            metrics=metrics,
            recipe=loaded.args,
            dataset=args.dataset,
            label_names=labels,
            license=args.license,
            commit_message=args.message,
            revision=args.revision,
            private=args.private,
            create_pr=args.create_pr,
            packed=args.packed,
        )
    except HubError as e:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # behind a progress bar that the client leaves open
        again = shlex.join(['timm-rs', *args.argv])
        raise HubError(f'{e} The weights are in {args.checkpoint} still; push again with: {again}') from e
    print(f'{args.checkpoint}: pushed to {url}')


def _read_labels(path: Optional[str]) -> Optional[Sequence[str]]:
    if path is None:
        return None
    with open(path, encoding='utf-8-sig') as f:
        return f.read().rstrip().splitlines()


def _labels_beside(checkpoint: str) -> Optional[str]:
    """Return the file of class names that training left beside a checkpoint, if there is one."""
    from timm_rs.hub.push import LABEL_FILE

    path = os.path.join(os.path.dirname(checkpoint), LABEL_FILE)
    return path if os.path.isfile(checkpoint) and os.path.isfile(path) else None


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    from timm_rs.calibrate import METHODS

    _add_source(parser)
    add = parser.add_argument
    add('--resolution', type=int, required=True, metavar='N', help='new input size in pixels')
    add('--data-dir', metavar='DIR', help='images to calibrate on, in class folders; labels are not used')
    add('--dataset', default='', metavar='NAME', help='kind of data set: "", "digits", or <type>/<name> as in timm')
    add('--split', default='train', metavar='NAME', help='split to calibrate on')
    add('--method', default='tune_bn', choices=METHODS, help='default: %(default)s')
    add('--images', type=int, default=5000, metavar='N', help='images to use at most (default: 5000)')
    add('--epochs', type=int, default=2, metavar='N', help='passes over the images (default: 2)')
    add('--lr', type=float, default=1e-3, metavar='LR', help='learning rate (default: 0.001)')
    add('--batch-size', type=int, default=64, metavar='N', help='images per batch (default: 64)')
    add('--workers', type=int, default=4, metavar='N', help='loader processes (default: 4)')
    add('--device', default='cuda', help='device to run on; the CPU serves where there is no GPU')
    add('--output', required=True, metavar='DIR', help='folder to make')


def _calibrate(args: argparse.Namespace) -> None:
    import torch
    from timm.data import create_transform
    from timm.data.model_config import resolve_input_data_config

    from timm_rs.calibrate import add_resolution
    from timm_rs.data.datasets import choose_img_mode, create_dataset
    from timm_rs.hub.convert import save_model

    check_new_folder(args.output)
    labels = _read_labels(args.label_names or _labels_beside(args.checkpoint))
    device = torch.device(args.device if torch.cuda.is_available() or not args.device.startswith('cuda') else 'cpu')
    model = _load(args).model.to(device)
    loader = None
    if args.method != 'copy':
        config = resolve_input_data_config(model)
        size = max(args.resolution, model.resolutions[0])
        channels = config.pop('input_size')[0]
        dataset = create_dataset(
            args.dataset, args.data_dir, args.split, input_img_mode=choose_img_mode(channels))
        dataset.transform = create_transform((channels, size, size), is_training=False, **config)
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:args.images]
        loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(dataset, chosen.tolist()), batch_size=args.batch_size, num_workers=args.workers)
    add_resolution(model, args.resolution, loader, args.method, epochs=args.epochs, lr=args.lr)
    save_model(model.cpu(), args.output, labels)
    _print_saved(args.output, model, ' '.join(map(str, model.resolutions)))


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--overwrite', action='store_true', help='replace a file of this name')


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    add = parser.add_argument
    add('-o', '--output', required=True, metavar='FILE', help='file to write')
    _add_overwrite(parser)
    add('--format', default='onnx', choices=('onnx', 'torch-export', 'torchscript'), help='default: %(default)s')
    add('--resolution', type=int, metavar='N',
        help='take this resolution out (default: one file for all of them, ONNX only)')
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument('--batch-size', type=int, metavar='N', help='images of a batch, with --resolution')
    batch.add_argument('--dynamic-batch', action='store_true', help='batches of any number of images (the default)')
    add('--tolerance', type=float, default=1e-4, metavar='X',
        help='largest difference of logits between network and file (default: %(default)s)')
    add('--quantize', choices=('int8',), help='all resolutions in int8, with --calibration-data')
    add('--calibration-data', metavar='DIR', help='folder of images like those to come, for the ranges of activations')
    add('--calibration-images', type=int, default=128, metavar='N', help='images to use at most (default: %(default)s)')


def _export(args: argparse.Namespace) -> None:
    from timm_rs.export.export import export_int8, export_resolution, export_switchable
    from timm_rs_runtime.images import find_images

    if args.resolution is None and (args.format != 'onnx' or args.batch_size):
        what = f'--format {args.format}' if args.format != 'onnx' else '--batch-size'
        raise UserError(f'{what} needs --resolution: one file for all resolutions is ONNX, of any batch size.')
    if bool(args.quantize) != bool(args.calibration_data):
        raise UserError('--quantize int8 and --calibration-data DIR need each other.')
    if args.quantize and args.resolution is not None:
        raise UserError('--quantize int8 writes all resolutions, leave --resolution out.')
    check_new_file(args.output, args.overwrite)
    labels = _read_labels(args.label_names or _labels_beside(args.checkpoint))
    if args.quantize:
        images = find_images(args.calibration_data, args.calibration_images)
    model = _load(args).model
    if args.quantize:
        found = export_int8(model, args.output, images, labels, overwrite=args.overwrite)
        told = {r: f"top-1 of {row['agreement']:.1%} of {len(images)} images as the network's, "
                   f"logits {row['error']:.1%} off" for r, row in found.items()}
    elif args.resolution is None:
        errors = export_switchable(model, args.output, labels, args.tolerance, args.overwrite)
        told = {r: f'differs from the network by {error:.2g} at most' for r, error in errors.items()}
    else:
        error = export_resolution(
            model, args.resolution, args.output, args.format, args.batch_size, labels, args.tolerance, args.overwrite)
        told = {args.resolution: f'differs from the network by {error:.2g} at most'}
    for resolution, text in told.items():
        print(f'{resolution} px: {text}')
    print(f"{args.output}: {model.pretrained_cfg['architecture']} at {' '.join(map(str, told))}, "
          f'{os.path.getsize(args.output) / 1e6:.1f} MB')


def _add_onnx(parser: argparse.ArgumentParser, name: str = 'file') -> None:
    if name.startswith('--'):
        parser.add_argument(name, required=True, metavar='FILE.onnx', help='file of timm-rs export')
    else:
        parser.add_argument(name, metavar='FILE.onnx', help='file of timm-rs export')
    parser.add_argument('--threads', type=int, metavar='N', help='threads of an inference (default: all cores)')


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders, or - for an image on stdin')
    _add_onnx(parser, '--model')
    size = parser.add_mutually_exclusive_group()
    size.add_argument('--resolution', type=int, metavar='N', help='input size in pixels (default: the largest)')
    size.add_argument('--budget-ms', type=float, metavar='T', help='take the largest size that keeps so many ms')
    size.add_argument('--cascade', metavar='FILE', help='take larger sizes for unsure images; file of fit-cascade')
    add = parser.add_argument
    add('--mode', default='fast', choices=('fast', 'low_memory'), help='default: %(default)s')
    add('--top', type=int, default=5, metavar='K', help='classes to print (default: %(default)s)')
    add('--json', action='store_true', help='print a line of JSON for each image')


def _predict(args: argparse.Namespace) -> None:
    from timm_rs_runtime.predict import Predictor, predict_all

    if args.top < 1:
        raise UserError(f'--top is {args.top}, expected a positive number.')
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f'timm-rs predict: {message}', file=sys.stderr)
        warnings.simplefilter('always', RuntimeWarning)
        predictor = Predictor(args.model, args.resolution, args.budget_ms, args.cascade, args.threads, args.mode)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Palette images with Transparency')  # by Pillow
        failed = predict_all(predictor, args.images, args.top, args.json)
    if failed:
        raise SystemExit(1)


def _add_fit_cascade(parser: argparse.ArgumentParser) -> None:
    _add_onnx(parser)
    add = parser.add_argument
    add('--data-dir', required=True, metavar='DIR', help='labelled images, in class folders')
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument('--target-accuracy', type=float, metavar='A', help='accuracy in percent to reach, cheaply')
    target.add_argument('--target-madds', type=float, metavar='M',
        help='mean multiply-adds of an image to stay below, in millions')
    add('--start', type=int, metavar='N', help='first input size in pixels (default: fitted)')
    add('--images', type=int, metavar='N', help='images to use at most (default: all)')
    add('-o', '--output', required=True, metavar='FILE', help='file to write')
    _add_overwrite(parser)


def _fit_cascade(args: argparse.Namespace) -> None:
    from timm_rs_runtime.fitting import fit_cascade

    rows = fit_cascade(
        args.file,
        args.data_dir,
        args.output,
        None if args.target_accuracy is None else args.target_accuracy / 100,
        None if args.target_madds is None else args.target_madds * 1e6,
        args.start,
        args.images,
        args.threads,
        args.overwrite,
    )
    print('network  accuracy  mean MAdds  mean ms  images through each size')
    for row in rows:
        shares = ', '.join(f'{r} px {share:.0%}' for r, share in row['shares'].items())
        print(f"{row['network']:8} {row['accuracy']:8.2%} {row['madds'] / 1e6:10.1f}M {row['milliseconds']:8.2f}  "
              f'{shares}')
    print(f'{args.output}: thresholds of a cascade for {args.file}')


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add_onnx(parser)
    add = parser.add_argument
    add('--host', default='127.0.0.1', metavar='ADDRESS', help='address to listen at (default: %(default)s)')
    add('--port', type=int, metavar='N', help='port to listen at (default: a free one from 7860 on)')


def _demo(args: argparse.Namespace) -> None:
    from timm_rs_runtime.web import serve

    serve(args.file, args.host, args.port, args.threads)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('runs', nargs='+', metavar='OUTPUT_DIR', help='output folders of train_rs.py')
    add('--output', default='.', metavar='DIR', help='folder of the figures (default: the current one)')
    add('--format', default='png', choices=('png', 'pdf', 'svg'), help='of the figures (default: png)')
    _add_overwrite(parser)


def _plot(args: argparse.Namespace) -> None:
    from timm_rs.plot import plot_accuracy_against_madds, plot_curves, read_run

    runs = [read_run(folder) for folder in args.runs]
    os.makedirs(args.output, exist_ok=True)
    paths = [os.path.join(args.output, f'{name}.{args.format}') for name in ('curves', 'accuracy_vs_madds')]
    for path in paths:
        check_new_file(path, args.overwrite)
    for path, plot in zip(paths, (plot_curves, plot_accuracy_against_madds)):
        plot(runs, path, args.overwrite)
        print(path)


COMMANDS = (
    Command('calibrate', 'add a resolution that was not trained', _add_calibrate, _calibrate),
    Command('convert', 'make a model folder of a checkpoint, or of one resolution of it', _add_convert, _convert),
    Command('demo', 'open a local web page that answers a picture at every size', _add_demo, _demo),
    Command('export', 'write a file that runs without timm: ONNX, torch.export or TorchScript', _add_export, _export),
    Command('fit-cascade', 'fit thresholds at which an image goes on to a larger size', _add_fit_cascade, _fit_cascade),
    Command('plot', 'draw figures of training runs', _add_plot, _plot),
    Command('predict', 'answer images with an exported file', _add_predict, _predict),
    Command('push', 'push a checkpoint to the Hugging Face Hub', _add_push, _push),
)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run a sub-command; errors are one line on stderr and end with a status other than 0."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = OneLineParser(prog='timm-rs', description='Resolution Switchable Networks for timm.')
    parser.add_argument('--version', action='version', version=f'timm-rs {__version__}')
    subparsers = parser.add_subparsers(metavar='COMMAND', required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=f'{command.help}.'.capitalize())
        if argv[:1] == [command.name]:  # the arguments of others may need imports that take seconds
            command.add_arguments(subparser)
        subparser.set_defaults(command=command, argv=argv)
    args = parser.parse_args(argv)
    with one_line_errors(f'timm-rs {args.command.name}'):
        try:
            args.command.run(args)
            sys.stdout.flush()
        except BrokenPipeError:  # who reads has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None  # of SIGPIPE


if __name__ == '__main__':
    main()
