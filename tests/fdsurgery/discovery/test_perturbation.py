"""Positions and samples that a model keeps apart in ways that no mask in the graph shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from models import CASES
from torch import Tensor, nn
from torch.nn import functional as F

import fdsurgery
from fdsurgery.discovery import probe as probing

T, D = 12, 16
SEQUENCE = torch.randn(2, T, 8, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Mix = Callable[["Model", Tensor], Tensor]


class Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().cpu().numpy().cumsum(1))


class Model(nn.Module):
    """Layers for every position before and behind something that moves values between positions."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = mix
        self.embed, self.fc1, self.fc2 = nn.Linear(8, D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.cell, self.back = nn.GRUCell(D, D), nn.GRUCell(D, D)
        self.gru = nn.GRU(D, D, batch_first=True)
        self.both = nn.GRU(D, D // 2, batch_first=True, bidirectional=True)
        self.conv = nn.Conv1d(D, D, 3, padding=2)
        self.gate, self.spatial = nn.Linear(D, D), nn.Parameter(torch.randn(T, T) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.mix(self, x)
        return x + self.fc2(F.gelu(self.fc1(x)))


def steps(cell: nn.Module, x: Tensor) -> list[Tensor]:
    h, outs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = cell(x[:, t], h)
        outs.append(h)
    return outs


def loop(model: Model, x: Tensor) -> Tensor:
    return torch.stack(steps(model.cell, x), 1)


def loop_backwards(model: Model, x: Tensor) -> Tensor:
    return torch.stack(steps(model.cell, x.flip(1)), 1).flip(1)


def loop_of_cats(model: Model, x: Tensor) -> Tensor:
    return torch.cat([step[:, None] for step in steps(model.cell, x)], 1)


def loop_in_place(model: Model, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t, step in enumerate(steps(model.cell, x)):
        out[:, t] = step
    return out


def running_means(model: Model, x: Tensor) -> Tensor:
    return torch.stack([x[:, : t + 1].mean(1) for t in range(x.shape[1])], 1)


def chomp(model: Model, x: Tensor) -> Tensor:
    return F.relu(model.conv(x.transpose(1, 2))[:, :, :-2]).transpose(1, 2)


def padded(model: Model, x: Tensor) -> Tensor:
    return F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), model.conv.weight).transpose(1, 2)


def shifted(model: Model, x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) + x
    return x


def token_shift(model: Model, x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + F.pad(x, (0, 0, 1, -1))
    return x


def mask_of_features(model: Model, x: Tensor) -> Tensor:
    order = torch.cumsum(F.softplus(model.gate(x)).mean(-1), 1)
    scores = (x @ x.mT).masked_fill(order[:, None, :] > order[:, :, None], float("-inf"))
    return scores.softmax(-1) @ x


def decay(model: Model, x: Tensor) -> Tensor:
    """Retention: no softmax."""
    index = torch.arange(x.shape[1], device=x.device)
    return ((x @ x.mT) * (0.9 ** (index[:, None] - index)).tril()) @ x / 9


def spatial_gate(model: Model, x: Tensor) -> Tensor:
    return model.spatial.tril() @ x


def recurrent(model: Model, x: Tensor) -> Tensor:
    return model.gru(x)[0]


def autograd_function(model: Model, x: Tensor) -> Tensor:
    return Numpy.apply(x)


@torch.jit.script
def scripted_sum(x: Tensor) -> Tensor:
    return torch.cumsum(x, 1)


def scripted(model: Model, x: Tensor) -> Tensor:
    return scripted_sum(x)


LIBRARY = torch.library.Library("fdsurgery_test", "DEF")
LIBRARY.define("running(Tensor x) -> Tensor")
LIBRARY.impl("running", lambda x: x.cumsum(1), "CompositeExplicitAutograd")


def extension(model: Model, x: Tensor) -> Tensor:
    return torch.ops.fdsurgery_test.running(x)


def long_convolution(model: Model, x: Tensor) -> Tensor:
    n = x.shape[1]
    kernel = torch.fft.rfft(torch.exp(-torch.arange(n, device=x.device) / 4.0), n=2 * n)
    return torch.fft.irfft(torch.fft.rfft(x, n=2 * n, dim=1) * kernel[:, None], n=2 * n, dim=1)[:, :n]


def both_ways(model: Model, x: Tensor) -> Tensor:
    return loop(model, x) + torch.stack(steps(model.back, x.flip(1)), 1).flip(1)


def recurrent_both_ways(model: Model, x: Tensor) -> Tensor:
    return model.both(x)[0]


def centred_crop(model: Model, x: Tensor) -> Tensor:
    return F.conv1d(x.transpose(1, 2), model.conv.weight, padding=3)[:, :, 2:-2].transpose(1, 2)


def windows(model: Model, x: Tensor) -> Tensor:
    near = torch.stack([F.pad(x, (0, 0, 2, 2))[:, t : t + 5].mean(1) for t in range(x.shape[1])], 1)
    return near.roll(1, 1).roll(-1, 1)


def even_kernel(model: Model, x: Tensor) -> Tensor:
    return F.conv1d(x.transpose(1, 2), model.conv.weight[:, :, :2], padding=1)[:, :, :-1].transpose(1, 2)


def symmetric_mask_of_features(model: Model, x: Tensor) -> Tensor:
    values = model.gate(x).mean(-1)
    alike = (values[:, None, :] - values[:, :, None]).abs() > 0.5
    return (x @ x.mT).masked_fill(alike & ~torch.eye(T, dtype=torch.bool, device=x.device), -1e9).softmax(-1) @ x


ONE_SIDED: list[Mix] = [
    loop,
    loop_backwards,
    loop_of_cats,
    loop_in_place,
    running_means,
    chomp,
    padded,
    shifted,
    token_shift,
    mask_of_features,
    decay,
    spatial_gate,
    recurrent,
    autograd_function,
    scripted,
    extension,
    long_convolution,
]
TWO_SIDED: list[Mix] = [
    both_ways,
    recurrent_both_ways,
    centred_crop,
    windows,
    even_kernel,
    symmetric_mask_of_features,
]


def cautions(model: nn.Module, inputs: Any) -> dict[str, str]:
    return {site.name: site.caution for site in fdsurgery.sites(model.eval(), inputs) if site.caution}


@pytest.mark.parametrize("mix", ONE_SIDED, ids=lambda mix: mix.__name__)
def test_what_keeps_later_positions_from_earlier_ones(mix: Mix) -> None:
    told = cautions(Model(mix), SEQUENCE)
    assert {"embed", "fc1", "fc2"} <= set(told)
    later, earlier = ("earlier", "later") if mix is loop_backwards else ("later", "earlier")
    for name in ("embed", "fc1", "fc2"):
        assert f"{later} positions (axis 1 of 'input_0') do not reach {earlier} ones" in told[name]


@pytest.mark.parametrize("mix", TWO_SIDED, ids=lambda mix: mix.__name__)
def test_where_both_sides_meet_nothing_is_said(mix: Mix) -> None:
    assert cautions(Model(mix), SEQUENCE) == {}


class ThenFull(nn.Module):
    """All positions meet behind a loop over them."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.out = Model(loop), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.model(x)
        return self.out(F.scaled_dot_product_attention(x, x, x))


class PooledBothWays(nn.Module):
    """Two loops, one for each direction, that meet only in the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back, self.head = Model(loop), Model(loop_backwards), nn.Linear(2 * D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.there(x).mean(1), self.back(x).mean(1)], -1))


def test_what_meets_later_is_not_kept_apart() -> None:
    assert cautions(ThenFull(), SEQUENCE) == {}
    assert cautions(PooledBothWays(), SEQUENCE) == {}


class Rows(nn.Module):
    """A picture of which each row sees those above it, or those on both sides."""

    def __init__(self, axis: int, both: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.axis, self.both = axis, both
        self.stem, self.step = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
        self.body, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = list(self.stem(x).split(1, self.axis))
        for _ in range(1 + self.both):
            for i in range(1, len(rows)):
                rows[i] = rows[i] + F.relu(self.step(rows[i - 1]))
            rows = rows[::-1] if self.both else rows
        return self.head(F.relu(self.body(torch.cat(rows, self.axis))))


@pytest.mark.parametrize("axis", [2, 3])
def test_rows_and_columns_of_pictures(axis: int) -> None:
    told = cautions(Rows(axis, False), IMAGE)
    assert {"body", "head"} <= set(told) and f"axis {axis} of 'input_0'" in told["body"]
    assert cautions(Rows(axis, True), IMAGE) == {}


class CroppedPicture(nn.Module):
    """Convolutions padded all around; what sticks out at the end of an axis is cut off."""

    def __init__(self, rows: int, columns: int, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.columns = rows, columns
        self.convs = nn.ModuleList(nn.Conv2d(3 if not i else 16, 16, (3, 1), padding=(2, 0)) for i in range(depth))
        self.point = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x)[:, :, self.rows : x.shape[2] + self.rows])
        return self.point(x)


def test_pictures_cropped_on_one_side() -> None:
    assert "point" in cautions(CroppedPicture(0, 0), IMAGE)
    assert cautions(CroppedPicture(1, 0), IMAGE) == {}


class Frames(nn.Module):
    """A recurrent cell over the frames of a video, whose tokens are then taken together, or frame by frame."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.together = together
        self.patch, self.cell = nn.Conv2d(3, D, 4, 4), nn.GRUCell(D, D)
        self.fc1, self.fc2 = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, video: Tensor) -> Tensor:
        batch, frames = video.shape[:2]
        tokens = self.patch(video.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (batch, frames))
        h, seen = torch.zeros_like(tokens[:, 0]).flatten(0, 1), []
        for t in range(frames):
            h = self.cell(tokens[:, t].flatten(0, 1), h)
            seen.append(h.unflatten(0, (batch, -1)))
        x = torch.stack(seen, 1)
        x = x.flatten(1, 2) if self.together else x.flatten(0, 1)
        return self.fc2(F.gelu(self.fc1(x))).view(batch, frames, -1, D)


def test_frames_of_a_video() -> None:
    """Where each frame has a weight of its own, none is seen by another."""
    video = torch.randn(2, 8, 3, 8, 8)
    assert set(cautions(Frames(True), video)) == {"fc1", "fc2"}
    assert cautions(Frames(False), video) == {}


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.model = nn.Embedding(9, 8), Model(loop)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(self.words(ids))


def test_tokens_and_one_sample() -> None:
    assert {"model.fc1", "model.fc2"} <= set(cautions(Words(), torch.ones(1, T, dtype=torch.long)))


class UNet(nn.Module):
    """Without padding, with what is too much cut off, on one side or on both."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down1, self.down2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, 2)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 8, 3)
        self.centred = centred

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu(self.down1(x))
        x = self.up(F.relu(self.down2(wide)))
        cut = [wide.shape[-1] - x.shape[-1], wide.shape[-2] - x.shape[-2]]
        at = [size // 2 if self.centred else 0 for size in cut]
        wide = wide[:, :, at[1] : at[1] + x.shape[2], at[0] : at[0] + x.shape[3]]
        return self.last(torch.cat([wide, x], 1))


class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        import torchvision

        torch.manual_seed(0)
        self.offset, self.conv = nn.Conv2d(3, 18, 3, 1, 1), torchvision.ops.DeformConv2d(3, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x, self.offset(x))
        steps = [row + row.roll(1, -1) for row in x.unbind(2)]
        return self.point(torch.stack(steps, 2))


@pytest.mark.parametrize("model", [UNet(True), UNet(False), Deformable()], ids=["centred", "cropped", "deformable"])
def test_what_is_near_is_no_side(model: nn.Module) -> None:
    assert cautions(model, torch.randn(2, 3, 33, 33)) == {}


class Packs(nn.Module):
    """A batch in one sequence, or in as many windows as one sample has."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = rows
        self.patch, self.fc1, self.fc2 = nn.Conv2d(3, D, 4, 4), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        rows = tokens.reshape(len(x), self.rows, -1, D).transpose(0, 1).reshape(self.rows, -1, D)
        rows = rows + self.fc2(F.gelu(self.fc1(rows)))
        return rows.reshape(self.rows, len(x), -1, D).transpose(0, 1).reshape(len(x), -1, D)


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (4, 1), (4, 3)])
def test_samples_packed_together(rows: int, batch: int) -> None:
    told = cautions(Packs(rows), torch.randn(batch, 3, 16, 16))
    assert set(told) == {"fc1", "fc2"}
    expected = "batch" if batch == 1 else "doubled"
    assert expected in told["fc1"]


def test_one_sample_alone_is_no_packing() -> None:
    for name in ("test_vit", "test_resnet", "test_efficientnet"):
        assert cautions(timm.create_model(name), torch.randn(1, 3, 96, 96)) == {}
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 2), embed_dim=24, num_heads=(1, 2))
    assert cautions(swin, torch.randn(1, 3, 224, 224)) == {}


class Mixes(nn.Module):
    """As many entries as samples, each with a part of every sample."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.back = back
        self.embed, self.fc1, self.fc2 = nn.Linear(8, D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.gru = nn.GRU(D, D // 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gru(self.embed(x))[0]
        mixed = x.unflatten(1, (2, -1)).transpose(0, 1).flatten(1, 2)
        mixed = mixed + self.fc2(F.gelu(self.fc1(mixed)))
        return mixed.unflatten(1, (2, -1)).transpose(0, 1).flatten(1, 2) if self.back else mixed


def test_samples_that_share_an_entry() -> None:
    assert set(cautions(Mixes(True), SEQUENCE)) == {"fc1", "fc2"}
    assert cautions(Mixes(False), SEQUENCE) == {}, "the model's own results mix them"


@pytest.mark.parametrize("name", ["resnet50", "vit_small_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny"])
def test_common_models_need_no_probe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "kept_apart", lambda *_: pytest.fail("probed"))
    monkeypatch.setattr(probing, "packed_when_doubled", lambda *_: pytest.fail("doubled"))
    assert cautions(timm.create_model(name), None) == {}


def test_the_probe_leaves_the_model_as_it_is_and_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(loop)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    cautions(model, SEQUENCE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    monkeypatch.setattr(probing, "MOST_MULTIPLY_ADDS", 10)
    assert cautions(model, SEQUENCE) == {}, "too large to be tried"
    monkeypatch.undo()

    def fails(*_: Any) -> None:
        raise RuntimeError("a forward of ours")

    monkeypatch.setattr(probing, "kept_apart", fails)
    assert cautions(model, SEQUENCE) == {}


def test_weights_that_begin_at_zero_hide_nothing() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.cell = nn.Linear(8, D), nn.GRUCell(D, D)
            self.scale, self.fc = nn.Parameter(torch.zeros(D)), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.fc(x + self.scale * torch.stack(steps(self.cell, x), 1))

    model = Gated()
    assert set(cautions(model, SEQUENCE)) == {"embed", "fc"}
    assert not model.scale.any()


def test_what_is_kept_is_said_in_the_plan_and_may_be_overruled() -> None:
    model = Model(loop)
    plan = fdsurgery.plan(model, "ffn", example_inputs=SEQUENCE)
    reasons = {decision.site.name: decision.reason for decision in plan.kept}
    assert not plan.swaps and all("do not reach earlier ones" in reasons[name] for name in ("fc1", "fc2"))
    recipe = fdsurgery.recipe.parse_recipe("swap: [{where: {role: ffn}, anyway: true}]")
    assert {swap.site.name for swap in fdsurgery.plan(model, recipe, example_inputs=SEQUENCE).swaps} == {"fc1", "fc2"}


@pytest.mark.parametrize("name", ["timm resnet18", "timm convnext (1x1 FFN)", "timm swin", "hf swin", "hf segformer"])
def test_nothing_is_said_of_common_models_even_when_probed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = CASES[name].settled()
    monkeypatch.setattr(probing, "hint", lambda *_, **__: "as if there were one")
    assert cautions(model, x) == {}
