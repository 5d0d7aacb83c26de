"""practise's ImageNet recipes on random weights: what is dropped and adapted, and a step of each training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_graph import images, randomised

from optpipe import graph, models, tune
from optpipe import recipe as recipes
from optpipe.data import ImageSet
from optpipe.methods import practise
from optpipe.types import Plan, Tune

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "imagenet"
SMALL = (3, 64, 64)  # sites depend on no size
MOBILENET = "mobilenet_v2"
MOBILENET_STAGES = ((2, 3), (4, 6), (7, 10), (11, 13), (14, 16))  # features.N, the first changes the width
RESNET_STAGES = {1: 3, 2: 4, 3: 6, 4: 3}
FEATURES = {MOBILENET: 1280, "resnet34": 512, "resnet50": 2048}


def recipe_of(name: str) -> recipes.Recipe:
    return recipes.load(RECIPES / f"practise_{name}.toml", ["model.weights=random"])


def network_of(name: str) -> torch.nn.Module:
    recipe = recipe_of(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(models.load_model(recipe.model, recipe.folder), 64)


def sites(network: torch.nn.Module, block: str) -> set[str]:
    adapted = graph.with_adaptors(network, Plan(drop_blocks=(block,)), SMALL)
    return {path.removeprefix("optpipe_adaptors.") for path in graph.adaptors(adapted)}


@pytest.mark.slow
def test_mobilenet_is_adapted_back_through_projections_and_forward_through_expansions() -> None:
    network = network_of(MOBILENET)
    droppable = [block.name for block in graph.inspect(network, SMALL).droppable]
    expected = {
        f"features.{block}": {
            *(f"after.features.{before}.conv.2" for before in range(first, block)),
            # Up to and with the block that changes the width.
            *(f"before.features.{later}.conv.0.0" for later in range(block + 1, last + 2)),
        }
        for first, last in MOBILENET_STAGES
        for block in range(first + 1, last + 1)
    }
    assert droppable == list(expected)
    assert {block: sites(network, block) for block in droppable} == expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "last"), [("resnet34", "conv2"), ("resnet50", "conv3")])
def test_resnets_are_adapted_back_to_the_stages_shortcut_and_forward_to_the_next_ones(
    name: str, last: str
) -> None:
    network = network_of(name)
    droppable = [block.name for block in graph.inspect(network, SMALL).droppable]
    inner = [f"layer{stage}.{block}" for stage, count in RESNET_STAGES.items() for block in range(1, count)]
    # ResNet-34's very first block changes no shape: one more than the paper's twelve.
    assert droppable == (["layer1.0", *inner] if name == "resnet34" else inner)
    for stage, count in RESNET_STAGES.items():
        block = count - 2
        entry = (
            {"after.conv1"} if (name, stage) == ("resnet34", 1) else {f"after.layer{stage}.0.downsample.0"}
        )
        onward = (
            {f"before.layer{stage + 1}.0.conv1", f"before.layer{stage + 1}.0.downsample.0"}
            if stage < 4
            else set()
        )
        assert sites(network, f"layer{stage}.{block}") == {
            *entry,
            *(f"after.layer{stage}.{before}.{last}" for before in range(block)),
            f"before.layer{stage}.{count - 1}.conv1",
            *onward,
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_a_recipes_plan_adaptors_and_recovery_keep_the_shapes_at_224(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.data.preprocess.size == (224, 224)
    shape = (3, 224, 224)
    network = network_of(name)
    original = graph.trace(network, shape)
    found = graph.inspect(network, shape)
    plan = Plan(drop_blocks=(found.droppable[0].name, found.droppable[-1].name))
    pixels = torch.randint(0, 256, (3, *shape), generator=torch.Generator().manual_seed(1)).byte()
    few = ImageSet(pixels, None, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3, digest="d" * 64)

    adapted = graph.with_adaptors(network, plan, shape)
    assert graph.adaptors(adapted)
    fitted = Tune(steps=1, batch=2, lr=1e-4, trainable="adaptors", batch_norm="eval")
    assert tune.train(adapted, original, few, fitted, seed=0).loss_first > 0
    student = graph.fold(adapted)

    recover = recipes.recovery(practise.RECOVER, recipe.recover, recipe.path)
    assert (recover.loss, recover.steps) == ("mimic", 2000)
    first = next(iter(student.state_dict()))
    before = student.state_dict()[first].clone()
    one_step = replace(recover, steps=1, batch=2, lr=1e-4, warmup=0.0, autocast="off")
    assert tune.train(student, original, few, one_step, seed=0).loss_first > 0
    assert not torch.equal(before, student.state_dict()[first])

    with torch.no_grad():
        x = images(shape)
        backbone, classifier = graph.split(student)
        features = backbone(x)
        assert features.shape == (2, FEATURES[name], 7, 7)
        assert classifier(features).shape == student(x).shape == (2, 1000)
        assert torch.isfinite(student(x)).all()
    parameters, macs = graph.count(student, shape)
    assert parameters < found.parameters
    assert (parameters, macs) == graph.count(graph.apply(network, plan, shape), shape)
