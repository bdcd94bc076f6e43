"""Stage 1, load: any ordinary caption-image dataset as the `pairs` table, its images by URI, its distinct pairs.

The flow: `layouts` recognises the files, `captions_json` and `tables` read their rows, `images` finds and reads the
images, `load` makes the table, `fold` the distinct things to embed, train and score.
"""

from nc_audit.dataset.fold import Folded, fold, mark_corrupt
from nc_audit.dataset.ids import content_id, normalise_caption
from nc_audit.dataset.images import ImageStore, decode_image
from nc_audit.dataset.load import LoadedDataset, load_pairs
from nc_audit.dataset.places import Place, check_exists, find_dataset, root_of
from nc_audit.dataset.rows import LoadOptions
from nc_audit.dataset.trusted import Trusted, read_trusted

__all__ = [
    "Folded",
    "ImageStore",
    "LoadOptions",
    "LoadedDataset",
    "Place",
    "Trusted",
    "check_exists",
    "content_id",
    "decode_image",
    "find_dataset",
    "fold",
    "load_pairs",
    "mark_corrupt",
    "normalise_caption",
    "read_trusted",
    "root_of",
]
