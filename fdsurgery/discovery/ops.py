"""What the operations in a graph do to structure, by their names."""

from __future__ import annotations

from typing import Any

from torch import fx

_ARITHMETIC = ("add", "sub", "mul", "div", "truediv", "floordiv", "pow", "matmul", "mod", "and", "or")
_SPELLINGS = {prefix + name: name for prefix in "ir" for name in _ARITHMETIC}
_SPELLINGS |= {"true_divide": "div", "truediv": "div", "itruediv": "div", "rtruediv": "div", "multiply": "mul"}
_SPELLINGS |= {"concat": "cat", "concatenate": "cat", "subtract": "sub", "clip": "clamp"}

LAYOUT = frozenset(
    "view view_as reshape reshape_as flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t "
    "T mT H mH contiguous clone to type type_as float half bfloat16 double cuda cpu detach data real squeeze "
    "unsqueeze expand expand_as getitem narrow select unbind chunk split split_with_sizes tensor_split "
    "requires_grad alias _to_copy slice as_strided atleast_2d atleast_3d ravel lift_fresh_copy".split()
)
"""Same values, other shape, dtype or memory order, or a part of them."""

JOIN = frozenset("cat stack hstack vstack dstack".split())
"""Several tensors laid side by side."""

MOVE = frozenset(
    "roll flip rot90 pad constant_pad_nd repeat repeat_interleave tile index_select pixel_unshuffle".split()
)
"""Values moved to other places, or repeated."""

NORM = frozenset(
    "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize native_layer_norm "
    "native_batch_norm native_group_norm _native_batch_norm_legit_no_training".split()
)

ACTIVATION = frozenset(
    "relu relu6 gelu silu swish hardswish sigmoid hardsigmoid tanh hardtanh leaky_relu prelu elu celu selu "
    "rrelu mish softplus softsign glu logsigmoid threshold erf expit".split()
)

DROPOUT = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout native_dropout".split()
)

ELEMENTWISE = frozenset(
    "add sub rsub mul div neg pow square sqrt rsqrt reciprocal exp log log1p abs clamp clamp_min clamp_max "
    "minimum maximum where masked_fill lerp addcmul addcdiv positive rpow setitem copy nan_to_num".split()
)

REDUCTION = frozenset(
    "mean sum var std var_mean std_mean norm vector_norm linalg_vector_norm linalg_norm amax amin".split()
)

POOL = frozenset(
    "avg_pool2d max_pool2d max_pool2d_with_indices lp_pool2d adaptive_avg_pool2d adaptive_max_pool2d "
    "boolean_dispatch _max_pool2d _adaptive_avg_pool2d".split()
)

LEARNED = frozenset(
    "linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution addmm "
    "addbmm baddbmm multi_head_attention_forward lstm gru rnn_tanh rnn_relu embedding deform_conv2d "
    "unseen_operation".split()
)
"""Functions that apply learned weights (convolutions and linear layers called as modules come besides)."""

UPSAMPLE = frozenset("interpolate upsample grid_sample pixel_shuffle".split()) | {
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
}

ADD = frozenset({"add", "addcmul"})


def canonical_name(name: str) -> str:
    """One name for all spellings of an operation: `add_`, `__iadd__`, `__radd__` and `torch.add` are `add`."""
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    elif name.endswith("_") and not name.startswith("__"):
        name = name.rstrip("_")
    return _SPELLINGS.get(name, name)


def op_name(node: fx.Node) -> str:
    """Canonical name of the operation of a `call_function` or `call_method` node; empty for every other node."""
    target: Any = node.target
    if node.op == "call_method":
        return canonical_name(target)
    if node.op != "call_function":
        return ""
    if target is getattr:
        return canonical_name(str(node.args[1]))
    packet = getattr(target, "overloadpacket", target)  # torch.export writes aten.add.Tensor
    return canonical_name(getattr(packet, "__name__", type(packet).__name__))
