"""Who reads or writes the `weight` of a dynamic layer: nothing is lost, and what leaves the modulation out is told."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_surroundings import dynamic, perturb
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import fdsurgery
from fdconv import FDConfig, FDConv2d, FDLinear, NeutralWeightWarning, WeightReadError, strict_weight_reads

KINDS = {"conv": lambda: nn.Conv2d(4, 6, 3, padding=1), "linear": lambda: nn.Linear(4, 6)}
both = pytest.mark.parametrize("kind", list(KINDS))


def make(kind: str, *, neutral: bool = False) -> tuple[FDConv2d | FDLinear, Tensor]:
    torch.manual_seed(0)
    layer = dynamic(KINDS[kind]())
    if not neutral:
        perturb(layer)
    return layer, torch.randn(3, 4, 7, 6) if kind == "conv" else torch.randn(3, 5, 4)


READS: dict[str, Callable[[nn.Module], Any]] = {
    "norm": lambda layer: layer.weight.norm(),
    "sum of squares": lambda layer: (layer.weight**2).sum(),
    "function": lambda layer: torch.linalg.matrix_norm(layer.weight.flatten(1)),
    "view": lambda layer: layer.weight.view(6, -1) @ torch.ones(layer.weight[0].numel()),
    "row": lambda layer: layer.weight[0].sum(),
    "detached": lambda layer: layer.weight.detach().mean(),
    "data": lambda layer: layer.weight.data.abs().max(),
    "copy": lambda layer: copy.deepcopy(layer.weight),
    "clone": lambda layer: layer.weight.clone(),
    "pickle": lambda layer: pickle.dumps(layer.weight),
    "numpy": lambda layer: layer.weight.detach().numpy(),
    "list": lambda layer: layer.weight.tolist(),
    "text": lambda layer: repr(layer.weight),
    "rows": lambda layer: [row.sum() for row in layer.weight],
    "concatenated": lambda layer: torch.cat([layer.weight.flatten(), layer.weight.flatten()]),
    "another tensor": lambda layer: torch.zeros(layer.weight.shape).copy_(layer.weight.detach()),
    "convolution": lambda layer: (
        F.conv2d(torch.randn(1, 4, 5, 5), layer.weight)
        if isinstance(layer, FDConv2d)
        else F.linear(torch.randn(2, 4), layer.weight)
    ),
    "foreach": lambda layer: torch._foreach_norm([layer.weight]),
    "vector": lambda layer: nn.utils.parameters_to_vector([layer.weight]),
}
every_read = pytest.mark.parametrize("read", list(READS))


@both
@every_read
def test_a_read_of_values_warns_once_where_it_stands(kind: str, read: str) -> None:
    layer, _ = make(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            READS[read](layer)
    told = [one for one in caught if one.category is NeutralWeightWarning]
    assert len(told) >= 1
    assert len({(one.filename, one.lineno) for one in told}) == len(told)
    assert read in ("pickle", "vector", "copy", "text") or told[0].filename == __file__
    assert all(word in str(told[0].message) for word in (type(layer).__name__, "modulation", "sample_weights"))


@both
@every_read
def test_a_read_within_strict_raises_and_leaves_the_layer_alone(kind: str, read: str) -> None:
    layer, x = make(kind)
    y = layer(x)
    with strict_weight_reads(), pytest.raises(WeightReadError, match="modulation"):
        READS[read](layer)
    assert torch.equal(layer(x), y)


@both
@every_read
def test_neutral_layers_are_read_without_a_word(kind: str, read: str) -> None:
    layer, _ = make(kind, neutral=True)
    with warnings.catch_warnings(), strict_weight_reads():
        warnings.simplefilter("error")
        READS[read](layer)


@both
def test_metadata_is_read_without_a_word(kind: str) -> None:
    layer, _ = make(kind)
    static = KINDS[kind]()
    weight, plain = layer.weight, static.weight
    with warnings.catch_warnings(), strict_weight_reads():
        warnings.simplefilter("error")
        for name in "shape dtype device layout ndim is_meta requires_grad is_leaf is_cuda itemsize nbytes".split():
            assert getattr(weight, name) == getattr(plain, name), name
        for name in "size dim numel stride is_contiguous element_size is_floating_point storage_offset".split():
            assert getattr(weight, name)() == getattr(plain, name)(), name
        assert len(weight) == len(plain)
        assert weight.view(6, -1).shape == plain.view(6, -1).shape
        assert weight.flatten().stride() == plain.flatten().stride()
        assert weight.detach().requires_grad is weight.data.requires_grad is False
        assert weight[0].requires_grad
        assert isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy_": lambda weight, value: weight.copy_(value),
    "data.copy_": lambda weight, value: weight.data.copy_(value),
    "detach().copy_": lambda weight, value: weight.detach().copy_(value),
    "zero_": lambda weight, value: weight.zero_(),
    "fill_": lambda weight, value: weight.fill_(0.5),
    "mul_": lambda weight, value: weight.mul_(2),
    "add_": lambda weight, value: weight.add_(value, alpha=0.1),
    "clamp_": lambda weight, value: weight.clamp_(-0.1, 0.1),
    "data.clamp_": lambda weight, value: weight.data.clamp_(-0.1, 0.1),
    "chain": lambda weight, value: weight.mul_(2).add_(1),
    "item": lambda weight, value: weight.__setitem__(0, 1.0),
    "slice": lambda weight, value: weight.__setitem__((slice(1, 3), 0), value[1:3, 0]),
    "mask": lambda weight, value: weight.__setitem__(value > 0, 0.0),
    "row": lambda weight, value: weight[2].mul_(3),
    "view": lambda weight, value: weight.view(6, -1).copy_(value.view(6, -1)),
    "column of a view": lambda weight, value: weight.flatten(1)[:, 0].zero_(),
    "rows": lambda weight, value: [row.mul_(index) for index, row in enumerate(weight)],
    "unbound": lambda weight, value: weight.data.unbind()[3].zero_(),
    "chunks": lambda weight, value: weight.chunk(2)[1].copy_(value[3:]),
    "split": lambda weight, value: torch.split(weight, [2, 4])[1][0].neg_(),
    "unflattened": lambda weight, value: weight.data.unflatten(0, (2, 3))[1].fill_(1.0),
    "by strides": lambda weight, value: weight.data.as_strided((6,), (value[0].numel(),)).fill_(2.0),
    "moved to where it is": lambda weight, value: weight.data.to(value).float().cpu().type_as(value).zero_(),
    "transposed": lambda weight, value: weight.flatten(1).t()[0].fill_(1),
    "operators": lambda weight, value: weight.__imul__(0.5),
    "index_fill_": lambda weight, value: weight.index_fill_(0, torch.tensor([1]), 2.0),
    "masked_fill_": lambda weight, value: weight.masked_fill_(value > 0, 0.0),
    "init.ones_": lambda weight, value: nn.init.ones_(weight),
    "init.constant_": lambda weight, value: nn.init.constant_(weight, 0.1),
    "foreach": lambda weight, value: torch._foreach_mul_([weight], 2.0),
}


@both
@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.filterwarnings("ignore::fdconv.NeutralWeightWarning")
def test_what_is_written_goes_into_the_spectrum(kind: str, write: str) -> None:
    for neutral in (True, False):
        layer, _ = make(kind, neutral=neutral)
        static = layer.to_conv() if isinstance(layer, FDConv2d) else layer.to_linear()
        modulation = {
            name: p.detach().clone() for name, p in layer.named_parameters() if name.startswith(("KSM", "FBM"))
        }
        value = torch.randn(layer.weight.shape)
        with torch.no_grad():
            WRITES[write](layer.weight, value)
            WRITES[write](static.weight, value)
        assert not torch.equal(static.weight, KINDS[kind]().weight)
        torch.testing.assert_close(layer._neutral_weight(), static.weight, atol=2e-6, rtol=2e-5)
        assert all(torch.equal(dict(layer.named_parameters())[name], kept) for name, kept in modulation.items())
        assert layer.dft_weight.requires_grad


@both
@pytest.mark.parametrize(
    "draw",
    [
        lambda w: nn.init.normal_(w, std=0.3),
        lambda w: nn.init.uniform_(w),
        lambda w: nn.init.trunc_normal_(w, std=0.02),
        nn.init.kaiming_normal_,
        nn.init.kaiming_uniform_,
        nn.init.xavier_uniform_,
        nn.init.orthogonal_,
    ],
)
def test_initialisation_draws_what_the_static_layer_would_draw(kind: str, draw: Callable[[Tensor], Any]) -> None:
    """`model.apply(init)` means these layers too, and is no reading of the weight: no warning."""
    layer, _ = make(kind)
    static = KINDS[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(5)
        draw(layer.weight)
    torch.manual_seed(5)
    draw(static.weight)
    torch.testing.assert_close(layer._neutral_weight(), static.weight, atol=2e-6, rtol=2e-5)


@both
def test_augmented_assignment_through_the_layer(kind: str) -> None:
    layer, x = make(kind)
    y, bias = layer(x), layer.bias
    with torch.no_grad():
        layer.weight *= 2
        layer.weight[0] /= 2
        layer.bias *= 0
    unscaled = y - (bias if kind == "linear" else bias.view(-1, 1, 1)) * 0
    assert layer(x).shape == unscaled.shape
    static, _ = make(kind)
    assert torch.allclose(layer._neutral_weight()[1:], 2 * static._neutral_weight()[1:], atol=1e-6)
    assert torch.allclose(layer._neutral_weight()[0], static._neutral_weight()[0], atol=1e-6)


@both
def test_a_detached_weight_is_assigned_as_a_copy(kind: str) -> None:
    layer, x = make(kind)
    y = layer(x)
    layer.weight = nn.Parameter(layer.weight.detach())
    torch.testing.assert_close(layer(x), y)
    other, _ = make(kind, neutral=True)
    other.weight = nn.Parameter(layer.weight.data)
    other.bias = layer.bias
    plain = layer.to_conv() if isinstance(layer, FDConv2d) else layer.to_linear()
    torch.testing.assert_close(other(x), plain(x))


@both
@pytest.mark.filterwarnings("ignore::fdconv.NeutralWeightWarning")
def test_a_weight_may_be_assigned(kind: str) -> None:
    layer, x = make(kind, neutral=True)
    static = KINDS[kind]()
    layer.weight, layer.bias = static.weight, static.bias
    torch.testing.assert_close(layer(x), static(x), atol=2e-6, rtol=2e-5)
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape), requires_grad=False)
    assert not layer.dft_weight.any() and not layer.dft_weight.requires_grad
    layer.weight.data = static.weight.data
    torch.testing.assert_close(layer(x), static(x), atol=2e-6, rtol=2e-5)


@both
@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        (lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(3, 3))), ValueError, "shape"),
        (lambda layer: setattr(layer, "weight", layer.weight.detach().double().clone()), TypeError, "float64"),
        (lambda layer: setattr(layer, "weight", None), TypeError, "set_weight"),
        (lambda layer: delattr(layer, "weight"), AttributeError, "set_weight"),
        (lambda layer: layer.register_parameter("weight", nn.Parameter(torch.zeros(1))), RuntimeError, "set_weight"),
        (lambda layer: layer.weight.mul_(2), RuntimeError, "no_grad"),
        (lambda layer: layer.weight.resize_(2), RuntimeError, "shape"),
        (lambda layer: layer.weight.data.t_(), RuntimeError, "shape"),
        (lambda layer: torch.add(layer.weight.data, 1, out=layer.weight.data), RuntimeError, "set_weight"),
        (lambda layer: layer.weight.register_hook(print), RuntimeError, "dft_weight"),
        (lambda layer: layer.weight.data_ptr(), RuntimeError, "memory"),
        (lambda layer: layer.weight.untyped_storage(), RuntimeError, "memory"),
        (lambda layer: setattr(layer.weight, "grad", torch.zeros(layer.weight.shape)), RuntimeError, "dft_weight"),
        (lambda layer: layer.weight.detach().numpy().fill(0), ValueError, "read-only"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), RuntimeError, "set_weight"),
        (
            lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.3),
            RuntimeError,
            "prun",
        ),
        (
            lambda layer: prune.custom_from_mask(layer, "weight", torch.ones(layer.weight.shape)),
            RuntimeError,
            "set_weight",
        ),
        (lambda layer: torch.optim.SGD([layer.weight], 0.1), WeightReadError, "give the optimizer layer.dft_weight"),
        (lambda layer: torch.optim.AdamW([{"params": layer.weight}]), WeightReadError, "model.parameters"),
        (lambda layer: setattr(layer, "weight", copy.deepcopy(layer).weight), TypeError, "tied.*clone"),
        (lambda layer: nn.utils.parametrizations.weight_norm(layer), (RuntimeError, ValueError), "weight"),
        (lambda layer: nn.utils.parametrizations.spectral_norm(layer), (RuntimeError, ValueError), "weight"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_changed(
    kind: str, wrong: Callable[[Any], Any], error: Any, said: str
) -> None:
    layer, x = make(kind, neutral=True)
    y, keys = layer(x), list(layer.state_dict())
    with pytest.raises(error, match=said):
        wrong(layer)
    assert torch.equal(layer(x), y) and list(layer.state_dict()) == keys


def test_pruning_many_layers_at_once_is_refused_before_the_first() -> None:
    plain, layer = nn.Conv2d(4, 6, 3), dynamic(nn.Conv2d(4, 6, 3))
    with pytest.raises(WeightReadError, match="prun"):
        prune.global_unstructured([(plain, "weight"), (layer, "weight")], prune.L1Unstructured, amount=0.3)
    assert list(dict(plain.named_parameters())) == ["weight", "bias"]


@both
def test_freezing_the_weight_freezes_the_spectrum(kind: str) -> None:
    for freeze in (
        lambda layer: setattr(layer.weight, "requires_grad", False),
        lambda layer: layer.weight.requires_grad_(False),
        lambda layer: layer.weight.requires_grad_(requires_grad=False),
    ):
        layer, _ = make(kind)
        freeze(layer)
        assert not layer.dft_weight.requires_grad and not layer.weight.requires_grad
        assert layer.bias.requires_grad
        layer.weight.requires_grad = True
        assert layer.dft_weight.requires_grad
        layer.weight.data.requires_grad = False  # of a tensor of its own
        assert layer.dft_weight.requires_grad


@both
def test_gradients_are_those_of_the_spectrum(kind: str) -> None:
    layer, x = make(kind)
    assert layer.weight.grad is None
    layer(x).sum().backward()
    with pytest.warns(NeutralWeightWarning, match=r"dft_weight\.grad"):
        assert layer.weight.grad is None
    layer.weight.grad = None
    assert layer.dft_weight.grad is None


# Norms that are folded into the weight -----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("neutral", [True, False])
def test_folding_a_norm_by_torchs_own_helpers_is_exact(kind: str, neutral: bool) -> None:
    layer, x = make(kind, neutral=neutral)
    norm = nn.BatchNorm2d(6) if kind == "conv" else nn.BatchNorm1d(6)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
    model = nn.Sequential(layer, norm).eval()
    x = x if kind == "conv" else x[:, 0]
    fold = fuse_conv_bn_eval if kind == "conv" else fuse_linear_bn_eval
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = fold(*model)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(layer(x), model[0](x))


def test_code_that_folds_and_makes_plain_layers_is_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = perturb(dynamic(nn.Conv2d(4, 6, 3)))

        def fuse(self) -> nn.Conv2d:
            conv = nn.Conv2d(4, 6, 3)
            conv.weight.data.copy_(self.conv.weight.data)
            return conv

    with pytest.raises(WeightReadError, match=r"fuse .*fuse_norms"):
        Block().fuse()


# Compiled code -----------------------------------------------------------------------------------------------------


class Reads(nn.Module):
    def __init__(self, values: bool) -> None:
        super().__init__()
        self.layer = dynamic(nn.Linear(4, 6))
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.layer.weight.dtype)
        return F.linear(x, self.layer.weight) if self.values else self.layer(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_that_reads_values_tells_when_it_runs(backend: str) -> None:
    torch._dynamo.reset()
    model = Reads(values=True)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NeutralWeightWarning)
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
    perturb(model.layer)
    with pytest.warns(NeutralWeightWarning, match="compiled code"):
        compiled(x).sum().backward()
    assert model.layer.dft_weight.grad is not None
    with strict_weight_reads(), pytest.raises(WeightReadError):
        compiled(x)


def test_compiled_code_that_reads_metadata_says_nothing() -> None:
    torch._dynamo.reset()
    model = Reads(values=False)
    perturb(model.layer)
    x = torch.randn(3, 4)
    with warnings.catch_warnings(), strict_weight_reads():
        warnings.simplefilter("error", NeutralWeightWarning)
        assert torch.allclose(torch.compile(model, backend="aot_eager")(x), model(x), atol=1e-5)


# Plain state dicts -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("ratio", [1, 2])
def test_a_plain_state_dict_is_taken_over(kind: str, strict: bool, assign: bool, ratio: int) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(KINDS[kind](), nn.ReLU())
    model = nn.Sequential(dynamic(KINDS[kind](), FDConfig(kernel_num=5, param_ratio=ratio)), nn.ReLU())
    x = torch.randn(3, 4, 7, 6) if kind == "conv" else torch.randn(3, 5, 4)
    state = plain.state_dict()
    fc = model[0].KSM_Global.fc.weight.detach().clone()
    result = model.load_state_dict(state, strict=strict, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(model(x), plain(x), atol=2e-6, rtol=2e-5)
    assert list(state) == ["0.weight", "0.bias"]
    assert torch.equal(model[0].KSM_Global.fc.weight, fc)
    perturb(model[0])
    with pytest.warns(UserWarning, match="modulation had learned is gone"):
        model.load_state_dict(state, strict=strict, assign=assign)
    torch.testing.assert_close(model(x), plain(x), atol=2e-6, rtol=2e-5)
    assert model[0].is_neutral()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@both
def test_a_plain_state_dict_materialises_a_model_on_meta(kind: str) -> None:
    plain = KINDS[kind]()
    with torch.device("meta"):
        layer = dynamic(KINDS[kind]())
    before = torch.random.get_rng_state()
    layer.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(before, torch.random.get_rng_state())
    x = torch.randn(3, 4, 7, 6) if kind == "conv" else torch.randn(3, 5, 4)
    torch.testing.assert_close(layer(x), plain(x), atol=2e-6, rtol=2e-5)


@both
def test_a_plain_state_dict_of_another_shape_is_refused_like_any_other(kind: str) -> None:
    layer, x = make(kind)
    y = layer(x)
    state = {name: tensor[:4] for name, tensor in KINDS[kind]().state_dict().items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for weight.*static weight"):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), y)
    odd = KINDS[kind]().state_dict() | {"weight_mask": torch.ones(1)}
    with pytest.raises(RuntimeError, match="weight_mask"):
        layer.load_state_dict(odd)
    missing = {"weight": KINDS[kind]().weight.detach()}
    with pytest.warns(UserWarning, match="modulation"), pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        make(kind)[0].load_state_dict(missing)


def test_a_whole_network_takes_a_plain_checkpoint_over() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1)
        )

    x = torch.randn(2, 3, 9, 9)
    model, trained = net(), net()
    fdsurgery.convert(model, example_inputs=x)
    buffer = io.BytesIO()
    torch.save(trained.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer))
    model.eval()
    torch.testing.assert_close(model(x), trained.eval()(x), atol=1e-5, rtol=1e-4)


# Numbers -----------------------------------------------------------------------------------------------------------


def test_a_spectrum_that_float16_cannot_hold_is_refused() -> None:
    linear = nn.Linear(64, 64).half()
    with torch.no_grad():
        linear.weight.fill_(6000)  # a sum of 64*64*6000 over 64
    with pytest.raises(ValueError, match=r"float16 holds numbers up to 6\.55e\+04.*float32 or bfloat16"):
        FDLinear.from_linear(linear)
    layer = FDLinear.from_linear(linear.bfloat16())
    assert torch.allclose(layer._neutral_weight().float(), linear.weight.float(), rtol=1e-2)


@both
def test_a_bias_that_comes_without_its_weight_is_told(kind: str) -> None:
    """Code that keeps the keys of a checkpoint that a model has, too, leaves the plain weight out."""
    layer, _ = make(kind)
    model = nn.ModuleDict({"it": layer})
    with pytest.warns(
        UserWarning, match="has the bias of the dynamic layer 'it', and neither its dft_weight nor a plain"
    ):
        model.load_state_dict({"it.bias": layer.bias}, strict=False)
