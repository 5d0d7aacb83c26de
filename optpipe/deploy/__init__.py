"""The deploy bundle: ONNX, weights, plan and a manifest with the sha256 of each."""

from optpipe.deploy.bundle import Saved, load, load_weights, verify, write_bundle

__all__ = ["Saved", "load", "load_weights", "verify", "write_bundle"]
