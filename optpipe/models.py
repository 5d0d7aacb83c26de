"""Networks by name, and their weights from a file.

Importing this module is light: torch comes in only when a network is loaded.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from optpipe.errors import MissingError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")
RANDOM_WEIGHTS_SEED = 0
LIVE = "live"
MOST = 10_000_000
"""Classes or input channels; more are a slip, and would take all memory before anything fails."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which network, and with which weights.

    ``name`` is "torchvision:resnet34", "zoo:resnet56_cifar" or "package.module:function"; "live:ResNet"
    stands for a module that a program handed over, and that no name makes again.
    ``weights`` is a file (.safetensors, .pth, .pt) or, for torchvision, a name such as "IMAGENET1K_V1";
    without it, or with "random", the weights are random, the same ones each time.
    ``classes`` and ``in_channels`` are passed on to the network where they are given.
    """

    name: str
    weights: str | None = None
    classes: int | None = None
    in_channels: int | None = None


def load_model(spec: ModelSpec, search_folder: Path = Path()) -> nn.Module:
    """The network of ``spec`` with its weights, in eval mode.

    A relative weights file and the module of "module:function" are looked for in ``search_folder``.
    Raises UsageError for an unknown network and for weights that are missing, unreadable or do not fit,
    and MissingError where torchvision's weights cannot be downloaded.
    """
    import torch

    # Stored trials are keyed by the weights, so random weights must be the same in every process.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        model = _build(spec, search_folder)
    if spec.weights is not None and spec.weights != "random":
        if _is_file_name(spec.weights):
            _load_into(model, search_folder / Path(spec.weights).expanduser(), spec.name)
        else:
            _load_named(model, spec, spec.weights)
    return model.eval()


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all parameters and buffers, in order of name."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def input_channels(model: nn.Module) -> int:
    """The channels of the images that a network takes: those of its first convolution.

    Raises UsageError where there is no convolution.
    """
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise UsageError(f"{type(model).__name__} has no convolution; only convolutional networks are supported")


def names_code(name: str) -> bool:
    """Whether building a network of this name imports a module of the user's."""
    source, colon, function = name.partition(":")
    return bool(source and colon and function) and source not in ("zoo", "torchvision", LIVE)


def import_function(name: str, search_folder: Path) -> Callable[..., Any]:
    """The function that "package.module:function" names; modules of ``search_folder`` come first.

    Raises UsageError where the module does not import or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    with _importable(search_folder):
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            raise UsageError(
                f"'{name}': module '{module_name}' does not import ({_one_line(error)}); it is looked for in "
                f"{search_folder.resolve()} and among the installed packages"
            ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(
            f"'{name}': module '{module_name}' has no function '{function_name}'"
            + _nearest(function_name, public)
        )
    return cast(Callable[..., Any], function)


def call_function(name: str, search_folder: Path, **arguments: object) -> object:
    """What the function "package.module:function" returns; UsageError if it does not take or fails."""
    function = import_function(name, search_folder)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UsageError(
            f"'{name}' cannot be called with ({', '.join(arguments)}): {_one_line(error)}"
        ) from error
    with _importable(search_folder):
        try:
            return function(**arguments)
        except (Exception, SystemExit) as error:
            raise UsageError(f"'{name}' failed: {_one_line(error)}") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


# ---------------------------------------------------------------- architectures


def _build(spec: ModelSpec, search_folder: Path) -> nn.Module:
    from torch import nn

    from optpipe import zoo

    source, colon, name = spec.name.partition(":")
    sizes = {"classes": spec.classes, "in_channels": spec.in_channels}
    given = {key: value for key, value in sizes.items() if value is not None}
    for key, value in given.items():
        if not 0 < value <= MOST:
            raise UsageError(f"model '{spec.name}': {key} = {value}: must be above 0 and at most {MOST}")
    if not (source and colon and name):
        raise UsageError(
            f"model '{spec.name}' is not of the form 'torchvision:NAME', 'zoo:NAME' or 'module:function'"
            + _nearest(spec.name, [*zoo.architectures(), *_torchvision_names()])
        )
    if source == LIVE:
        raise UsageError(
            f"model '{spec.name}' was a live module, which no name makes again: give one of its "
            "architecture, optpipe.load(run, model=module), or make the run anew with "
            "optpipe.optimize(..., architecture=NAME)"
        )
    if source == "zoo":
        return zoo.build(name, **given)
    if source == "torchvision":
        return _build_torchvision(spec, name)
    model = call_function(spec.name, search_folder, **given)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model '{spec.name}' returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _torchvision_names() -> list[str]:
    import torchvision

    # Without a module the list holds detection and video networks too, which classify no image.
    return list(torchvision.models.list_models(module=torchvision.models))


def _build_torchvision(spec: ModelSpec, name: str) -> nn.Module:
    from torchvision.models import get_model

    names = _torchvision_names()
    if name not in names:
        raise UsageError(f"torchvision has no classification network '{name}'{_nearest(name, names)}")
    if spec.in_channels not in (None, 3):
        raise UsageError(
            f"model '{spec.name}' takes 3 input channels, not {spec.in_channels}; give a 'module:function' "
            "that returns the network with another first layer"
        )
    # These two draw slow truncated-normal weights by default and warn that they do.
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    sizes = {} if spec.classes is None else {"num_classes": spec.classes}
    return cast("nn.Module", get_model(name, weights=None, **sizes, **extra))


# ---------------------------------------------------------------- weights


def _is_file_name(weights: str) -> bool:
    return Path(weights).suffix != "" or "/" in weights or "\\" in weights


def _load_named(model: nn.Module, spec: ModelSpec, weights: str) -> None:
    """Load torchvision's weights of a name, downloading them where they are not in torch's cache."""
    from torchvision.models import get_model_weights

    source, _, name = spec.name.partition(":")
    if source != "torchvision":
        raise UsageError(
            f"weights '{weights}': only torchvision's networks have weights by name; for '{spec.name}' "
            f"give a file ({', '.join(WEIGHT_SUFFIXES)})"
        )
    members: Mapping[str, Any] = get_model_weights(name).__members__
    if weights not in members:
        raise UsageError(f"weights '{weights}' do not exist for '{name}'; there are {', '.join(members)}")
    try:
        state = members[weights].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise MissingError(
            f"weights '{weights}' of '{name}' cannot be downloaded ({_one_line(error)}); give a file instead"
        ) from error
    _fit(model, state, f"weights '{weights}'", spec.name)


def _load_into(model: nn.Module, path: Path, name: str) -> None:
    if path.suffix not in WEIGHT_SUFFIXES:
        raise UsageError(
            f"weights {path}: file type '{path.suffix}' is not supported; use {', '.join(WEIGHT_SUFFIXES)}"
        )
    if not path.is_file():
        raise UsageError(f"weights {path}: no such file")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    _fit(model, state, f"weights {path}", name)


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"weights {path}: not a readable safetensors file ({_one_line(error)})") from error


def _read_pickle(path: Path) -> Mapping[str, Tensor]:
    """Tensors by name of a file that ``torch.save`` wrote, without running code that it may hold."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how a file was pickled, which says nothing to its user
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"weights {path}: refused, since it holds more than tensors and loading it could run code; save "
            "model.state_dict() instead, or convert it to .safetensors"
        ) from error
    except Exception as error:  # a damaged file leads the unpickler to any error
        raise UsageError(f"weights {path}: not a readable torch file ({_one_line(error)})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(item, torch.Tensor) for key, item in content.items()
    ):
        raise UsageError(f"weights {path}: holds no state_dict (a mapping of names to tensors)")
    return content


def _fit(model: nn.Module, state: Mapping[str, Tensor], what: str, name: str) -> None:
    """Copy ``state`` into the model; UsageError says which keys are missing, unexpected or misshapen."""
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    own = model.state_dict()
    # Batch-norm's step counter is no weight, and files from before torch 0.4.1 lack it.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} ({tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network)"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        _first_five(keys, label)
        for keys, label in ((missing, "missing"), (unexpected, "unexpected"), (misshapen, "of another shape"))
        if keys
    ]
    if problems:
        raise UsageError(f"{what} do not fit '{name}': {'; '.join(problems)}")
    odd = [key for key, value in state.items() if not _plain(value)]
    if odd:
        raise UsageError(
            f"{what} hold tensors that are sparse, quantized, complex or without values: "
            f"{_first_five(odd, 'odd')}"
        )
    broken = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise UsageError(f"{what} hold NaN or infinite values: {_first_five(broken, 'broken')}")
    model.load_state_dict(dict(state), strict=False)


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense and of real numbers that are there."""
    import torch

    strange = tensor.is_meta or tensor.is_quantized or tensor.is_complex()
    return tensor.layout is torch.strided and not strange


def _first_five(keys: list[str], label: str) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{len(keys)} {label}: {', '.join(keys[:5])}{more}"
