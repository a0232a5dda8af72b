"""Pre-activation ResNet (He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016), made for quantization

The BatchNorm and ReLU before the first block of a group belong to the end of the group before, so that one quantized
tensor feeds both branches of that block, and a group's output consists only of levels (LQ-Nets, section 5).
"""
from collections import OrderedDict
from typing import Any, Dict, Optional, Sequence, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    create_classifier,
    get_act_layer,
    get_norm_layer,
)
from timm.models import ResNet, build_model_with_cfg, generate_default_cfgs, register_model

from ..quant.quantizers import ActivationSite

__all__ = ['PreActResNet']


class PreActBlock(nn.Module):
    """Residual block whose convolutions follow a BatchNorm, a ReLU and a place to quantize the activations.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        stride: Stride of the 3x3 convolution, of the first one if there are two.
        bottleneck: 1x1, 3x3 and 1x1 convolutions with a quarter of the channels between them, instead of two 3x3.
        preact: What stands before the first convolution: 'full'; 'site', only the quantizer; or 'none'. The shortcut
            takes the input unchanged.
        drop_path: Rate of stochastic depth.
        act_layer: Type of the activations.
        norm_layer: Type of the BatchNorms.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            bottleneck: bool = False,
            preact: str = 'full',
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.ReLU,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        mid_chs = out_chs // 4 if bottleneck else out_chs
        kernels, strides = ((1, 3, 1), (1, stride, 1)) if bottleneck else ((3, 3), (stride, 1))
        self.num_convs = len(kernels)
        chs = [in_chs, *[mid_chs] * (self.num_convs - 1), out_chs]
        for i in range(1, self.num_convs + 1):
            full = i > 1 or preact == 'full'
            self.add_module(f'bn{i}', norm_layer(chs[i - 1], **dd) if full else nn.Identity())
            self.add_module(f'act{i}', act_layer(inplace=True) if full else nn.Identity())
            self.add_module(f'quant{i}', ActivationSite() if full or preact == 'site' else nn.Identity())
            kernel, step = kernels[i - 1], strides[i - 1]
            conv = nn.Conv2d(chs[i - 1], chs[i], kernel, stride=step, padding=kernel // 2, bias=False, **dd)
            self.add_module(f'conv{i}', conv)
        self.downsample = None
        if stride != 1 or in_chs != out_chs:
            self.downsample = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv1(self.quant1(self.act1(self.bn1(x))))
        x = self.conv2(self.quant2(self.act2(self.bn2(x))))
        if self.num_convs == 3:
            x = self.conv3(self.quant3(self.act3(self.bn3(x))))
        return self.drop_path(x) + shortcut

    def zero_init_last(self) -> None:
        """Begin as an identity, as ResNet.init_weights asks for."""
        nn.init.zeros_(self.get_submodule(f'conv{self.num_convs}').weight)


class PreActResNet(ResNet):
    """Pre-activation ResNet; what is not about its layers is timm's ResNet.

    Args:
        layers: Blocks per group.
        bottleneck: Kind of the blocks, see PreActBlock.
        channels: Channels per group; the output has four times as many if the blocks are bottlenecks.
        num_classes: Number of classes.
        in_chans: Image channels.
        global_pool: 'avg', 'max', 'avgmax' or 'catavgmax'.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth.
        act_layer: Type or name of the activations.
        norm_layer: Type or name of the BatchNorms.
        zero_init_last: Begin with blocks that pass their input on.
    """

    def __init__(
            self,
            layers: Sequence[int],
            bottleneck: bool = False,
            channels: Sequence[int] = (64, 128, 256, 512),
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            act_layer: Union[str, Type[nn.Module]] = nn.ReLU,
            norm_layer: Union[str, Type[nn.Module]] = nn.BatchNorm2d,
            zero_init_last: bool = False,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ):
        nn.Module.__init__(self)  # not that of ResNet, which would make its own layers
        dd = dict(device=device, dtype=dtype)
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        chs = channels[0]
        self.conv1 = nn.Conv2d(in_chans, chs, 7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = norm_layer(chs, **dd)
        self.act1 = act_layer(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.feature_info = [dict(num_chs=chs, reduction=2, module='act1')]
        drop_paths = calculate_drop_path_rates(drop_path_rate, layers, stagewise=True)
        for group, (depth, width) in enumerate(zip(layers, channels)):
            out_chs = width * 4 if bottleneck else width
            blocks = OrderedDict()
            for i in range(depth):
                preact = 'full' if i else 'none' if group else 'site'
                stride = 2 if group and not i else 1
                blocks[str(i)] = PreActBlock(
                    chs, out_chs, stride, bottleneck, preact, drop_paths[group][i], act_layer, norm_layer, **dd)
                chs = out_chs
            blocks.update(bn=norm_layer(chs, **dd), act=act_layer())  # not in place, for gradient checkpointing
            if group < len(layers) - 1:
                blocks['quant'] = ActivationSite()
            name = f'layer{group + 1}'
            self.add_module(name, nn.Sequential(blocks))
            self.feature_info.append(dict(num_chs=chs, reduction=4 * 2 ** group, module=name))

        self.num_features = chs
        self.global_pool, self.fc = create_classifier(chs, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = chs * self.global_pool.feat_mult()
        self.init_weights(zero_init_last)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Return patterns of parameter names, for layer-wise learning rates."""
        blocks = r'^layer(\d+)' if coarse else [(r'^layer(\d+)\.(\d+)', None), (r'^layer(\d+)\.bn', (99999,))]
        return dict(stem=r'^conv1|^bn1', blocks=blocks)


default_cfgs = generate_default_cfgs({
    name: dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation='bilinear',
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv='conv1', classifier='fc', license='apache-2.0',
    ) for name in ('preresnet18', 'preresnet50')
})


def _create_preresnet(variant: str, pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    return build_model_with_cfg(PreActResNet, variant, pretrained, **kwargs)


@register_model
def preresnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-18."""
    return _create_preresnet('preresnet18', pretrained, **dict(dict(layers=(2, 2, 2, 2)), **kwargs))


@register_model
def preresnet50(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-50, with the stride on the 3x3 convolutions."""
    return _create_preresnet('preresnet50', pretrained, **dict(dict(layers=(3, 4, 6, 3), bottleneck=True), **kwargs))
