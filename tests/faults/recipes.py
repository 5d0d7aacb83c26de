"""Recipes and command lines that are wrong."""

from __future__ import annotations

from pathlib import Path

from faults.cases import Case
from faults.workspace import Change, both, nothing, recipe, wrote

CHECK = ("run", "small.toml", "--dry-run")
DROP = "drop_blocks = 1\n"
HUGE = "9" * 5000


def _bad(name: str, make: Change, says: str, code: int = 2) -> Case:
    return Case(name, make, CHECK, code, says)


def _added(name: str, tail: str, says: str, code: int = 2) -> Case:
    """The recipe with more at its end, which is the table [budget]."""
    return _bad(name, recipe(DROP, DROP + tail), says, code)


def _instead(name: str, old: str, new: str, says: str, code: int = 2) -> Case:
    return _bad(name, recipe(old, new), says, code)


def _set(name: str, override: str, says: str, code: int = 2) -> Case:
    return Case(name, nothing, (*CHECK, "--set", override), code, says)


def _sweep(name: str, words: tuple[str, ...], latency: str, says: str) -> Case:
    return Case(name, nothing, ("sweep", *words, "--latency", latency), 2, says)


def _folder(folder: Path) -> None:
    (folder / "small.toml").unlink()
    (folder / "small.toml").mkdir()


def _dangling(folder: Path) -> None:
    (folder / "small.toml").unlink()
    (folder / "small.toml").symlink_to("nowhere.toml")


def _loop(folder: Path) -> None:
    (folder / "small.toml").unlink()
    (folder / "small.toml").symlink_to("small.toml")


def _foreign(folder: Path) -> None:
    wrote("mine/holiday.jpg", "sea")(folder)


CASES = (
    # the file
    Case("a recipe that is not there", nothing, ("run", "smal.toml"), 2, "did you mean"),
    _bad("a folder for a recipe", _folder, "is a folder"),
    _bad("a dangling link for a recipe", _dangling, "there is no such recipe"),
    _bad("a link to itself for a recipe", _loop, "cannot be read"),
    _bad("an empty recipe", wrote("small.toml", ""), "[model]: this table is missing"),
    _bad("a recipe of zero bytes", wrote("small.toml", bytes(64)), "is not valid TOML"),
    _bad(
        "a recipe in Latin-1", wrote("small.toml", '[model]\nname = "é"'.encode("latin-1")), "not valid TOML"
    ),
    _bad("a recipe in UTF-16", wrote("small.toml", "[model]".encode("utf-16")), "is not valid TOML"),
    _bad("an image for a recipe", wrote("small.toml", b"\x89PNG\r\n\x1a\n\0\0"), "is not valid TOML"),
    _bad("JSON for a recipe", wrote("small.toml", '{"model": {}}'), "is not valid TOML"),
    _instead("a string without its end", 'name = "practise"', 'name = "practise', "is not valid TOML"),
    _added("a key twice", DROP, "is not valid TOML"),
    _added("a table twice", "[model]\n", "is not valid TOML"),
    _added("arrays nested 100000 deep", f"x = {'[' * 100_000}", "is not valid TOML"),
    _added("tables nested 500 deep", f"x{'.a' * 500} = 1", "nested too deeply"),
    _added("arrays nested 300 deep", f"x = {'[' * 300}{']' * 300}", "nested too deeply"),
    _added("a file name with a NUL", '[run]\nname = "a\\u0000b"', "must be a plain folder name"),
    # tables and keys
    _added("an unknown table", "[modle]\n", "did you mean model?"),
    _added("an unknown table far from any", "[zzz]\n", "valid are model"),
    _added("an array of tables", "[[gate]]\n", "is a table: write [gate]"),
    _bad("a number for a table", wrote("small.toml", "model = 3"), "is a table: write [model]"),
    _bad("a string for [recover]", both(wrote("small.toml", 'recover = "x"\n')), "is missing"),
    _instead("a missing table", "[budget]\ndrop_blocks = 1\n", "", "[budget]: this table is missing"),
    _added("an unknown key", "drop_block = 1", "did you mean drop_blocks?"),
    _added("a key with a line break", '"a\\nError: b" = 1', "unknown key"),
    _added("a key with a terminal's codes", '"\\u001b[2Jhidden" = 1', "unknown key"),
    _added("a key of 100000 characters", f"{'k' * 100_000} = 1", "unknown key"),
    _added("an empty key", '"" = 1', "unknown key"),
    _added("a value of 100000 characters", f'latency_ms = "{"v" * 100_000}"', "should be a valid number"),
    _instead("a missing key", 'name = "mine:network"\n', "", "[model] name: is missing"),
    _instead("no method's name", 'name = "practise"\n', "", "must name a method"),
    _instead("a number for a method", 'name = "practise"', "name = 3", "must name a method"),
    _instead("an unknown method", '"practise"', '"practice"', "did you mean practise?"),
    _instead("a path for a method", '"practise"', '"../practise"', "there is no such method"),
    _instead("a private module for a method", '"practise"', '"_norms"', "there is no such method"),
    _instead("a method's unknown key", '"practise"\n', '"practise"\nscorrer = 1\n', "did you mean scorer?"),
    _instead("a method's key of another type", '"practise"\n', '"practise"\nscorer = 1\n', "[method] scorer"),
    _added("an unknown recovery", '[recover]\nname = "nothing"', "[recover] name"),
    _added("a number for a recovery", "[recover]\nname = 1", "must name a method"),
    # types
    _instead("a number for a string", '"mine:network"', "3", "should be a valid string"),
    _instead("a table for a string", '"mine:network"', "{}", "should be a valid string"),
    _instead("a string for a number", "classes = 4", 'classes = "4"', "should be a valid integer"),
    _instead("a fraction for a count", "classes = 4", "classes = 4.5", "should be a valid integer"),
    _instead("a truth for a count", "classes = 4", "classes = true", "should be a valid integer"),
    _instead("a number for a table of images", '{ source = "photos" }', "3", "[data] calibration"),
    _instead("a list for a table of images", '{ source = "photos" }', "[]", "[data] calibration"),
    _instead("a short list for a size", "[16, 16]", "[16]", "[data.preprocess] size"),
    _instead("words for a mean", "mean = [0.5, 0.5, 0.5]", 'mean = ["a"]', "[data.preprocess] mean"),
    _added("a word for a device", '[target]\ndevice = "tpu"', "tpu"),
    _added("a word for a precision", '[target]\nprecision = "fp8"', "[target] precision"),
    _added("a word for a backend", '[target]\nbackend = "onnx"', "did you mean onnxruntime?"),
    _added("a date for a count", "[target]\nbatch = 1979-05-27", "[target] batch"),
    _added("a list for an option", "[target.options]\nx = [1]", "[target.options.x]"),
    _added("an unknown option", "[target.options]\nspeed = 1", "speed"),
    # numbers
    _added("an integer of 5000 digits", f"latency_ms = {HUGE}", "is not valid TOML"),
    _added("a seed of 30 digits", f"[run]\nseed = {10**30}", "64 bits"),
    _added("a batch of 30 digits", f"[target]\nbatch = {10**30}", "64 bits"),
    _added("a large batch", "[target]\nbatch = 1000000000", "[target] batch"),
    _added("as many threads as atoms", f"[target]\nthreads = {2**62}", "[target] threads"),
    _added("no threads", "[target]\nthreads = 0", "must be above 0"),
    _added("no batch", "[target]\nbatch = -1", "must be above 0"),
    _added("an endless batch", "[target]\nbatch = inf", "should be a valid integer"),
    _instead("all of a latency", DROP, "latency_reduction = 1.0", "must be between 0 and 1"),
    _instead("less than nothing", DROP, "latency_reduction = -0.5", "must be between 0 and 1"),
    _instead("a reduction that is no number", DROP, "latency_reduction = nan", "must be between 0 and 1"),
    _instead("an endless latency", DROP, "latency_ms = inf", "must be above 0 and finite"),
    _instead("a float too large", DROP, "latency_ms = 1e400", "must be above 0 and finite"),
    _instead("no budget", DROP, "", "give exactly one of"),
    _added("two budgets", "latency_ms = 3.0", "give exactly one of"),
    _instead("more blocks than there are", "drop_blocks = 1", "drop_blocks = 9000", "drop_blocks"),
    _instead("blocks of 19 digits", "drop_blocks = 1", f"drop_blocks = {2**63 - 1}", "drop_blocks"),
    _added("a seed below 0", "[run]\nseed = -1", "must not be below 0"),
    _added("no checkpoints", "[run]\ncheckpoint_every = 0", "must be above 0"),
    _added("a tolerance above 1", "[timing]\ntolerance = 2.0", "must be between 0 and 1"),
    _added("a drift that is no number", "[timing]\ndrift = nan", "must be above 0"),
    _added("steps below 0", "[recover]\nsteps = -1", "steps"),
    _added("a rate that is no number", "[recover]\nlr = nan", "lr"),
    _added("an endless rate", "[recover]\nlr = inf", "lr"),
    _added("a limit above all", "[gate]\nmin_agreement = 101.0", "must be at most 100"),
    _added("a limit that is no number", "[gate]\nmin_agreement = nan", "min_agreement"),
    _added("a precision that none runs", '[export]\nprecisions = ["fp64"]', "[export] precisions"),
    # the images' preparation
    _instead("one mean for three channels", "mean = [0.5, 0.5, 0.5]", "mean = [0.5]", "1 values"),
    _instead("a mean that is no number", "mean = [0.5,", "mean = [nan,", "must be finite"),
    _instead("no deviation", "std = [0.5,", "std = [0.0,", "must be above 0"),
    _instead("no height", "size = [16, 16]", "size = [0, 16]", "must be above 0"),
    _instead("a size of 10^18 pixels", "[16, 16]", "[1000000000, 1000000000]", "at most 16384"),
    _instead("a size of 19 digits", "[16, 16]", f"[{2**62}, 1]", "at most 16384"),
    _instead("a way to resize", "[16, 16]", '[16, 16]\nresize = "fit"', "resize"),
    # images of a source
    _instead("no images", '"photos"', '"photos", count = 0', "count must be above 0"),
    _instead("more images than there are", '"photos"', f'"photos", count = {2**62}', "there are 12"),
    _instead("images beyond the last", '"photos"', '"photos", skip = 12', "there are 12"),
    _instead("images before the first", '"photos"', '"photos", skip = -1', "skip and seed not below 0"),
    _instead("an odd seed", '"photos"', '"photos", seed = -3', "seed = -3"),
    _instead("images to be made, without a count", '"photos"', '"synthesize"', "give how many in count"),
    _instead("images to be made, 2^62 of them", '"photos"', f'"synthesize", count = {2**62}', "count"),
    _added(
        "settings for images that are not made", "[data.synthesize]\nsteps = 5", "needs [data.calibration]"
    ),
    _instead("the same images twice", '"photos"', '"many.npz"', "are also calibration images"),
    # names of runs
    _added("a run without a name", '[run]\nname = ""', "must be a plain folder name"),
    _added("a run's name that climbs", '[run]\nname = "../../x"', "must be a plain folder name"),
    _added("a run's name from the root", '[run]\nname = "/etc/x"', "must be a plain folder name"),
    _added("a hidden run", '[run]\nname = ".ssh"', "must be a plain folder name"),
    _added("a run's name with a line break", '[run]\nname = "a\\nb"', "must be a plain folder name"),
    _added("a run's name of 4000 characters", f'[run]\nname = "{"r" * 4000}"', "must be a plain folder name"),
    # the environment and the command line
    _instead("a variable that is not set", '"photos"', '"${OPTPIPE_NO_SUCH}"', "is not set"),
    _set("an override without a value", "budget.drop_blocks", "write table.key=value"),
    _set("an override without a table", "seed=1", "write table.key=value"),
    _set("an override into a value", "model.name.x=1", "is a value, not a table"),
    _set("an override of 5000 digits", f"run.seed={HUGE}", "run"),
    _set("an override of 30 digits", f"run.seed={10**30}", "64 bits"),
    _set("an override with a line break", "run.seed=1\nx = 2", "seed"),
    _set("an override nested 100000 deep", f"run.seed={'[' * 100_000}", "seed"),
    _set("an override of an unknown table", "zzz.seed=1", "unknown table"),
    _set("an override with dots alone", "..=1", "unknown table"),
    Case("a folder of other files", _foreign, ("run", "small.toml", "--out", "mine"), 2, "no optpipe run"),
    Case("a file for a run's folder", nothing, ("run", "small.toml", "--out", "mine.py"), 2, "is a file"),
    Case("a run below a file", nothing, ("run", "small.toml", "--out", "mine.py/x"), 2, "cannot be made"),
    Case("the root for a run", nothing, ("run", "small.toml", "--out", "/"), 2, "cannot hold a run"),
    Case("another run's folder", nothing, ("run", "small.toml", "--out", "run"), 2, "holds another run"),
    _added("workers of no kind", '[run]\nworkers = "many"', "[run] workers"),
    _added("workers without end", f'[run]\nworkers = "local:{10**30}"', "[run] workers"),
    _sweep("a sweep of no share", ("small.toml",), "a tenth", "is no number"),
    _sweep("a sweep of all of a latency", ("small.toml",), "1.0", "must be between 0 and 1"),
    _sweep("a sweep of what is no number", ("small.toml",), "nan", "must be between 0 and 1"),
    _sweep("a sweep of a share twice", ("small.toml",), "0.1,0.10", "is there twice"),
    _sweep("a sweep of no recipe", ("nowhere.toml",), "0.1", "there is no such recipe"),
    _sweep("a sweep of text", ("mine.py",), "0.1", "is not valid TOML"),
    _sweep("a sweep over a file", ("small.toml", "--out", "mine.py"), "0.1", "is a file"),
    _sweep("a sweep over a run", ("small.toml", "--out", "run"), "0.1", "is a run"),
    _sweep("a sweep of code, without code", ("small.toml", "--no-code"), "0.1", "--no-code"),
    Case("no command", nothing, ("rnu",), 2, "Did you mean 'run'"),
    Case("no recipe", nothing, ("run",), 2, "Missing argument"),
    Case("an unknown flag", nothing, ("run", "small.toml", "--fersh"), 2, "--fresh"),
)
