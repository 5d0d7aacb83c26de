from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from optpipe import plugins
from optpipe import recipe as recipes
from optpipe.data import DataSpec, Preprocess
from optpipe.errors import UsageError
from optpipe.models import ModelSpec
from optpipe.types import Budget, Limits, Tune

ROOT = Path(__file__).resolve().parents[1]

GOOD = """
[model]
name = "zoo:resnet20_cifar"
classes = 10

[data]
calibration = { source = "few.npz", labels = false, count = 200 }
evaluation = { source = "many.npz" }

[data.preprocess]
size = [32, 32]
mean = [0.5]
std = [0.25]

[target]
batch = 8
threads = 2

[method]
name = "practise"
scorer = "fast"

[recover]
steps = 300

[budget]
latency_reduction = 0.25
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message with which a recipe is refused, which must be one line, without the recipe's path."""
    with pytest.raises(UsageError) as error:
        recipes.load(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    assert error.value.exit_code == 2
    return message.replace(f"{path}: ", "")


def changed(path: Path, old: str, new: str) -> Path:
    assert GOOD.count(old) == 1
    path.write_text(GOOD.replace(old, new), encoding="utf-8")
    return path


def test_a_recipe_is_read_into_its_types(good: Path) -> None:
    recipe = recipes.load(good)
    assert recipe.model == ModelSpec("zoo:resnet20_cifar", classes=10)
    assert recipe.data.calibration == DataSpec("few.npz", labels=False, count=200)
    assert recipe.data.preprocess == Preprocess((0.5,), (0.25,), (32, 32))
    assert recipe.budget == Budget(latency_reduction=0.25)
    assert (recipe.method_name, recipe.method, recipe.recover) == (
        "practise",
        {"scorer": "fast"},
        {"steps": 300},
    )
    assert recipe.folder == good.parent


def test_what_is_left_out_has_defaults(good: Path) -> None:
    recipe = recipes.load(good)
    assert recipe.run == recipes.RunTable("mine")
    assert recipe.timing == recipes.TimingTable()
    assert recipe.target == recipes.TargetTable(batch=8, threads=2)


# ---------------------------------------------------------------- the file


def test_a_missing_recipe_names_the_nearest(good: Path) -> None:
    wrong = good.with_name("mina.toml")
    assert refusal(wrong) == f"there is no such recipe; did you mean {good}?"


def test_a_missing_recipe_far_from_all_others_names_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.toml") == "there is no such recipe"


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "is a folder; name the .toml file in it"


def test_a_recipe_below_a_file_cannot_be_read(good: Path) -> None:
    assert refusal(good / "inner.toml") == "cannot be read: Not a directory"


def test_invalid_toml_says_where(good: Path) -> None:
    good.write_text("[model]\nname = \n", encoding="utf-8")
    assert refusal(good) == "is not valid TOML: Invalid value (at line 2, column 8)"


def test_a_recipe_that_is_not_text_is_refused(good: Path) -> None:
    good.write_bytes(b"\xff\xfe\x00")
    assert refusal(good).startswith("is not valid TOML: 'utf-8' codec can't decode byte 0xff")


# ---------------------------------------------------------------- tables and keys


def test_an_unknown_table_names_the_nearest(good: Path) -> None:
    assert refusal(changed(good, "[budget]", "[budgets]")) == (
        "[budgets]: unknown table; did you mean budget?"
    )


def test_an_unknown_table_far_from_all_lists_them(good: Path) -> None:
    assert refusal(changed(good, "[budget]", "[zzz]")) == (
        "[zzz]: unknown table; valid are model, data, target, export, timing, method, recover, budget, run, "
        "report, gate"
    )


def test_a_value_where_a_table_belongs_is_refused(good: Path) -> None:
    good.write_text('model = "zoo:resnet20_cifar"\n', encoding="utf-8")
    assert refusal(good) == "model = 'zoo:resnet20_cifar': is a table: write [model]"


@pytest.mark.parametrize("table", ["model", "data", "method", "budget"])
def test_a_missing_table_is_named(good: Path, table: str) -> None:
    if table == "data":
        text = GOOD[: GOOD.index("[data]")] + GOOD[GOOD.index("[target]") :]
    else:
        head, tail = GOOD.split(f"[{table}]")
        text = head + ("[" + tail.split("[", 1)[1] if "[" in tail else "")
    good.write_text(text, encoding="utf-8")
    assert refusal(good) == f"[{table}]: this table is missing"


def test_an_unknown_key_names_table_value_and_the_nearest(good: Path) -> None:
    assert refusal(changed(good, "batch = 8", "bach = 8")) == (
        "[target] bach = 8: unknown key; did you mean batch?"
    )


def test_an_unknown_key_far_from_all_lists_them(good: Path) -> None:
    assert refusal(changed(good, "batch = 8", "zzz = true")) == (
        "[target] zzz = true: unknown key; valid are backend, precision, batch, device, threads, options"
    )


def test_a_nested_unknown_key_is_named_by_its_whole_path(good: Path) -> None:
    path = changed(good, 'source = "few.npz"', 'sorce = "few.npz"')
    assert refusal(path) == '[data.calibration] sorce = "few.npz": unknown key; did you mean source?'


def test_a_missing_key_is_named(good: Path) -> None:
    assert refusal(changed(good, 'name = "zoo:resnet20_cifar"\n', "")) == "[model] name: is missing"


def test_a_nested_missing_key_is_named(good: Path) -> None:
    assert refusal(changed(good, 'source = "many.npz"', "")) == "[data.evaluation] source: is missing"


def test_evaluation_images_must_be_named(good: Path) -> None:
    path = changed(good, 'evaluation = { source = "many.npz" }\n', "")
    assert refusal(path) == "[data] evaluation: is missing"


def test_the_normalisation_must_be_given(good: Path) -> None:
    path = changed(good, "[data.preprocess]\nsize = [32, 32]\nmean = [0.5]\nstd = [0.25]\n", "")
    assert refusal(path) == "[data.preprocess] mean: is missing"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('target.batch="8"', '[target] batch = "8": should be a valid integer'),
        ("target.batch=8.5", "[target] batch = 8.5: should be a valid integer"),
        ("target.batch=true", "[target] batch = true: should be a valid integer"),
        ("model.name=3", "[model] name = 3: should be a valid string"),
        ("run.cache=1", "[run] cache = 1: should be a valid boolean"),
        ("target.precision=fp8", "[target] precision = \"fp8\": should be 'fp32', 'bf16', 'fp16' or 'int8'"),
        ("data.preprocess.size=[32]", "[data.preprocess] size[1]: is missing"),
        (
            'data.preprocess.size=[32, "x"]',
            '[data.preprocess] size[1] = "x": should be a valid integer',
        ),
        ("data.preprocess.mean=0.5", "[data.preprocess] mean = 0.5: should be a valid array"),
        ("target.options=3", "[target] options = 3: should be an object"),
        ("export.precisions=[3]", "[export] precisions[0] = 3: should be 'fp32', 'bf16', 'fp16' or 'int8'"),
        ("data.calibration=few.npz", '[data] calibration = "few.npz": should be an object'),
    ],
)
def test_an_ill_typed_value_says_what_it_should_be(good: Path, override: str, message: str) -> None:
    assert refusal(good, override) == message


def test_a_whole_number_is_a_fraction_too(good: Path) -> None:
    assert recipes.load(good, ["timing.budget_s=2"]).timing.budget_s == 2.0


@pytest.mark.parametrize("line", ["", "name = 3\n"])
def test_the_method_must_be_named(good: Path, line: str) -> None:
    path = changed(good, 'name = "practise"\n', line)
    assert refusal(path) == '[method] name: must name a method, for example name = "practise"'


# ---------------------------------------------------------------- ranges


def test_several_budgets_are_refused(good: Path) -> None:
    assert refusal(good, "budget.drop_blocks=3") == (
        "[budget]: give exactly one of latency_reduction, latency_ms, macs_reduction, "
        "parameters_reduction, sparsity, drop_blocks; given: "
        "latency_reduction, drop_blocks"
    )


def test_no_budget_is_refused(good: Path) -> None:
    assert refusal(changed(good, "latency_reduction = 0.25\n", "")) == (
        "[budget]: give exactly one of latency_reduction, latency_ms, macs_reduction, "
        "parameters_reduction, sparsity, drop_blocks; given: none"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.latency_reduction=1.0", "[budget] latency_reduction = 1.0: must be between 0 and 1"),
        ("budget.latency_reduction=0.0", "[budget] latency_reduction = 0.0: must be between 0 and 1"),
        ("budget.latency_reduction=-0.1", "[budget] latency_reduction = -0.1: must be between 0 and 1"),
        ("budget.latency_reduction=nan", "[budget] latency_reduction = nan: must be between 0 and 1"),
        ("target.batch=0", "[target] batch = 0: must be above 0 and finite"),
        ("target.threads=0", "[target] threads = 0: must be above 0 and finite"),
        ("timing.tolerance=1.0", "[timing] tolerance = 1.0: must be between 0 and 1"),
        ("timing.budget_s=inf", "[timing] budget_s = inf: must be above 0 and finite"),
        ("timing.final_budget_s=-1.0", "[timing] final_budget_s = -1.0: must be above 0 and finite"),
        ("timing.drift=0.0", "[timing] drift = 0.0: must be above 0 and finite"),
        ("run.checkpoint_every=0", "[run] checkpoint_every = 0: must be above 0 and finite"),
        ("run.seed=-1", "[run] seed = -1: must not be below 0"),
        ("run.name=../elsewhere", '[run] name = "../elsewhere": must be a plain folder name'),
        ("run.name=", '[run] name = "": must be a plain folder name'),
        ("run.name=.hidden", '[run] name = ".hidden": must be a plain folder name'),
    ],
)
def test_a_value_out_of_range_is_refused(good: Path, override: str, message: str) -> None:
    assert refusal(good, override) == message


@pytest.mark.parametrize("budget", ["latency_ms = 0.0", "drop_blocks = 0"])
def test_absolute_budgets_must_be_above_zero(good: Path, budget: str) -> None:
    key, value = budget.split(" = ")
    path = changed(good, "latency_reduction = 0.25", budget)
    assert refusal(path) == f"[budget] {key} = {value}: must be above 0 and finite"


@pytest.mark.parametrize("key", ["macs_reduction", "parameters_reduction"])
def test_a_reduction_in_size_is_a_share(good: Path, key: str) -> None:
    for value in ("0.0", "1.0", "-0.1", "nan"):
        path = changed(good, "latency_reduction = 0.25", f"{key} = {value}")
        assert refusal(path) == f"[budget] {key} = {value}: must be between 0 and 1"
    path = changed(good, "latency_reduction = 0.25", f"{key} = 0.5")
    assert recipes.load(path).budget == (
        Budget(macs_reduction=0.5) if key == "macs_reduction" else Budget(parameters_reduction=0.5)
    )


# ---------------------------------------------------------------- the gate


def test_limits_of_the_gate_are_read_and_change_nothing_of_the_run(good: Path) -> None:
    plain = recipes.load(good)
    assert plain.gate == Limits()
    limited = recipes.load(good, ["gate.max_accuracy_drop=1", "gate.min_agreement=97.5", "gate.strict=true"])
    assert limited.gate == Limits(max_accuracy_drop=1.0, min_agreement=97.5, strict=True)
    assert limited.frozen({}, Tune(steps=300)) == plain.frozen({}, Tune(steps=300))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gate.min_agrement=90", "[gate] min_agrement = 90: unknown key; did you mean min_agreement?"),
        ("gate.strict=1", "[gate] strict = 1: should be a valid boolean"),
        ('gate.max_accuracy_drop="1"', '[gate] max_accuracy_drop = "1": should be a valid number'),
        ("gate.max_accuracy_drop=nan", "[gate] max_accuracy_drop = nan: must be finite"),
        ("gate.max_accuracy_drop=101", "[gate] max_accuracy_drop = 101: must be at most 100"),
        (
            "gate.min_latency_reduction=0.2",
            "[gate] min_latency_reduction = 0.2: is in percent: write 20 for a share of 0.2",
        ),
    ],
)
def test_a_limit_that_cannot_be_meant_is_refused(good: Path, override: str, message: str) -> None:
    assert refusal(good, override) == message


# ---------------------------------------------------------------- environment variables


def test_an_environment_variable_is_taken(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTPIPE_TEST_DATA", "/images")
    path = changed(good, '"few.npz"', '"${OPTPIPE_TEST_DATA}/few.npz"')
    assert recipes.load(path).data.calibration.source == "/images/few.npz"


def test_an_undefined_environment_variable_is_named_with_its_place(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPTPIPE_TEST_DATA", raising=False)
    path = changed(good, '"few.npz"', '"${OPTPIPE_TEST_DATA}/few.npz"')
    assert refusal(path) == (
        '[data.calibration] source = "${OPTPIPE_TEST_DATA}/few.npz": '
        "environment variable OPTPIPE_TEST_DATA is not set"
    )


@pytest.mark.parametrize(("value", "expected"), [(None, "here"), ("", "here"), ("there", "there")])
def test_a_default_stands_in_as_in_the_shell(
    good: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, expected: str
) -> None:
    if value is None:
        monkeypatch.delenv("OPTPIPE_TEST_DATA", raising=False)
    else:
        monkeypatch.setenv("OPTPIPE_TEST_DATA", value)
    path = changed(good, '"few.npz"', '"${OPTPIPE_TEST_DATA:-here}/few.npz"')
    assert recipes.load(path).data.calibration.source == f"{expected}/few.npz"


def test_an_empty_default_is_a_default(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTPIPE_TEST_DATA", raising=False)
    path = changed(good, '"few.npz"', '"${OPTPIPE_TEST_DATA:-}few.npz"')
    assert recipes.load(path).data.calibration.source == "few.npz"


# ---------------------------------------------------------------- --set


def test_overrides_replace_and_add(good: Path) -> None:
    recipe = recipes.load(
        good,
        [
            "budget.latency_reduction=0.5",
            "target.device = cpu",
            'run.name="other"',
            "data.calibration.count=7",
            "timing.tolerance=0.01",
            "data.preprocess.size=[28, 28]",
            "model.name=a=b",
        ],
    )
    assert recipe.budget.latency_reduction == 0.5
    assert recipe.target.device == "cpu"
    assert recipe.run.name == "other"
    assert recipe.data.calibration.count == 7
    assert recipe.timing.tolerance == 0.01
    assert recipe.data.preprocess.size == (28, 28)
    assert recipe.model.name == "a=b"


@pytest.mark.parametrize("override", ["budget", "budget=3", "=3", "budget.latency_reduction"])
def test_an_override_without_table_key_and_value_is_refused(good: Path, override: str) -> None:
    assert refusal(good, override) == (
        f"--set {override}: write table.key=value, for example budget.latency_reduction=0.3"
    )


def test_an_override_below_a_value_is_refused(good: Path) -> None:
    assert refusal(good, "model.name.first=3") == "--set model.name.first=3: name is a value, not a table"


def test_an_unknown_key_in_an_override_names_the_nearest(good: Path) -> None:
    assert refusal(good, "timing.tolerence=0.1") == (
        "[timing] tolerence = 0.1: unknown key; did you mean tolerance?"
    )


# ---------------------------------------------------------------- what the method adds


@dataclass(frozen=True, slots=True)
class Defaults:
    """A method's table, with its defaults."""

    steps: int = 5
    loss: Literal["mse", "mae"] = "mse"


def test_a_table_is_merged_into_defaults(good: Path) -> None:
    merged = recipes.merge(Defaults(steps=5, loss="mae"), {"steps": 9}, good, "recover")
    assert merged == Defaults(steps=9, loss="mae")


def test_a_merged_table_is_checked_as_any_other(good: Path) -> None:
    with pytest.raises(UsageError) as error:
        recipes.merge(Defaults(), {"step": 9}, good, "recover")
    assert str(error.value) == f"{good}: [recover] step = 9: unknown key; did you mean steps?"
    with pytest.raises(UsageError) as error:
        recipes.merge(Defaults(), {"loss": "mze"}, good, "recover")
    assert str(error.value) == f"{good}: [recover] loss = \"mze\": should be 'mse' or 'mae'"


def test_the_frozen_copy_parses_back_to_the_same_recipe(good: Path) -> None:
    recipe = recipes.load(good, ["run.seed=3", "target.options.level=high"])
    method, recover = recipe.method, Tune(steps=300)
    frozen = recipe.frozen(method, recover)
    good.write_text(frozen, encoding="utf-8")
    again = recipes.load(good)
    for table in ("model", "data", "target", "timing", "method_name", "method", "budget", "run"):
        assert getattr(again, table) == getattr(recipe, table)
    assert recipes.merge(Tune(steps=1), again.recover, good, "recover") == recover
    assert again.frozen(again.method, recover) == frozen


def test_the_frozen_copy_writes_defaults_out(good: Path) -> None:
    frozen = recipes.load(good).frozen({}, Tune(steps=300))
    for line in ("final_budget_s = 10.0", "checkpoint_every = 50", "momentum = 0.9", 'name = "mine"'):
        assert line in frozen.splitlines()


def test_the_frozen_copy_names_a_device_of_its_own_to_train_on(good: Path) -> None:
    plain, asked = (recipes.load(good, sets) for sets in ([], ['run.trainer="cpu"']))
    assert "trainer" not in plain.frozen({}, Tune(steps=300))
    assert 'trainer = "cpu"' in asked.frozen({}, Tune(steps=300)).splitlines()


def test_the_recovery_of_another_method_is_named(good: Path) -> None:
    recipe = recipes.load(good, ["recover.name=ekg"])
    assert (recipe.recover_name, recipe.recover) == ("ekg", {"steps": 300})
    assert recipes.load(good).recover_name is None
    assert refusal(good, "recover.name=3") == (
        '[recover] name = 3: must name a method, for example name = "ekg"'
    )


def test_a_recovery_may_be_its_name_alone(good: Path) -> None:
    good.write_text('recover = "ekg"\n' + GOOD.replace("[recover]\nsteps = 300\n", ""), encoding="utf-8")
    assert recipes.load(good).recover_name == "ekg"
    more = recipes.load(good, ["recover.epochs=2.0"])
    assert (more.recover_name, more.recover) == ("ekg", {"epochs": 2.0})


def test_the_frozen_copy_keeps_whose_recovery_it_is(good: Path) -> None:
    recipe = recipes.load(good, ["recover.name=ekg"])
    base = Tune(steps=0, epochs=100, milestones=(0.5,), schedule="milestones")
    recover = recipes.recovery(base, recipe.recover, good)
    good.write_text(recipe.frozen(recipe.method, recover), encoding="utf-8")
    again = recipes.load(good)
    assert again.recover_name == "ekg"
    assert recipes.recovery(base, again.recover, good) == recover


# ---------------------------------------------------------------- recovery

LABELS = Tune(
    steps=0, epochs=100, loss="labels", teachers="ensemble", views=2, trainable="all", augment="shift"
)


def refused_recovery(base: Tune, table: dict[str, recipes.Value]) -> str:
    with pytest.raises(UsageError) as error:
        recipes.recovery(base, table, Path("mine.toml"))
    return str(error.value).removeprefix("mine.toml: [recover] ")


def test_steps_given_alone_take_the_place_of_epochs() -> None:
    path = Path("mine.toml")
    assert recipes.recovery(LABELS, {"steps": 9}, path) == replace(LABELS, steps=9, epochs=None)
    assert recipes.recovery(LABELS, {"epochs": 2.5}, path) == replace(LABELS, epochs=2.5)
    assert recipes.recovery(LABELS, {"steps": 9, "epochs": 2.0}, path).epochs == 2.0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"steps": -1}, "steps = -1: must not be below 0; 0 is no recovery"),
        ({"epochs": 0.0}, "epochs = 0.0: must be above 0 and finite"),
        ({"batch": 0}, "batch = 0: must be above 0 and finite"),
        ({"lr": -0.1}, "lr = -0.1: must be above 0 and finite"),
        ({"temperature": 0.0}, "temperature = 0.0: must be above 0 and finite"),
        ({"views": 0}, "views = 0: must be at least 1"),
        ({"bank": 0}, "bank = 0: must be at least 1"),
        ({"decay": 0.0}, "decay = 0.0: must be above 0 and at most 1"),
        ({"decay": 1.5}, "decay = 1.5: must be above 0 and at most 1"),
        *[
            (
                {"milestones": milestones},
                f"milestones = {milestones}: must be shares of the steps between 0 and 1, each above the one "
                "before",
            )
            for milestones in ([0.5, 0.3], [0.3, 0.3], [0.0], [0.5, 1.0], [30.0, 60.0])
        ],
    ],
)
def test_numbers_that_make_no_training_are_refused(table: dict[str, recipes.Value], message: str) -> None:
    assert refused_recovery(LABELS, table) == message


def test_a_schedule_of_milestones_needs_some() -> None:
    assert refused_recovery(LABELS, {"schedule": "milestones"}) == (
        'milestones = []: schedule = "milestones" lowers the rate at them: give shares of the steps, say '
        "[0.5, 0.75]"
    )


def test_the_ends_of_the_ranges_are_taken() -> None:
    table: dict[str, recipes.Value] = {
        "schedule": "milestones", "milestones": [0.01, 0.99], "decay": 1.0, "views": 1, "bank": 1
    }  # fmt: skip
    assert recipes.recovery(LABELS, table, Path("mine.toml")).milestones == (0.01, 0.99)


@pytest.mark.parametrize(
    ("left_in", "text"),
    [
        ("teachers", 'hears no teacher\'s logits; set loss = "labels" or teachers = "none"'),
        ("views", 'on one view of an image; set loss = "labels" or views = 1'),
        ("trainable", 'from which that learns nothing; set loss = "labels" or trainable = "backbone"'),
    ],
)
def test_what_mimicking_cannot_use_is_refused_with_the_reason(left_in: str, text: str) -> None:
    fitting: dict[str, recipes.Value] = {"teachers": "none", "views": 1, "trainable": "backbone"}
    table = {key: value for key, value in fitting.items() if key != left_in}
    message = refused_recovery(LABELS, {"loss": "mimic", **table})
    assert message.startswith(f"{left_in} = ")
    assert message.endswith(text)
    assert recipes.recovery(LABELS, {"loss": "mimic", **fitting}, Path("mine.toml")).loss == "mimic"


def test_labels_refuse_images_of_two_classes() -> None:
    assert refused_recovery(LABELS, {"augment": "shift_cutmix"}) == (
        'augment = "shift_cutmix": puts other classes into an image, and loss = "labels" has one label for '
        'it; use "shift" or "shift_color"'
    )


# ---------------------------------------------------------------- what is shipped


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_shipped_recipe_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTPIPE_DATA", raising=False)
    default = recipes.load(path)
    assert default.run.name == path.stem
    method = plugins.method(default.method_name)
    config: object = recipes.bind(method.Config, default.method, path, "method")
    source = plugins.method(default.recover_name or default.method_name)
    recover = recipes.recovery(source.RECOVER, default.recover, path)
    assert default.frozen(config, recover)
    assert default.data.calibration.labels or not (method.NEEDS_LABELS or recover.loss == "labels")
    monkeypatch.setenv("OPTPIPE_DATA", "/elsewhere")
    moved = recipes.load(path)
    text = path.read_text(encoding="utf-8")
    if "OPTPIPE_DATA" in text:
        assert moved.data.evaluation.source.startswith("/elsewhere/")
    elif "${" not in text:
        assert (path.parent / moved.data.evaluation.source).is_file()


def test_reading_a_recipe_loads_no_torch(good: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from optpipe import recipe; "
        "recipe.load(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(good)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "False"
