"""What a pair can be and how it can begin: the methods and inits by name, each explained, with the settings that choose it.

One list for the command line, the settings and the pages. Loads no torch; the equations are in lora.py and inits.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LOFTQ = "loftq"
"""The init of a base that is put into 4 bits while the adapter is attached."""
PISSA_NITER = re.compile(r"pissa_niter_([1-9]\d*)")
"""pissa with a randomised decomposition, and its number of subspace iterations."""


@dataclass(frozen=True)
class Method:
    """One way to adapt (`kind` is "method") or to begin ("init"): what it does, when to use it, and how to ask for it.

    `settings` are the run's settings, by section, that choose it.
    """

    name: str
    kind: str
    what: str
    when: str
    source: str
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def flag(self) -> str:
        """How `luthier train` is asked for it."""
        return f"--{self.kind} {self.name}" + " --quantize nf4" * (self.name == LOFTQ)


CATALOGUE = (
    Method(
        "lora",
        "method",
        "Adds scaling * B A to a frozen weight, with scaling = alpha / r. A and B are thin, so little is trained and "
        "stored; merged, the model runs as fast as its base.",
        "The start for everything: compare the others with it, on the same rows and the same number of trained parameters.",
        "Hu et al. 2021, arXiv:2106.09685",
    ),
    Method(
        "rslora",
        "method",
        "LoRA with scaling = alpha / sqrt(r). With alpha / r the updates shrink as the rank grows; with the root their "
        "size does not depend on it. An alpha chosen for LoRA is sqrt(r) times too strong here.",
        "Ranks of 64 and more, or when several ranks are to be compared at one learning rate.",
        "Kalajdzievski 2023, arXiv:2312.03732",
        {"lora": {"use_rslora": True}},
    ),
    Method(
        "dora",
        "method",
        "Splits each row of W + scaling * B A into a length, which is trained on its own, and a direction, which LoRA "
        "moves. Costs a norm of the merged weight in each step; a merged model is as fast as its base.",
        "Small ranks, where LoRA falls short of full training; about half of LoRA's rank is often enough.",
        "Liu et al. 2024, arXiv:2402.09353",
        {"lora": {"use_dora": True}},
    ),
    Method(
        "adalora",
        "method",
        "Writes the update as P diag(E) Q, begins with more directions than asked for, and takes away those whose loss "
        "would miss them least, so that each layer ends with the rank it needs.",
        "A tight budget of parameters and layers that matter unequally. Needs a known number of steps.",
        "Zhang et al. 2023, arXiv:2303.10512",
        {"lora": {"peft_type": "ADALORA"}},
    ),
    Method(
        "lora+",
        "method",
        "LoRA whose B learns faster than its A, here 16 times. B begins at zero and A at random, and one learning rate "
        "for both is too small for B in wide models. Costs nothing.",
        "Runs that learn too slowly. Lower the learning rate with it, by half or so. The best ratio depends on the task; "
        "its authors use 16 to 80.",
        "Hayou et al. 2024, arXiv:2402.12354",
        {"train": {"loraplus_lr_ratio": 16.0}},
    ),
    Method(
        "lora-fa",
        "method",
        "LoRA with A frozen as it began: only B has gradients and moments, about half as many numbers, and no layer keeps its "
        "input for A's gradient. That takes 6 to 13 % off the peak of a step (SmolLM2-135M, 2 x 256 tokens, float32, r = 16), "
        "and nothing in fused blocks, which keep none for LoRA either.",
        "Large ranks, where gradients and moments take room, and models whose blocks are not fused. If it learns too little, "
        "raise the rank.",
        "Zhang et al. 2023, arXiv:2308.03303",
        {"train": {"freeze_A": True}},
    ),
    Method(
        "kaiming",
        "init",
        "A uniform within 1 / sqrt(in), B zero: the update begins at nothing and so does its effect. What LoRA's own code "
        "and PEFT do.",
        "The default.",
        "Hu et al. 2021, arXiv:2106.09685",
        {"lora": {"init_lora_weights": True}},
    ),
    Method(
        "gaussian",
        "init",
        "A normal with a deviation of 1 / r, B zero. A's size depends on the rank, not on the width of the layer.",
        "To repeat runs that were made so, as those of diffusers.",
        "Hu et al. 2021, arXiv:2106.09685",
        {"lora": {"init_lora_weights": "gaussian"}},
    ),
    Method(
        "orthogonal",
        "init",
        "A and B both random, A in one half of an orthogonal basis and B in the other, so that B A is zero and both have "
        "a gradient from the first step. Needs an even rank.",
        "Short runs, in which the first steps count, since with B = 0 A does not move at first.",
        "datta0.github.io/posts/rethink-lora-init",
        {"lora": {"init_lora_weights": "orthogonal"}},
    ),
    Method(
        "olora",
        "init",
        "B and A begin as the first r columns of Q and rows of R of the weight's W = Q R. The base keeps its weight; what "
        "the pair began with is subtracted. Saved at twice the rank.",
        "Where pissa's exact decomposition takes too long (SmolLM2-135M on one thread: 5 s against 16 s). The directions are "
        "those of the first r inputs, not the largest.",
        "Büyükakyüz 2024, arXiv:2406.01775",
        {"lora": {"init_lora_weights": "olora"}},
    ),
    Method(
        "pissa",
        "init",
        "B and A begin as the r largest singular directions of the weight, so training turns what is largest in W. The "
        "base keeps its weight and what the pair began with is subtracted. Saved at twice the rank.",
        "Faster learning at high ranks. Its authors use alpha = r, no dropout, and a learning rate of 2e-5 for r = 128.",
        "Meng et al. 2024, arXiv:2404.02948",
        {"lora": {"init_lora_weights": "pissa"}},
    ),
    Method(
        "eva",
        "init",
        "A begins as the directions in which a layer's inputs vary most at the answers of a few of the run's own batches, B at "
        "zero. With `lora.eva_config` ranks move to the layers whose inputs vary in more directions; their sum stays.",
        "Data unlike what the model has seen; costs a few forward passes at the start. Only through `luthier train`.",
        "Paischer et al. 2024, arXiv:2410.07170",
        {"lora": {"init_lora_weights": "eva"}},
    ),
    Method(
        "loftq",
        "init",
        "The base goes into 4 bits, and B and A begin as the r largest singular directions of what its weights lose by that. "
        "`lora.loftq_config` may repeat it (loftq_iter); the folder then holds what makes that base again.",
        "With --quantize nf4 and small ranks, where plain 4 bits start too far from the base. Reads the base in floats first.",
        "Li et al. 2023, arXiv:2310.08659",
        {"lora": {"init_lora_weights": "loftq"}},
    ),
    Method(
        "pissa_niter_<number>",
        "init",
        "pissa with a randomised decomposition of so many subspace iterations, much faster on large weights and as close "
        "from 16 iterations on. Which directions it finds depends on the seed, so the run keeps them.",
        "Instead of pissa on all but small models (SmolLM2-135M on one thread: 3 s against 16 s).",
        "Halko et al. 2009, arXiv:0909.4061",
        {"lora": {"init_lora_weights": "pissa_niter_16"}},
    ),
)

METHOD_NAMES = tuple(method.name for method in CATALOGUE if method.kind == "method")
INIT_NAMES = tuple(method.name for method in CATALOGUE if method.kind == "init" and method.name != "kaiming")


def is_known_init(init: bool | str) -> bool:
    """Return whether `init` is a value of init_lora_weights."""
    return isinstance(init, bool) or init in INIT_NAMES[:-1] or bool(PISSA_NITER.fullmatch(init))


def keeps_start(init: bool | str) -> bool:
    """Return whether a pair with this init begins at B0 A0 != 0, which it then has to keep to subtract."""
    return needs_linear(init) and init not in ("eva", LOFTQ)


def needs_linear(init: bool | str) -> bool:
    """Return whether this init's equations are for linear layers only."""
    return isinstance(init, str) and init != "gaussian"


def why_no_start(init: bool | str, r: int, in_features: int, out_features: int) -> str | None:
    """Return why a linear layer cannot begin with this init at this rank, or None."""
    if init == "orthogonal" and r % 2:
        return f"init 'orthogonal' gives A one half of the rank and B the other, so r must be even, not {r}"
    if init == "eva" and r > in_features:
        return f"init 'eva' takes r={r} directions from inputs of width {in_features}"
    if (keeps_start(init) or init == LOFTQ) and init != "orthogonal" and r > min(in_features, out_features):
        return (
            f"init '{init}' takes r={r} directions from a weight of {out_features} x {in_features}, "
            f"which has {min(in_features, out_features)}"
        )
    return None
