"""Rows -> messages -> token ids and labels -> batches. Never touches a model.

The road, one file each: `read` (rows out of files and Hub data sets), `messages` (rows to conversations), `render`
(conversations to text with the answers marked), `encode` (text to ids and labels), `batches` (the epoch plan and the
padded tensors), `preview` (the same, for people).

`encode` and `preview` are functions in the modules of their names (`from luthier.data.encode import encode`): a package
cannot offer a function and a module under one name.
"""

from luthier.core.lazy import lazy_names

_HOMES = {
    "Batch": "luthier.data.batches",
    "EncodedRow": "luthier.data.encode",
    "EncodedSet": "luthier.data.encode",
    "Example": "luthier.data.messages",
    "LabelCoverage": "luthier.data.coverage",
    "Marked": "luthier.data.preferences",
    "Message": "luthier.data.messages",
    "Pair": "luthier.data.preferences",
    "RowFormat": "luthier.data.formats",
    "RowSet": "luthier.data.read",
    "PackedBatch": "luthier.data.batches",
    "collate": "luthier.data.batches",
    "pack": "luthier.data.batches",
    "plan_epoch": "luthier.data.batches",
    "read_rows": "luthier.data.read",
    "reference_answer": "luthier.data.encode",
    "render_prompt": "luthier.data.encode",
    "sniff_format": "luthier.data.formats",
    "split_rows": "luthier.data.batches",
    "stream_rows": "luthier.data.read",
    "to_examples": "luthier.data.messages",
    "to_marked": "luthier.data.preferences",
    "to_pairs": "luthier.data.preferences",
}

__getattr__, __all__ = lazy_names(__name__, _HOMES)
