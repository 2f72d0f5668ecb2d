"""Which operations a module runs, and whether each of them treats the rows of a batch one by one whatever their values are.

An operation may look at the whole batch to choose its way (the gradient of a product asks whether any element is zero),
or its shape may follow from values (boolean indices). For one example more, all others would go another way, and chosen weights
turn that into another gradient. No made-up example can show what values do; a table can: an operation that is not in it is not
trusted with several examples at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


# These go along a dimension and keep its length: which one must be said, and not be that of the examples.
_ALONG_NAMES = """
_log_softmax _log_softmax_backward_data _safe_softmax _softmax _softmax_backward_data cumsum flip gather index_select roll scatter
scatter_add
"""
_ALONG = frozenset(_ALONG_NAMES.split())
_SIZES = (13, 17, 23, 29)  # of made-up batches; one of them is no other dimension of a net


def joins_rows(name: str, args: Sequence[Any], output: Any, n: int) -> bool:
    """Whether an operation on a batch of n examples may join them, where n is no other dimension's size.

    Allowed is what has the examples in the first dimension of every operand and of its (first) result and goes along no
    first dimension. A reduction over the batch loses it, a transposition moves it, a reshape across it changes it.
    """
    operands = [t for t in _flat(args) if n in t.shape]
    if not operands:
        return False
    results = list(_flat(output if isinstance(output, list) else [output[0] if isinstance(output, tuple) else output]))
    if not all(t.shape[:1] == (n,) and n not in t.shape[1:] for t in (*operands, *results)):
        return True
    if name in _ALONG:
        dims = [d for a in args[1:] for d in (a if isinstance(a, (list, tuple)) else [a]) if type(d) is int]
        return not dims or any(d in (0, -operands[0].ndim) for d in dims)
    if name in _BY_INDEX:
        return n in args[0].shape and args[1][0] is not None
    if name in ("mm", "addmm", "matmul", "linear"):
        return len(operands) != (2 if name == "addmm" and n in args[0].shape else 1)
    return name == "as_strided" or (name == "native_layer_norm" and len(args[1]) == args[0].ndim)


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)


Loss = Callable[[Tensor, Tensor], Tensor]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the `with`, notes the operations that are not known to go row by row, or that join the rows of the batch."""

    def __init__(self, examples: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.others: set[str] = set()
        self._examples = examples  # of the batch, to look for operations that join them; 0: not asked

    def note(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Note the operation and run it."""
        space, _, name = str(getattr(func, "_schema", func)).partition("(")[0].partition(".")[0].partition("::")
        base = name.rstrip("_")
        known = space == "aten" and (base in ROW_BY_ROW or (base in _BY_INDEX and _whole_numbers(args)))
        output = func(*args, **(kwargs or {}))
        if not known or (self._examples and joins_rows(base, [*args, *(kwargs or {}).values()], output, self._examples)):
            self.others.add(f"{space}::{name}")
        return output


# Set here, not in the class: there torch would wrap it for its compiler, whose import costs every client seconds.
Recorder.__torch_dispatch__ = Recorder.note  # type: ignore[assignment]


def _whole_numbers(args: Sequence[Any]) -> bool:
    indices = args[1] if len(args) > 1 else ()
    return all(i is None or (isinstance(i, Tensor) and i.dtype in (torch.int64, torch.int32)) for i in indices)


def row_by_row(module: nn.Module, loss: Loss, make: Callable[[int], tuple[Tensor, Tensor]]) -> bool:
    """Whether several examples may go through a module and its loss at once, forwards and backwards.

    Code of torch, torchvision and this project keeps examples apart; of it only the operations are asked for. Anybody else's
    has to keep the examples in the first dimension from end to end, and to run on tensors that have no values.

    Args:
        module: In a state in which all parameters ask for gradients.
        loss: Per-example losses.
        make: Made-up examples and labels, as many as are asked for.
    """
    if getattr(loss, "__module__", "").startswith(KNOWN_CODE) and all(map(_known, module.modules())):
        return not _recorded(module, loss, *make(4), examples=0)
    apart = any(not _recorded(module, loss, *make(n), examples=n) for n in _SIZES)
    return apart and shapes_follow_from_shapes(lambda a, b: _both_ways(module, loss, a, b), *make(4))


def _recorded(module: nn.Module, loss: Loss, x: Tensor, y: Tensor, examples: int) -> set[str]:
    with Recorder(examples) as recorder:
        _both_ways(module, loss, x, y)
    others: set[str] = recorder.others
    return others


def _both_ways(module: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> None:
    """Forward, and backward to what depends on the examples; no gradient of a parameter, which would be one sum over them."""
    roots: list[Tensor] = []

    def root(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        roots.append(output.detach().requires_grad_())
        return roots[-1]

    asked = [p for p in module.parameters() if p.requires_grad]
    taken = [layer.register_forward_hook(root) for layer in module.modules() if isinstance(layer, nn.Embedding)]
    try:
        for p in asked:
            p.requires_grad_(False)
        if x.is_floating_point():
            x = x.detach().requires_grad_()
            roots.append(x)
        with torch.enable_grad():
            losses = loss(module(x), y)
            if losses.requires_grad:
                torch.autograd.grad(losses, roots, torch.ones_like(losses), allow_unused=True)
    finally:
        for p in asked:
            p.requires_grad_(True)
        for handle in taken:
            handle.remove()


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
