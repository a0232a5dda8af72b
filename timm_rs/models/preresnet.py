"""Pre-activation ResNet (He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016), made for quantization

The BatchNorm and ReLU before the first block of a group belong to the end of the group before, so that one quantized
tensor feeds both branches of that block, and a group's output consists only of levels (LQ-Nets, section 5).
"""
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    create_classifier,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
)
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model

from .._compat import feature_take_indices
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


class PreActGroup(nn.Sequential):
    """Blocks of one width, then a BatchNorm, a ReLU and, except in the last group, a place to quantize."""

    def __init__(self, blocks: Sequence[nn.Module], bn: nn.Module, act: nn.Module, quant: Optional[nn.Module]):
        super().__init__(*blocks)
        self.depth = len(blocks)
        self.bn = bn
        self.act = act
        if quant is not None:
            self.quant = quant


class PreActResNet(nn.Module):
    """Pre-activation ResNet with the interfaces of timm's.

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
        super().__init__()
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
        self.layer_names = []
        for group, (depth, width) in enumerate(zip(layers, channels)):
            out_chs = width * 4 if bottleneck else width
            blocks = []
            for i in range(depth):
                preact = 'full' if i else 'none' if group else 'site'
                stride = 2 if group and not i else 1
                blocks.append(PreActBlock(
                    chs, out_chs, stride, bottleneck, preact, drop_paths[group][i], act_layer, norm_layer, **dd))
                chs = out_chs
            quant = ActivationSite() if group < len(layers) - 1 else None
            self.layer_names.append(f'layer{group + 1}')
            self.add_module(self.layer_names[-1], PreActGroup(
                blocks, norm_layer(chs, **dd), act_layer(inplace=True), quant))
            self.feature_info.append(dict(num_chs=chs, reduction=4 * 2 ** group, module=self.layer_names[-1]))

        self.num_features = self.head_hidden_size = chs
        self.global_pool, self.fc = create_classifier(chs, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = chs * self.global_pool.feat_mult()
        self.init_weights(zero_init_last)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialize the convolutions.

        Args:
            zero_init_last: Set the last convolution of each block to zero.
        """
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(m, PreActBlock) and zero_init_last:
                nn.init.zeros_(m.get_submodule(f'conv{m.num_convs}').weight)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Return patterns of parameter names, for layer-wise learning rates."""
        blocks = r'^layer(\d+)' if coarse else [(r'^layer(\d+)\.(\d+)', None), (r'^layer(\d+)\.bn', (99999,))]
        return dict(stem=r'^conv1|^bn1', blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> Union[str, nn.Module]:
        """Return the classifier, or its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Make a new classifier, and another pooling unless it is None."""
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, **get_device_dtype(self))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Return the features, and those at the places of feature_info.

        Args:
            x: Images [N, C, H, W].
            indices: Indices of these places, the last ones if a number, all if None.
            norm: Without effect.
            stop_early: Stop at the last one that is asked for.
            output_fmt: 'NCHW'.
            intermediates_only: Return only the latter.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        taken, last = feature_take_indices(len(self.feature_info), indices)
        x = self.act1(self.bn1(self.conv1(x)))
        intermediates = [x] if 0 in taken else []
        x = self.maxpool(x)
        for i, name in enumerate(self.layer_names, start=1):
            if stop_early and i > last:
                break
            x = self._forward_group(name, x)
            if i in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return features [N, num_features, H / 32, W / 32]."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        for name in self.layer_names:
            x = self._forward_group(name, x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool features and classify them, unless pre_logits."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def _forward_group(self, name: str, x: torch.Tensor) -> torch.Tensor:
        group = getattr(self, name)
        if not self.grad_checkpointing or torch.jit.is_scripting():
            return group(x)
        layers = list(group)
        x = checkpoint_seq(layers[:group.depth], x)
        for layer in layers[group.depth:]:  # what follows works in place
            x = layer(x)
        return x


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
