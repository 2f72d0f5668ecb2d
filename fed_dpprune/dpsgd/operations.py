"""Which operations a module runs, and whether each of them treats the rows of a batch one by one whatever their values are.

An operation may look at the whole batch to choose its way (the gradient of a product asks whether any element is zero),
or its shape may follow from values (boolean indices). For one example more, all others would go another way, and chosen weights
turn that into another gradient. No made-up example can show what values do; a table can: an operation that is not in it is not
trusted with several examples at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Names of aten without overloads; an operation in place counts as its base. Each computes every element, or every row, by
# steps that follow from shapes and types alone.
_NAMES = """
_adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d
_adaptive_avg_pool3d_backward _conj _log_softmax _log_softmax_backward_data _prelu_kernel
_prelu_kernel_backward _safe_softmax _scaled_dot_product_flash_attention_for_cpu
_scaled_dot_product_flash_attention_for_cpu_backward _softmax _softmax_backward_data _to_copy
_unsafe_view _weight_norm_interface _weight_norm_interface_backward abs add addcdiv addcmul
addmm alias amax amin arange argmax argmin as_strided asinh atan avg_pool2d avg_pool2d_backward
avg_pool3d avg_pool3d_backward baddbmm binary_cross_entropy binary_cross_entropy_backward
binary_cross_entropy_with_logits bmm cat ceil celu clamp clamp_max clamp_min clone col2im
constant_pad_nd convolution convolution_backward copy cos cosh cumsum detach diagonal div elu
elu_backward embedding embedding_dense_backward empty empty_like eq erf erfc exp exp2 expand
expm1 eye fill flip floor fmod full full_like gather ge gelu gelu_backward glu glu_backward gt
hardsigmoid hardsigmoid_backward hardswish hardswish_backward hardtanh hardtanh_backward
huber_loss huber_loss_backward im2col index_select le leaky_relu leaky_relu_backward lerp
lift_fresh linalg_vector_norm linear log log10 log1p log2 log_sigmoid_backward
log_sigmoid_forward logical_and logical_not logical_or logical_xor logsumexp lt masked_fill
matmul max max_pool2d_with_indices max_pool2d_with_indices_backward max_pool3d_with_indices
max_pool3d_with_indices_backward maximum mean min minimum mish mish_backward mm mse_loss
mse_loss_backward mul native_group_norm native_group_norm_backward native_layer_norm
native_layer_norm_backward ne neg new_empty new_empty_strided new_full new_ones new_zeros
nll_loss2d_backward nll_loss2d_forward nll_loss_backward nll_loss_forward ones ones_like permute
pixel_shuffle pixel_unshuffle pow reciprocal reflection_pad1d reflection_pad1d_backward
reflection_pad2d reflection_pad2d_backward relu remainder repeat replication_pad1d
replication_pad1d_backward replication_pad2d replication_pad2d_backward rms_norm roll round
rsqrt scalar_tensor scatter scatter_add select select_backward sgn sigmoid sigmoid_backward sign
silu silu_backward sin sinh slice slice_backward slice_scatter smooth_l1_loss
smooth_l1_loss_backward soft_margin_loss softplus softplus_backward split split_with_sizes sqrt
square squeeze stack std sub sum t tan tanh tanh_backward threshold threshold_backward transpose
tril triu trunc unbind unfold unfold_backward unsqueeze upsample_bicubic2d
upsample_bicubic2d_backward upsample_bilinear2d upsample_bilinear2d_backward upsample_linear1d
upsample_linear1d_backward upsample_nearest1d upsample_nearest1d_backward upsample_nearest2d
upsample_nearest2d_backward var var_mean view view_as_complex view_as_real where zero zeros
zeros_like
"""
ROW_BY_ROW = frozenset(_NAMES.split())
# Code that is known to look at no value; a transformer takes functions of anybody's. The trial costs an import of seconds.
KNOWN_CODE = ("torch.nn.", "torchvision.models.", "torchvision.ops.", "fed_dpprune.")
# Row by row with whole numbers as indices; boolean ones pick as many rows as there are true values.
_BY_INDEX = frozenset(("index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put"))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the `with`, notes the operations that are not known to go row by row."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.others: set[str] = set()

    def note(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Note the operation and run it."""
        space, _, name = str(getattr(func, "_schema", func)).partition("(")[0].partition(".")[0].partition("::")
        known = space == "aten" and (name.rstrip("_") in ROW_BY_ROW or (name.rstrip("_") in _BY_INDEX and _whole_numbers(args)))
        if not known:
            self.others.add(f"{space}::{name}")
        return func(*args, **(kwargs or {}))


# Set here, not in the class: there torch would wrap it for its compiler, whose import costs every client seconds.
Recorder.__torch_dispatch__ = Recorder.note  # type: ignore[assignment]


def _whole_numbers(args: Sequence[Any]) -> bool:
    indices = args[1] if len(args) > 1 else ()
    return all(i is None or (isinstance(i, Tensor) and i.dtype in (torch.int64, torch.int32)) for i in indices)


def looks_at_no_value(module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> bool:
    """Whether the code of a module and of its loss needs shapes and types alone: torch's, torchvision's and ours, or by trial."""
    if not getattr(loss, "__module__", "").startswith(KNOWN_CODE) or not all(map(_known, module.modules())):
        return shapes_follow_from_shapes(lambda a, b: loss(module(a), b), x, y)
    return True


def _known(layer: nn.Module) -> bool:
    kind = type(layer).__module__
    own = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    return kind.startswith(KNOWN_CODE) and kind != "torch.nn.modules.transformer" and not own


def shapes_follow_from_shapes(run: Any, *inputs: Tensor) -> bool:
    """Whether `run(*inputs)` needs no value of a tensor: it runs on tensors that have none.

    Catches code that leaves torch to look (numpy, lists) as well as branches on values. Where torch cannot say, the answer is no.
    """
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            run(*(mode.from_tensor(value) for value in inputs))
    except Exception:
        return False
    return True
