"""What the commands share that begin with a checkpoint"""
import argparse
import os
from typing import Any, List, Optional

from timm_rs_runtime.errors import KeyValues, UserError
from timm_rs_runtime.fields import check_argument


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where a network comes from."""
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=lambda name: name.removeprefix('local-dir:'),
        help="run folder or file of train_rs.py, file of timm, of the authors' code or of EfficientNet-PyTorch, folder "
             'with config.json, hf-hub:user/name, or name of a pretrained rs_* model')
    add = parser.add_argument_group('what the checkpoint does not record').add_argument
    add('--model', metavar='NAME', help='name of an rs_* model (default: what the checkpoint records)')
    add('--resolutions', type=int, nargs='+', metavar='N',
        help='input sizes in pixels (default: what the checkpoint records, else 224 192 160 128 96)')
    add('--num-classes', type=int, metavar='N', help='number of classes (default: what the checkpoint records)')
    add('--use-ema', action='store_true', help='take the moving average of the weights')
    add('--label-names', metavar='FILE', help='names of the classes in their order, one a line')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, help='further model arguments as key=value')
    add('--mean', type=float, nargs='+', metavar='MEAN', help='pixel mean that the weights were trained with')
    add('--std', type=float, nargs='+', metavar='STD', help='pixel standard deviation that they were trained with')
    add('--interpolation', metavar='NAME', help='interpolation of the images')
    add('--crop-pct', type=float, metavar='PCT', help='share of the image that is cropped')


def add_packed(parser: argparse.ArgumentParser) -> None:
    """Add the flag of commands that write weights."""
    parser.add_argument('--packed', action='store_true', help='write weights of K bits, of a quantized network')


def load(args: argparse.Namespace) -> Any:
    """Load the checkpoint that the arguments of add_source name."""
    from timm_rs._compat import get_model_input_config
    from timm_rs.load import load_model
    from timm_rs_runtime.images import MODES
    from timm_rs_runtime.preprocess import PREPROCESSING

    given = {k: getattr(args, k) for k in ('mean', 'std', 'interpolation', 'crop_pct')}
    loaded = load_model(
        args.checkpoint,
        args.model,
        args.resolutions,
        args.num_classes,
        args.use_ema,
        model_kwargs=args.model_kwargs,
        data_config={
            k: check_argument(f"--{k.replace('_', '-')}", v, PREPROCESSING[k]) for k, v in given.items() if v},
    )
    mode, channels = loaded.args.get('input_img_mode'), get_model_input_config(loaded.model)['input_size'][0]
    if mode and mode != MODES.get(channels, mode):
        raise UserError(
            f"{loaded.source} takes images in Pillow's mode {mode} (--input-img-mode), which only train_rs.py and "
            f'validate_rs.py give it: everything else reads {MODES[channels]}.')
    if loaded.source != args.checkpoint:  # the best or last checkpoint in the output folder of a run
        print(f'{args.checkpoint}: {os.path.basename(loaded.source)} is read')
    return loaded


def read_labels(args: argparse.Namespace) -> Optional[List[str]]:
    """Return the names of the classes, of --label-names or of the file that training left beside the checkpoint."""
    from timm_rs.records import labels_beside, read_label_names

    path = args.label_names or labels_beside(args.checkpoint)
    return read_label_names(path) if path else None


def print_saved(output: str, model: Any, resolutions: Any) -> None:
    """Print what was written and how to load it."""
    first = 'import timm_rs; ' if hasattr(model, 'resolutions') else ''  # which registers the architecture
    print(f"{output}: {model.pretrained_cfg['architecture']} at {resolutions}, loaded by "
          f"{first}timm.create_model('local-dir:{output}', pretrained=True)")
