"""The contract of an operator, with defaults: whatever differs from one kind of dynamic layer to another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, nn

from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..discovery.site import Site

ParameterKind = Literal["weight", "modulation", "bias"]
"""What a parameter is to a dynamic layer: it stands for the plain weight, it changes that weight by the input (gates
and what computes them), or it is the plain bias."""


class Shaped(Protocol):
    """A tensor, or what a file tells of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Operator:
    """A kind of dynamic layer that can stand for a plain one. Operators hold no state.

    An operator needs `name`, `settings`, `owns`, `settings_of`, `restore`, and `replace` or `build`; every other method
    has a default that is right for an operator that does nothing special there.

    Examples:
        >>> import fdsurgery
        >>> class Mine(fdsurgery.Operator):  # see "Add an operator" for a whole one
        ...     name = "mine"
        ...     def settings(self, values):
        ...         return {"kernels": 4, **values}
        >>> Mine().settings_schema()
        {'kernels': {'description': 'default 4'}}
    """

    name: str
    """As recipes, plans and saved models call it."""
    title: str = ""
    """Name with a link, in Markdown, for model cards."""

    # What a recipe says

    def settings(self, values: dict[str, Any]) -> dict[str, Any]:
        """`values` completed with the defaults, as plain JSON types. Raises `RecipeError` for what is not a setting."""
        raise NotImplementedError

    def saved_settings(self, values: dict[str, Any]) -> dict[str, Any]:
        """As `settings`, of what an earlier version may have saved, which means what it meant there."""
        return self.settings(values)

    def settings_schema(self) -> dict[str, dict[str, Any]]:
        """The JSON schema of each setting, for editors."""
        return {key: {"description": f"default {default!r}"} for key, default in self.settings({}).items()}

    # What a plan says

    def refusal(self, site: Site, settings: dict[str, Any]) -> str | None:
        """Why this operator cannot take the site, in words; None if it can."""
        return None

    def refusal_of_trained(self, site: Site, settings: dict[str, Any]) -> str | None:
        """As `refusal`, where a trained layer is to be loaded, and it does not matter how a fresh one would start."""
        return self.refusal(site, settings)

    def resolve(self, sites: Sequence[Site], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The settings of all sites that a plan gives to this operator, completed with what follows from all of them.

        Asked again whenever a plan changes, with what it had answered before.

        Args:
            sites: in the model's order.
            settings: of each.
        """
        return list(settings)

    def multiply_adds(self, layer: nn.Module, sample: tuple[int, ...]) -> dict[str, int]:
        """What a call costs beyond the plain layer, by component; nothing if it is not counted.

        Args:
            layer: made by this operator, without memory.
            sample: shape of one sample's input, without the batch.
        """
        return {}

    # The layers

    def replace(self, layer: nn.Module, settings: dict[str, Any]) -> nn.Module:
        """A dynamic layer that computes what `layer` does, with its device, dtype, mode and `requires_grad`.

        Its class is derived from the plain layer's. Its `weight` is no parameter, but a property that gives a copy of
        the static weight: frameworks initialise what they find there in place.
        """
        raise NotImplementedError

    def build(
        self, names: Sequence[str], layers: Sequence[nn.Module], settings: Sequence[dict[str, Any]]
    ) -> list[nn.Module]:
        """The dynamic layers of one model, made together: by default each for itself.

        Where they share a weight, one of them owns it, as a parameter, and the others hold the owner in an attribute
        that `nn.Module` does not register (a tuple).

        Args:
            names: of the layers, in the model's order.
            layers: the plain ones, which stay as they are; perhaps on meta.
            settings: of each.
        """
        return [self.replace(layer, its) for layer, its in zip(layers, settings, strict=True)]

    builds_together: bool = False
    """True if the layers of one model cannot be built one by one, because they share weights."""

    def owns(self, layer: nn.Module) -> bool:
        """True for the layers that `build` makes."""
        raise NotImplementedError

    def settings_of(self, layer: nn.Module) -> dict[str, Any]:
        """The settings that a layer of this operator was made with."""
        raise NotImplementedError

    def restore(self, layer: nn.Module) -> nn.Module:
        """The plain layer that a layer of this operator stands for at neutral modulation."""
        raise NotImplementedError

    def release(self, leaving: Collection[nn.Module], staying: Sequence[nn.Module]) -> None:
        """Have the layers that stay in a model own what they compute with, when others leave it.

        Only operators whose layers share weights have something to do. What a layer computes does not change.

        Args:
            leaving: layers of this operator, in whose places are plain ones by now.
            staying: the dynamic layers that are still in the model, in its order.
        """

    # Training

    def parameter_kinds(self, layer: nn.Module) -> dict[nn.Parameter, ParameterKind]:
        """What the parameters of a layer are to it; those left out count as its weight."""
        bias = getattr(layer, "bias", None)
        return {bias: "bias"} if isinstance(bias, nn.Parameter) else {}

    def undecayed(self, layer: nn.Module) -> Collection[nn.Parameter]:
        """Parameters that weight decay would harm, beside biases, norms, scalars and vectors, which need no telling."""
        return ()

    def schedule(self, layer: nn.Module, progress: float) -> bool:
        """Set what a layer's training changes as it goes on, such as a temperature; False if it has no such thing.

        Args:
            layer: one of this operator.
            progress: 0 at the first step of the schedule, 1 at its end and ever after.
        """
        return False

    # Inference

    def prepare(self, layer: nn.Module) -> None:
        """Compute what depends on no input, in a layer of a copy that only infers."""

    def is_prepared(self, layer: nn.Module) -> bool:
        """True if `prepare` has changed the layer so that it cannot be saved or trained."""
        return False

    folds_norms: bool = False
    """True if `scale_filters` and `expect_scale` are there."""

    def scale_filters(self, layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
        """Have the layer's outputs multiplied and shifted, exactly, whatever its modulation is.

        Tensors of the layer are exchanged, never written into.

        Args:
            layer: in evaluation mode.
            scale: `(C_out,)`, float64.
            shift: `(C_out,)`, float64.
        """
        raise NotImplementedError

    def is_scaled(self, layer: nn.Module) -> bool:
        """True if `scale_filters` was applied."""
        return False

    def expect_scale(self, layer: nn.Module, *, bias: bool) -> None:
        """Make a new layer ready for the state dict of one that was scaled, with a bias or without."""
        raise NotImplementedError

    # What is looked at

    def band_maps(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The maps by which a layer weighs the frequency bands of an input; None for a layer that does not.

        Args:
            layer: in evaluation mode.
            x: its input, `(B, C, H, W)` for a convolution.

        Returns:
            `(B, groups, maps, H, W)`, the map of the highest band first, neutral at 1.
        """
        return None

    def kernels(self, layer: nn.Module) -> Tensor | None:
        """The kernels that a layer mixes anew for each sample; None for a layer that mixes none.

        Returns:
            `(K, C_out, C_in/groups, k_h, k_w)`, 1x1 for a linear layer. As they are mixed with equal shares, their mean
            is the static weight, but for FDConv's and FADC's, which add up to it.
        """
        return None

    # What is saved

    leaf: str | None = None
    """A tensor in the state dict of each layer of this operator, and of no plain layer."""

    unseen_settings: tuple[str, ...] = ()
    """Settings that the shapes of a layer's tensors do not tell."""

    def settings_of_tensors(self, plain: nn.Module, tensors: Mapping[str, Shaped], official: bool) -> dict[str, Any]:
        """What the tensors of a saved layer tell of its settings.

        Args:
            plain: the layer in whose place it is.
            tensors: by their names within the layer.
            official: True if they are of the authors' code.
        """
        return {}

    def check_tensors(self, settings: dict[str, Any], tensors: Mapping[str, Shaped]) -> str | None:
        """Why the tensors of a saved layer cannot be those of these settings, in words; None if they can."""
        return None

    def load_official(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        """A layer, or a chain of them, of the authors' own code, from its state and what its constructor was given.

        Args:
            state: the state dict, under the official names.
            config: shapes and settings, under the names that the authors' constructor has for them.

        Raises:
            CheckpointError: a setting is missing or unknown, or the state does not fit.
        """
        raise CheckpointError(f"layers of the authors' code cannot be read as {self.name}")

    def to_official(self, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The tensors of this operator's layers in a model, as the authors' code has them.

        Args:
            layers: all of them, by name; perhaps on meta.

        Returns:
            By the names that they have in the state dict of the authors' whole model.

        Raises:
            CheckpointError: the authors' code has no such layers.
        """
        raise CheckpointError(f"no form of the authors' is known for layers of {self.name}")

    def from_official(self, layers: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo `to_official`.

        Args:
            layers: as for `to_official`, made with the settings that the authors' layers have.
            state: of the authors' whole model; has every name that `to_official` gives.

        Returns:
            Tensors of the layers by their full names in our model, as far as the authors' code saves them.
        """
        raise CheckpointError(f"no form of the authors' is known for layers of {self.name}")

    def is_official(self, names: Collection[str]) -> bool:
        """True if a checkpoint with tensors of these names is of the authors' code, in the form of `to_official`."""
        return False

    official: OfficialForm | None = None
    """How the authors' code saves such layers; None if that can be neither read nor written."""


class OfficialForm:
    """Checkpoints of the authors' own code. Names of tensors within a layer are the same in both forms."""

    def is_official(self, leaves: Collection[str]) -> bool:
        """True if the names of a layer's tensors are those of the authors' code and not ours."""
        raise NotImplementedError

    def starts_anew(self, leaf: str, present: Collection[str]) -> bool:
        """True for a tensor of ours that an official layer, which has the tensors `present`, may lack."""
        return False

    def is_ours_alone(self, leaf: str) -> bool:
        """True for tensors that the authors' code does not read."""
        return False

    def misfit(self, present: Collection[str], expected: Collection[str]) -> str | None:
        """Why an official layer with the tensors `present` is none with those `expected`; None if it may be."""
        return None

    def factors(self, layer: nn.Module) -> dict[str, Tensor]:
        """By what each tensor of an official layer is multiplied to be ours: float64, broadcasts to the tensor."""
        return {}

    def complete(self, layer: nn.Module) -> None:
        """Give what an official checkpoint lacks its start, in a layer whose memory holds anything."""

    settings: Mapping[str, Any] = MappingProxyType({})
    """With which a plain checkpoint becomes what the authors' own tool would make of it."""

    def obstacle(self, layer: nn.Module, *, from_plain: bool) -> str | None:
        """Why the authors' code cannot hold a layer, in words; None if it can."""
        return None

    written_of_plain: tuple[str, ...] = ()
    """Tensors that the authors' own tool makes of a plain checkpoint's weight."""

    def notes_on_reading(self) -> Iterator[str]:
        """What to know of a model that was read from such a checkpoint."""
        return iter(())

    def notes_on_writing(
        self, layers: Mapping[str, nn.Module], read: Callable[[str, str], Tensor | None], *, from_plain: bool
    ) -> Iterator[str]:
        """What to know of a checkpoint that was written for the authors' code.

        Args:
            layers: by name, without memory.
            read: gives a tensor of a layer, by the layer's name and its own within it; None if the source has none.
            from_plain: True if they are made of a plain checkpoint.
        """
        return iter(())
