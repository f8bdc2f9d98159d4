"""Models prepared for inference compute what they did, and calls that were recorded are replayed as they should be."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from models import CASES, small_vit
from torch import Tensor, nn

import fdsurgery
from fdconv import FDConfig, FDConv2d, FDLinear
from fdconv.inference import PreparedModulation, prepare
from fdsurgery import UnsupportedModelError
from fdsurgery.inference import GRAPHS, Replayed
from fdsurgery.rewrite.folded import folded_norms


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def stir(model: nn.Module) -> nn.Module:
    """Take modulation far from neutral, with statistics that are not those of a fresh norm."""
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (FDConv2d, FDLinear)):
                for branch in (layer.KSM_Global, layer.KSM_Local, layer.FBM):
                    for parameter in [] if branch is None else branch.parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.02)
                if layer.KSM_Global is not None and layer.KSM_Global.bn is not None:
                    layer.KSM_Global.bn.running_mean.normal_(std=0.1)
                    layer.KSM_Global.bn.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("name", CASES)
def test_outputs_stay(name: str) -> None:
    # In float64: modulation far from neutral makes some of these models chaotic.
    model, x = CASES[name].settled()
    stir(fdsurgery.convert(model)).double()
    x = x.double()
    before = copy.deepcopy(model.state_dict())
    expected = logits_of(model(x)).detach()
    fast = fdsurgery.compile_for_inference(model)
    found = logits_of(fast(x))
    assert (found - expected).norm() < 1e-8 * expected.norm()
    assert not found.requires_grad
    assert type(fast) is type(model)
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert any(parameter.requires_grad for parameter in model.parameters())


CONFIGS = {
    "paper": FDConfig(),
    "rms": FDConfig(norm="rms"),
    "batch": FDConfig(norm="batch"),
    "softmax, temperatures": FDConfig(kernel_activation="softmax", temperature=3.0, kernel_temperature=0.5),
    "tanh": FDConfig(global_activation="tanh", param_ratio=2),
    "one group": FDConfig(kernel_num=1),
    "no local branch": FDConfig(ksm_local=False),
    "no global branch": FDConfig(ksm_global=False),
}
LAYERS: dict[str, tuple[Callable[[FDConfig], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda config: FDConv2d(12, 20, 3, padding=1, config=config), (3, 12, 9, 7)),
    "depthwise": (lambda config: FDConv2d(12, 12, 3, padding=1, groups=12, bias=False, config=config), (3, 12, 9, 7)),
    "linear": (lambda config: FDLinear(12, 20, config=config), (3, 5, 12)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_every_kind(kind: str, config: str, dtype: torch.dtype) -> None:
    build, shape = LAYERS[kind]
    layer = stir(build(CONFIGS[config])).eval().to(dtype)
    x = torch.randn(shape, dtype=dtype)
    fast = copy.deepcopy(layer)
    prepare(fast)  # type: ignore[arg-type]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    x.requires_grad_()
    results = [layer(x), fast(x)]
    slopes = [torch.autograd.grad(y.square().sum(), x)[0] for y in results]
    for found, expected in (reversed(results), reversed(slopes)):
        assert found.dtype == dtype
        assert (found - expected).norm() < tolerance * expected.norm()


def test_other_ways_to_call_it() -> None:
    model, x = CASES["timm convnext (1x1 FFN)"].settled()
    stir(fdsurgery.convert(model))
    expected = model(x).detach()
    fast = fdsurgery.compile_for_inference(model)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (fast(x).float() - expected).norm() < 0.05 * expected.norm()
    torch.testing.assert_close(torch.compile(fast, backend="eager")(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.forward_features(x), model.forward_features(x), rtol=1e-4, atol=1e-4)


def test_only_what_is_prepared_takes_memory() -> None:
    model, _ = CASES["timm resnet18"].settled()
    fdsurgery.convert(model)
    fast = fdsurgery.compile_for_inference(model)
    held = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    own = [name for name, tensor in fast.named_parameters() if tensor.data_ptr() not in held]
    assert all(name.endswith(("dft_weight", "bias")) for name in own)  # biases, of norms that are folded
    folded = tuple(folded_norms(fast))
    own = [name for name, tensor in fast.named_buffers() if tensor.data_ptr() not in held]
    own = [name for name in own if not name.startswith(folded)]
    assert all(name.endswith(("frequency_group", "filter_scale")) or "KSM_Global" in name for name in own)


def test_it_refuses_to_train_and_to_be_saved() -> None:
    model, _ = CASES["timm resnet18"].settled()
    fast = fdsurgery.compile_for_inference(fdsurgery.convert(model))
    assert fast.eval() is fast
    for refused in (fast.train, fast.state_dict):
        with pytest.raises(RuntimeError, match=r"prepared for inference and cannot (train|be saved): use"):
            refused()


def test_a_model_in_training_gives_one_in_evaluation() -> None:
    model, x = CASES["timm resnet18"].settled()
    fdsurgery.convert(model).train()
    fast = fdsurgery.compile_for_inference(model)
    assert model.training and not any(module.training for module in fast.modules())
    torch.testing.assert_close(fast(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_synchronised_norms_are_prepared() -> None:
    layer = stir(FDConv2d(8, 8, 3, config=FDConfig(norm="batch"))).eval()
    x = torch.randn(2, 8, 6, 6)
    expected = layer(x)
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert isinstance(layer.KSM_Global.bn, nn.SyncBatchNorm)
    prepare(layer)
    assert isinstance(layer.KSM_Global, PreparedModulation)
    torch.testing.assert_close(layer(x), expected)


def test_what_has_nothing_to_prepare_is_told() -> None:
    with pytest.raises(UnsupportedModelError, match=r"has no dynamic layers to prepare: convert it first"):
        fdsurgery.compile_for_inference(small_vit())
    fast = fdsurgery.compile_for_inference(fdsurgery.convert(small_vit()))
    with pytest.raises(UnsupportedModelError, match="prepared for inference already"):
        fdsurgery.compile_for_inference(fast)
    with pytest.raises(UnsupportedModelError, match="the model is compiled"):
        fdsurgery.compile_for_inference(torch.compile(fdsurgery.convert(CASES["timm resnet18"].settled()[0])))  # type: ignore[arg-type]


# Recorded calls. What records is the GPU's; a stand-in writes to the same memory again, as a graph does.


class Recorder:
    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        outputs = run()

        def replay() -> None:
            self.replayed += 1
            places, again = torch.utils._pytree.tree_leaves(outputs), torch.utils._pytree.tree_leaves(run())
            with torch.inference_mode():  # a graph asks nobody
                for place, value in zip(places, again, strict=True):
                    if isinstance(place, Tensor):
                        place.copy_(value)

        return replay, outputs


def twice(x: Tensor, factor: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"y": x * factor, "more": more.get("z"), "pair": (x.sum(), 3)}


def test_calls_of_one_shape_share_a_graph_and_results_their_own_memory() -> None:
    recorder = Recorder()
    call = Replayed(twice, recorder)
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    one, two = call(first), call(second)
    assert torch.equal(one["y"], first * 2) and torch.equal(two["y"], second * 2)
    assert two["pair"][1] == 3 and two["more"] is None
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    call(first, factor=2.0)
    assert recorder.recorded == 2, "the same by keyword is another way to call it"
    assert torch.equal(call(first, factor=3.0)["y"], first * 3)
    assert torch.equal(call(first.double())["y"], first.double() * 2)
    assert torch.equal(call(first[:1])["y"], first[:1] * 2)
    assert torch.equal(call(first.T.contiguous().T)["y"], first * 2)
    assert recorder.recorded == 6
    assert torch.equal(call(first, z=second)["more"], second)
    assert recorder.recorded == 7


def test_inference_mode_and_no_grad_share_a_graph() -> None:
    x = torch.randn(3, requires_grad=True)
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        recorder = Recorder()
        call = Replayed(twice, recorder)
        with first():
            assert torch.equal(call(x)["y"], x * 2)
        with second():
            assert torch.equal(call(x + 1)["y"], (x + 1) * 2)
        assert not call(x)["y"].requires_grad
        assert (recorder.recorded, recorder.replayed) == (1, 3)


@pytest.mark.parametrize("outside", [True, False])
def test_a_graph_reads_nothing_that_autocast_caches(outside: bool) -> None:
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append(torch.is_autocast_cache_enabled())
        if len(seen) > 1:
            raise RuntimeError("not again")
        return x

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=outside):
        call = Replayed(forward, Recorder())
        with pytest.raises(RuntimeError, match="not again"):
            call(torch.randn(3))
        assert torch.is_autocast_cache_enabled() == outside
        with pytest.warns(UserWarning, match="not again"), pytest.raises(RuntimeError, match="not again"):
            call(torch.randn(4))
        assert torch.is_autocast_cache_enabled() == outside
    assert seen[0] is False


def test_graphs_are_limited() -> None:
    recorder = Recorder()
    call = Replayed(twice, recorder)
    for size in range(1, GRAPHS + 4):
        x = torch.randn(size)
        assert torch.equal(call(x)["y"], x * 2)
    assert recorder.recorded == GRAPHS
    assert torch.equal(call(x[:1])["y"], x[:1] * 2)
    assert recorder.replayed == GRAPHS + 1


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    def refuse(run: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    call = Replayed(twice, refuse)
    x = torch.randn(3)
    with pytest.warns(UserWarning, match=r"cannot be recorded: operation not permitted when stream is capturing$"):
        assert torch.equal(call(x)["y"], x * 2)
    assert torch.equal(call(x)["y"], x * 2)

    class Hidden:
        def __init__(self, y: Tensor) -> None:
            self.y = y

    recorder = Recorder()
    hidden = Replayed(lambda x: Hidden(x * 2), recorder)
    with pytest.warns(UserWarning, match="its result holds a Hidden"):
        hidden(x)
    assert torch.equal(hidden(x * 3).y, x * 6)
    strange = Replayed(twice, recorder)
    assert torch.equal(strange(x, z=Hidden(x))["y"], x * 2), "what its inputs hold is not seen"
    assert recorder.replayed == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["timm resnet18", "timm convnext (linear FFN)"])
def test_graphs_on_a_gpu(name: str) -> None:
    model, x = CASES[name].settled()
    stir(fdsurgery.convert(model)).cuda()
    fast = fdsurgery.compile_for_inference(model)
    for batch in (x, x.flip(0), x[:1], x):
        expected = logits_of(model(batch.cuda()))
        assert (logits_of(fast(batch.cuda())) - expected).norm() < 1e-3 * expected.norm()
    assert len(fast.forward.graphs) == 2 and all(fast.forward.graphs.values())  # type: ignore[union-attr]


@pytest.mark.long
def test_prepared_copies_are_copied_pickled_and_exported() -> None:
    x = torch.randn(2, 3, 32, 32)
    model = fdsurgery.testing.settle_(timm.create_model("test_resnet"), x)
    fast = fdsurgery.compile_for_inference(stir(fdsurgery.convert(model)).double())  # in float64 as above
    x = x.double()
    expected = fast(x)
    assert isinstance(fast.forward, Replayed)
    fast.forward.graphs["a call"] = None
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert isinstance(other.forward, Replayed) and other.forward.forward.__self__ is other  # type: ignore[attr-defined]
        assert not other.forward.graphs, "a graph reads the memory of the model that it was recorded for"
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            next(other.parameters()).zero_()
    assert torch.equal(fast(x), expected)
    more = torch.randn(5, *x.shape[1:]).double()
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(fast, (x,), dynamic_shapes=batch).module()
    torch.testing.assert_close(exported(more), fast(more))
