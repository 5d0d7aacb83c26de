"""Images from a folder, an .npz file or a function, held in memory at the network's resolution.

Importing this room is light: torch and Pillow come in only when images are loaded.
"""

from optpipe.data.preparing import CROP_RATIO, Labels, Pixels, Preprocess, at_size, network_input, resize
from optpipe.data.sets import ImageSet, check_classes, load_images, overlap, part, resized
from optpipe.data.sources import IMAGE_SUFFIXES, DataSpec

__all__ = [
    "CROP_RATIO",
    "IMAGE_SUFFIXES",
    "DataSpec",
    "ImageSet",
    "Labels",
    "Pixels",
    "Preprocess",
    "at_size",
    "check_classes",
    "load_images",
    "network_input",
    "overlap",
    "part",
    "resize",
    "resized",
]
