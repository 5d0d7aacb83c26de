"""What the rooms of a lab share: the run, the subject, where things are computed, and how keys are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from optpipe import data, quality, store, tune
from optpipe.lab.subject import KEY_VERSION, Origin, Resolutions, Subject
from optpipe.types import Emit, Plan, Quality

if TYPE_CHECKING:
    import torch
    from torch import fx


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """Where answers come from and where they are kept. Not JSON-able.

    ``shape`` is (C, H, W) of the original's images, ``device`` what trains and scores, ``checkpoint_every``
    how many steps a candidate trains between two checkpoints. ``validation`` is None where there are no such
    images.
    """

    run: store.Run
    subject: Subject
    shape: tuple[int, int, int]
    device: str
    emit: Emit
    checkpoint_every: int
    resolutions: Resolutions
    validation: Resolutions | None

    def key(self, kind: str, *depends: object) -> str:
        """The digest of all that an answer depends on."""
        subject = self.subject
        return store.digest(
            KEY_VERSION, kind, subject.model_digest, subject.calibration.digest, subject.seed, *depends
        )

    def kept(self, key: str) -> Origin:
        """Whether weights are the run's own already, come from another run of a sweep, or must be trained."""
        path = self.run.weights(key)
        if self.run.has_tensors(path):
            self.checkpoint(key).path.unlink(missing_ok=True)  # a process was killed before it did
            return "reused"
        return "cached" if self.run.borrow_tensors("trained", f"{key}.safetensors", path) else "computed"

    def checkpoint(self, key: str) -> store.DiskCheckpoint:
        """Of the training that leaves its weights under ``key``; it lies beside them."""
        path = self.run.weights(key).with_name("checkpoint.safetensors")
        return store.DiskCheckpoint(path, self.checkpoint_every)

    def keep(self, key: str, state: dict[str, torch.Tensor]) -> None:
        """Store the weights of a training that is done, which needs no checkpoint any more."""
        store.save_tensors(self.run.weights(key), state)
        self.run.give(self.run.weights(key))
        self.checkpoint(key).path.unlink(missing_ok=True)
        tune.release(self.device)

    def lend(self, key: str) -> Path:
        """Let the other runs of a sweep have weights, whoever trained them; returns where they are."""
        path = self.run.weights(key)
        self.run.lend("trained", f"{key}.safetensors", path)
        return path

    def quality(
        self,
        network: fx.GraphModule,
        plan: Plan,
        score: tuple[int, ...] | Literal["validation"] | None = None,
    ) -> Quality:
        """How well a plan's network does on images of its size.

        They are all calibration images, those at the indices ``score``, or the validation images.
        """
        split = "calibration"
        images, originals = self.resolutions.images(plan), self.subject.calibration
        if score == "validation":
            assert self.validation is not None and self.subject.validation is not None
            split = "validation"
            images, originals = self.validation.images(plan), self.subject.validation
        elif score is not None:
            images, originals = data.part(images, score), data.part(originals, score)
        own = tune.logits(network, images, self.device, emit=self.emit).numpy()
        if images.labels is not None:
            # What the original says is asked for only where there are no labels.
            return quality.score(own, images.labels.numpy(), own, split)
        reference = tune.logits(self.subject.original, originals, self.device, emit=self.emit).numpy()
        return quality.agreement(own, reference, split)
