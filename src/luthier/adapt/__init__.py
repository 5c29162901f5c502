"""Attach, activate, silence, merge and detach adapters on a live model.

This room never reads or writes a file (`luthier.formats` does), except for weights set aside by a merge that was asked to.
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "AttachPlan": "luthier.adapt.planning",
        "RankAllocator": "luthier.adapt.ranks",
        "activate": "luthier.adapt.switching",
        "add_score_head": "luthier.adapt.score_head",
        "adapter_parameters": "luthier.adapt.state",
        "attach": "luthier.adapt.attaching",
        "attach_loftq": "luthier.adapt.loftq",
        "base_parameters": "luthier.adapt.state",
        "detach": "luthier.adapt.attaching",
        "drop_masked": "luthier.adapt.ranks",
        "disabled": "luthier.adapt.switching",
        "fuse": "luthier.adapt.fusing",
        "fusion_of": "luthier.adapt.fusing",
        "merge": "luthier.adapt.merging",
        "plan": "luthier.adapt.planning",
        "quantize_linears": "luthier.adapt.packing",
        "roster_of": "luthier.adapt.state",
        "unfuse": "luthier.adapt.fusing",
        "unmerge": "luthier.adapt.merging",
    },
)
