"""Images from a folder, an .npz file or a function, held in memory at the network's resolution.

Importing this room is light: torch and Pillow come in only when images are loaded.
"""

from optpipe.data.preparing import CROP_RATIO, Labels, Pixels, Preprocess, at_size, network_input, resize
from optpipe.data.sets import ImageSet, check_classes, load_images, overlap, part, resized
from optpipe.data.sources import IMAGE_SUFFIXES, DataSpec, open_source
from optpipe.data.synthesized import SYNTHESIZE, SYNTHESIZED, awaited, check_synthesis, labelled, made

__all__ = [
    "CROP_RATIO",
    "IMAGE_SUFFIXES",
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
    "check_synthesis",
    "labelled",
    "load_images",
    "made",
    "network_input",
    "open_source",
    "overlap",
    "part",
    "resize",
    "resized",
]
