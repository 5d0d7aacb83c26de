"""The deploy bundle: ONNX, engines, weights, plan and a manifest with the sha256 of each."""

from optpipe.deploy.bundle import (
    BundledEngine,
    Origin,
    Saved,
    load,
    preprocess,
    verify,
    write_bundle,
)

__all__ = ["BundledEngine", "Origin", "Saved", "load", "preprocess", "verify", "write_bundle"]
