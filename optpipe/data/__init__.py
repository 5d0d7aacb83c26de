"""Images from a folder, an .npz file or a function, at the network's resolution: in memory, or read again.

Importing this room is light: torch and Pillow come in only when images are loaded.
"""

from optpipe.data.preparing import (
    CROP_RATIO,
    LARGEST,
    Labels,
    Pixels,
    Preprocess,
    at_size,
    check_preprocess,
    network_input,
    resize,
)
from optpipe.data.sets import ImageSet, check_classes, load_images, overlap, part, resized
from optpipe.data.sources import IMAGE_SUFFIXES, DataSpec, names_function, open_source
from optpipe.data.synthesized import SYNTHESIZE, SYNTHESIZED, awaited, check_synthesis, labelled, made

__all__ = [
    "CROP_RATIO",
    "IMAGE_SUFFIXES",
    "LARGEST",
    "SYNTHESIZE",
    "SYNTHESIZED",
    "DataSpec",
    "ImageSet",
    "Labels",
    "Pixels",
    "Preprocess",
    "at_size",
    "awaited",
    "check_classes",
    "check_preprocess",
    "check_synthesis",
    "labelled",
    "load_images",
    "made",
    "names_function",
    "network_input",
    "open_source",
    "overlap",
    "part",
    "resize",
    "resized",
]
