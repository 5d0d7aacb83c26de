"""A network whose channels are switched by masks, so that a candidate is evaluated without being built.

EKG (Eqs 7 to 9) asks for two things at every step: how much each filter matters, and how well each of some
dozens of candidates does. Both follow from one factor per channel: its gradient is the score of all filters
of all groups at once, and at 0 the channel is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.fx.node import Argument, Target

from optpipe.graph.trace import module_of, shape, trace
from optpipe.graph.width_map import Part, WidthMap, width_map_of
from optpipe.types import ChannelGroup, Plan

_Values = dict[fx.Node, object]
# For each gated layer, by path, the index of each of its channels among all factors.
Gates = dict[str, torch.Tensor]


class Gated:
    """A frozen copy of ``model`` whose prunable groups each have a mask, a factor for each channel.

    At "readers" the mask multiplies the input of every layer that reads the group's channels, which is
    after normalisation, activation and residual sum: with zeros the network computes what
    ``apply(model, gated.plan(masks), input_shape)`` does. At "own" it multiplies what the group's own layers
    make, behind the batch-norm that follows each and before activation and sum; that serves to score
    filters as GBN does, not to stand for the cut network.

    With ``batch_norm = "batch"`` every evaluation normalises by its own batch and keeps no statistics; all
    else is in eval mode always. ``autocast`` computes in bfloat16. ``widths`` saves finding the groups
    again where a network of the same structure was mapped before.
    Raises UsageError for a model that cannot be traced.
    """

    def __init__(
        self,
        model: fx.GraphModule | nn.Module,
        input_shape: tuple[int, int, int],
        *,
        batch_norm: Literal["batch", "running"] = "batch",
        at: Literal["readers", "own"] = "readers",
        autocast: bool = False,
        device: str = "cpu",
        widths: WidthMap | None = None,
    ) -> None:
        network = trace(model, input_shape).requires_grad_(False)
        self.widths = width_map_of(network, input_shape) if widths is None else widths
        self.groups: tuple[ChannelGroup, ...] = self.widths.groups
        if batch_norm == "batch":
            _forget_statistics(network)
        self._network = network.to(device).to(memory_format=torch.channels_last)
        self._device = torch.device(device)
        self._dtype = next(network.parameters()).dtype
        self._autocast = autocast
        self._nodes = list(network.graph.nodes)
        self._classes = (shape(self._nodes[-1]) or (0,))[-1]
        self._dead = _last_uses(self._nodes)
        self._before = at == "readers"
        gates = (input_gates if self._before else _own)(network, self.widths)
        self._gates = {path: index.to(device) for path, index in gates.items()}
        self._first = _first_gates(self._nodes, gates, self.widths)
        if any(map(_changes_in_place, self._nodes)):  # what candidates share must stay as it is
            self._first = [0] * len(self.groups)

    def whole(self) -> list[torch.Tensor]:
        """The masks of the original: ones, float32 (channels,) for each group."""
        return [torch.ones(group.channels, device=self._device) for group in self.groups]

    def plan(self, masks: Sequence[torch.Tensor]) -> Plan:
        """The plan that takes out every channel whose factor is 0."""
        keep = []
        for group, mask in zip(self.groups, masks, strict=True):
            kept = tuple(mask.detach().nonzero().flatten().tolist())
            if len(kept) < group.channels:
                keep.append((group.name, kept))
        return Plan(keep_channels=tuple(keep))

    def logits(self, images: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits (N, classes), float32, of images (N, C, H, W); differentiable in masks that ask for it.

        At masks of ones the gradient with respect to a mask is the sum over batch and space of
        (gradient * feature map) for each channel: the inside of EKG's Eq. 9, before the absolute value.
        """
        learn = torch.is_grad_enabled() and any(mask.requires_grad for mask in masks)
        with torch.set_grad_enabled(learn):
            run = self._run(images)
            return self._finish(run, {}, 0, self._factors(masks))

    @torch.no_grad()
    def candidates(
        self,
        images: torch.Tensor,
        masks: Sequence[torch.Tensor],
        changes: Sequence[tuple[int, torch.Tensor]],
    ) -> torch.Tensor:
        """Logits (len(changes), N, classes), float32: each time with the mask of one group replaced.

        A change is (index of the group, its mask). All candidates share what is computed before the first
        layer that their own group's mask acts on.
        """
        results = torch.empty(len(changes), len(images), self._classes, device=self._device)
        factors, run = self._factors(masks), self._run(images)
        values: _Values = {}
        at = 0
        for change in sorted(range(len(changes)), key=lambda index: self._first[changes[index][0]]):
            group, mask = changes[change]
            start, at = at, self._first[group]
            self._advance(run, values, range(start, at), factors)
            changed = self._factors([*masks[:group], mask, *masks[group + 1 :]])
            results[change] = self._finish(run, dict(values), at, changed)
        return results

    def _run(self, images: torch.Tensor) -> _Run:
        given = images.to(self._device, self._dtype, memory_format=torch.channels_last)
        return _Run(self._network, given, self._gates, self._before)

    def _factors(self, masks: Sequence[torch.Tensor]) -> torch.Tensor:
        """All masks end to end, and a last factor of 1 for every channel that has no mask."""
        found = [tuple(mask.shape) for mask in masks]
        needed = [(group.channels,) for group in self.groups]
        if found != needed:
            raise ValueError(f"masks of shapes {needed} are needed, one for each group; got {found}")
        one = torch.ones(1, device=self._device, dtype=self._dtype)
        return torch.cat([*(mask.to(self._device, self._dtype) for mask in masks), one])

    def _advance(self, run: _Run, values: _Values, nodes: range, factors: torch.Tensor) -> None:
        """Compute these nodes into ``values``, and let go of what no later one reads."""
        run.env, run.factors = cast("dict[fx.Node, Argument]", values), factors
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            for index in nodes:
                node = self._nodes[index]
                values[node] = run.run_node(node)
                for dead in self._dead[index]:
                    values.pop(dead, None)

    def _finish(self, run: _Run, values: _Values, start: int, factors: torch.Tensor) -> torch.Tensor:
        self._advance(run, values, range(start, len(self._nodes)), factors)
        return cast("torch.Tensor", values[self._nodes[-1]]).float()


class _Run(fx.Interpreter):
    """Runs nodes of a network, with each gate's factors where the gate is."""

    def __init__(
        self, network: fx.GraphModule, images: torch.Tensor, gates: dict[str, torch.Tensor], before: bool
    ) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.extra_traceback = False
        self.factors = torch.ones(1)
        self._images, self._gates, self._before = images, gates, before

    def placeholder(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> object:
        return args[0] if args else self._images  # only an optional argument has a default

    def call_module(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> object:
        index = self._gates.get(str(target))
        if index is None:
            return super().call_module(target, args, kwargs)
        layer, factors = self.submodules[str(target)], self.factors[index]
        if not self._before:
            return _times(layer, layer(*args, **kwargs), factors)
        if factors.requires_grad:
            return layer(_times(layer, cast("torch.Tensor", args[0]), factors), *args[1:], **kwargs)
        # The same product, with the weights, which are far fewer than the values that they meet.
        return functional_call(layer, {"weight": weighted(layer, factors)}, args, kwargs)

    def call_method(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> object:
        if target == "view":  # channels_last cannot be viewed as what the model was written for
            args = (cast("torch.Tensor", args[0]).contiguous(), *args[1:])
        return super().call_method(target, args, kwargs)


def _times(layer: nn.Module, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """What a layer reads or makes, times a factor for each of its channels."""
    after = 0 if isinstance(layer, nn.Linear) else x.ndim - 2
    return x * factors.view(-1, *[1] * after)


def weighted(layer: nn.Module, factors: torch.Tensor) -> torch.Tensor:
    """A layer's weights, each times the factor of the input that it meets."""
    weight = cast("torch.Tensor", layer.weight)
    if isinstance(layer, nn.Linear):
        return weight * factors
    groups = cast("nn.Conv2d", layer).groups
    inputs = factors.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return weight * inputs[:, :, None, None]


def _forget_statistics(network: nn.Module) -> None:
    """Make every batch-norm normalise by its batch, which it does where it has nothing to go by."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def input_gates(network: fx.GraphModule, widths: WidthMap) -> Gates:
    """For each layer that reads groups, which factor meets each of its inputs."""
    gates: Gates = {}
    for part, first in _placed(widths):
        if not part.outputs:
            layer = network.get_submodule(part.layer)
            width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            _place(gates, part, first, part.layer, cast("int", width), widths)
    return gates


def _own(network: fx.GraphModule, widths: WidthMap) -> Gates:
    """For each layer of a group, or the batch-norm that alone reads it, which factor meets each output."""
    calls = {str(node.target): node for node in network.graph.nodes if node.op == "call_module"}
    layers = {path for group in widths.groups for path in group.layers}
    gates: Gates = {}
    for part, first in _placed(widths):
        if part.outputs and part.layer in layers:
            node = calls[part.layer]
            reader = next(iter(node.users)) if len(node.users) == 1 else node
            normed = isinstance(module_of(network, reader), nn.modules.batchnorm._BatchNorm)
            site = str(reader.target) if normed else part.layer
            _place(gates, part, first, site, len(part.positions), widths)
    return gates


def _placed(widths: WidthMap) -> Iterator[tuple[Part, int]]:
    """Every part of every group, and where the factors of its group begin."""
    first = 0
    for group, parts in zip(widths.groups, widths.parts, strict=True):
        yield from ((part, first) for part in parts)
        first += group.channels


def _place(gates: Gates, part: Part, first: int, path: str, width: int, widths: WidthMap) -> None:
    """Set the factors of one part in the gate at ``path``; what nobody sets has the last factor, 1."""
    if path not in gates:
        gates[path] = torch.full((width,), sum(group.channels for group in widths.groups))
    gates[path][torch.tensor(part.positions)] = first + torch.tensor(part.channels)


def _first_gates(nodes: list[fx.Node], gates: Gates, widths: WidthMap) -> list[int]:
    """For each group the index of the first node that its mask acts on."""
    owner = torch.repeat_interleave(torch.tensor([*(group.channels for group in widths.groups), 1]))
    first = dict[int, int]()
    for index, node in enumerate(nodes):
        if node.op == "call_module" and str(node.target) in gates:
            for group in set(owner[gates[str(node.target)]].tolist()):
                first.setdefault(group, index)
    return [first.get(group, len(nodes) - 1) for group in range(len(widths.groups))]


def _changes_in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return node.op == "call_function" and (
        name in {"iadd", "imul", "isub", "itruediv", "setitem"} or name.endswith("_") or "out" in node.kwargs
    )


def _last_uses(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """For each node those that no later one reads."""
    order = {node: index for index, node in enumerate(nodes)}
    dead: list[list[fx.Node]] = [[] for _ in nodes]
    for node in nodes[:-1]:
        dead[max((order[user] for user in node.users), default=order[node])].append(node)
    return dead
