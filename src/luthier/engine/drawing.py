"""How the next token is drawn: bias, penalties, constraint, temperature, top-k, top-p, min-p (transformers' order), then a draw.

The draw is Gumbel-max: with Gumbel noise added to the logits, the arg max *is* a sample of the softmax. So greedy and sampled
rows end in the same arg max, no global random state is read or moved, and what a row samples does not depend on its batch
mates: the noise comes from the row's own generator, one number per token of the vocabulary.

Each change of the logits is a function of some rows; `draw` gives it the rows that want it and leaves the others' bytes alone.
`draw_plain` is the same for one row, step by step.

Shapes: B rows, V vocabulary, K tokens seen.
"""

import secrets
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from luthier.engine.requests import Sampling

if TYPE_CHECKING:
    from torch import Tensor


class Matcher(Protocol):
    """What a constraint must answer while tokens are drawn; see constraints.py."""

    def allowed(self, vocabulary: int) -> "np.ndarray":
        """Return which of so many tokens may come next, as booleans (V)."""

    def take(self, token: int) -> None:
        """Go on past `token`."""

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""

    @property
    def fault(self) -> str | None:
        """Why the constraint cannot go on, or None."""


@dataclass(frozen=True)
class Drawn:
    """A token, and where asked for: its log-probability and the likeliest tokens (it may be one of them), likeliest first."""

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class RowDraw:
    """What one request keeps from token to token: its generator, the tokens seen, the place in its constraint.

    `stop_ids` are the model's own; those that end this answer are in the attribute of that name. A constraint can only end
    with one of them, so it keeps them even where `ignore_eos` is set. Without `seed`, that of `sampling` or a fresh one.
    After a draw `fault` says why the row cannot go on, where it cannot.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int] = (),
        *,
        seed: int | None = None,
        stop_ids: Collection[int] = (),
        matcher: Matcher | None = None,
    ):
        self.sampling = sampling
        self.matcher = matcher
        own = frozenset() if sampling.ignore_eos and matcher is None else frozenset(stop_ids)
        self.stop_ids = own | frozenset(sampling.stop_token_ids)
        self.fault: str | None = None
        self.changes = [change for change, is_wanted in _CHANGES.items() if is_wanted(self)]
        if sampling.temperature > 0:
            self.changes.append(noisy)
            seed = sampling.seed if seed is None else seed
            self.generator = np.random.default_rng(secrets.randbits(63) if seed is None else seed)
        if penalized in self.changes:
            self.tally = _Tally(prompt_ids, sampling.max_new_tokens)
        if sampling.logit_bias:
            self.bias_ids_K = np.fromiter(sampling.logit_bias, dtype=np.int64)
            self.bias_K = np.fromiter(sampling.logit_bias.values(), dtype=np.float32)

    def took(self, token: int) -> None:
        """Note that `token` is the row's next one."""
        if penalized in self.changes:
            self.tally.add(token)
        if self.matcher is not None and token not in self.stop_ids:
            self.matcher.take(token)
            self.fault = self.fault or self.matcher.fault


def draw(logits_BV: "Tensor", rows: "Sequence[RowDraw]") -> list[Drawn]:
    """Return the next token of each row, and note it in the row. The logits are float32 and stay as they are.

    Log-probabilities are those of the logits as given, before any change.
    """
    best_B, tokens_B = _changed(logits_BV, rows, (*_CHANGES, noisy)).max(dim=-1)
    tokens, finite = tokens_B.tolist(), best_B.isfinite().tolist()
    for row, token, is_finite in zip(rows, tokens, finite, strict=True):
        if not is_finite:  # max() gives back any NaN of its row, so this sees them all
            row.fault = row.fault or "the model's logits are not finite numbers, or no token is allowed"
        row.took(token)
    drawn = [Drawn(token) for token in tokens]
    for place, logprob in _logprobs(logits_BV, tokens, rows).items():
        drawn[place] = logprob
    return drawn


def processed(logits_BV: "Tensor", rows: Sequence[RowDraw]) -> "Tensor":
    """Return the logits whose softmax each row's token is drawn from (greedy: whose largest it is)."""
    return _changed(logits_BV, rows, tuple(_CHANGES))


def draw_plain(logits_V: "Tensor", row: RowDraw, seen: Sequence[int], made: Sequence[int]) -> Drawn:
    """Do for one row what `draw` does, with every step written out; `seen` is the prompt, `made` the answer so far."""
    asked = row.sampling
    scores_V = logits_V.clone()
    for token, bias in (asked.logit_bias or {}).items():
        scores_V[token] += bias
    for token in {*seen, *made}:
        if scores_V[token] < 0:
            scores_V[token] *= asked.repetition_penalty
        else:
            scores_V[token] /= asked.repetition_penalty
    for token, times in Counter(made).items():
        scores_V[token] -= asked.presence_penalty + asked.frequency_penalty * times
    if row.matcher is not None:
        scores_V[~torch.from_numpy(_allowed(row, len(scores_V)))] = -torch.inf
    if asked.temperature > 0:
        scores_V /= asked.temperature
        if asked.top_k:
            kth = scores_V.sort(descending=True).values[: asked.top_k][-1]
            scores_V[scores_V < kth] = -torch.inf
        if asked.top_p < 1:
            likeliest = scores_V.sort(descending=True).values
            in_front = likeliest.softmax(-1).cumsum(-1) - likeliest.softmax(-1)
            scores_V[scores_V < likeliest[in_front < asked.top_p][-1]] = -torch.inf
        probabilities_V = scores_V.softmax(-1)
        scores_V[probabilities_V < asked.min_p * probabilities_V.max()] = -torch.inf
        scores_V -= torch.from_numpy(row.generator.standard_exponential(len(scores_V))).float().log()
    token = int(scores_V.argmax())
    row.took(token)
    if asked.logprobs is None:
        return Drawn(token)
    logprobs_V = logits_V.log_softmax(-1)
    values_V, ids_V = logprobs_V.sort(descending=True)
    pairs = zip(ids_V[: asked.logprobs].tolist(), values_V[: asked.logprobs].tolist(), strict=True)
    return Drawn(token, float(logprobs_V[token]), tuple(pairs))


def biased(scores_BV: "Tensor", rows: Sequence[RowDraw]) -> "Tensor":
    """Return the logits with each row's bias added, as OpenAI's API reference has it: to single tokens, before all else."""
    places_K = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(row.bias_K) for row in rows]))
    ids_K = torch.from_numpy(np.concatenate([row.bias_ids_K for row in rows]))
    bias_K = torch.from_numpy(np.concatenate([row.bias_K for row in rows]))
    places_K, ids_K, bias_K = (each.to(scores_BV.device) for each in (places_K, ids_K, bias_K))
    return scores_BV.index_put((places_K, ids_K), bias_K.to(scores_BV.dtype), accumulate=True)


def penalized(scores_BV: "Tensor", rows: Sequence[RowDraw]) -> "Tensor":
    """Return the logits with tokens seen made less likely (or likelier, where a penalty says so).

    Repetition: logits of tokens in prompt or answer are divided by it, negative ones multiplied (Keskar et al. 2019, section
    4.1, arXiv:1909.05858, with the sign minded as transformers does). Presence and frequency: taken off for tokens of the
    answer, once and for each time, as OpenAI's API reference has it.
    """
    seen = [row.tally.seen() for row in rows]
    places_K = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(ids) for ids, _ in seen]))
    ids_K = torch.from_numpy(np.concatenate([ids for ids, _ in seen]))
    counts_K = torch.from_numpy(np.concatenate([counts for _, counts in seen]))
    places_K, ids_K, counts_K = (each.to(scores_BV.device) for each in (places_K, ids_K, counts_K))
    repetition_K = _column(scores_BV, rows, "repetition_penalty")[places_K, 0]
    presence_K = _column(scores_BV, rows, "presence_penalty")[places_K, 0]
    frequency_K = _column(scores_BV, rows, "frequency_penalty")[places_K, 0]
    scores_K = scores_BV[places_K, ids_K]
    scores_K = torch.where(scores_K < 0, scores_K * repetition_K, scores_K / repetition_K)
    scores_K = scores_K - (presence_K * (counts_K > 0) + frequency_K * counts_K)
    return scores_BV.index_put((places_K, ids_K), scores_K)


def constrained(scores_BV: "Tensor", rows: Sequence[RowDraw]) -> "Tensor":
    """Return the logits with the tokens that each row's constraint forbids at -inf."""
    allowed_BV = torch.from_numpy(np.stack([_allowed(row, scores_BV.shape[-1]) for row in rows]))
    return torch.where(allowed_BV.to(scores_BV.device), scores_BV, -torch.inf)


def tempered(scores_BV: "Tensor", rows: Sequence[RowDraw]) -> "Tensor":
    """Return the logits divided by each row's temperature."""
    return scores_BV / _column(scores_BV, rows, "temperature")


def only_top_k(scores_BV: "Tensor", rows: Sequence[RowDraw]) -> "Tensor":
    """Return the logits with all but the k largest at -inf; those that equal the k-th stay."""
    ks = [min(row.sampling.top_k, scores_BV.shape[-1]) for row in rows]
    largest_BK = scores_BV.topk(max(ks), dim=-1).values
    last_B1 = largest_BK.gather(-1, torch.tensor(ks, device=scores_BV.device)[:, None] - 1)
    return torch.where(scores_BV < last_B1, -torch.inf, scores_BV)


def only_top_p(scores_BV: "Tensor", rows: Sequence[RowDraw]) -> "Tensor":
    """Return the logits with those outside of each row's nucleus at -inf."""
    return nucleus(scores_BV, [row.sampling.top_p for row in rows])


def only_min_p(scores_BV: "Tensor", rows: Sequence[RowDraw]) -> "Tensor":
    """Return the logits with tokens at -inf whose probability is below min_p times that of the likeliest.

    Source: Nguyen et al. 2024, section 3 (arXiv:2407.01082).
    """
    probabilities_BV = scores_BV.softmax(dim=-1)
    least_B1 = _column(scores_BV, rows, "min_p") * probabilities_BV.amax(dim=-1, keepdim=True)
    return torch.where(probabilities_BV < least_B1, -torch.inf, scores_BV)


def noisy(scores_BV: "Tensor", rows: Sequence[RowDraw]) -> "Tensor":
    """Return the logits with each row's Gumbel noise added, so that the arg max is a sample."""
    return with_gumbel_noise(scores_BV, [row.generator for row in rows])


def nucleus(logits_BV: "Tensor", top_p: float | Sequence[float]) -> "Tensor":
    """Return the logits with all but the most likely tokens at -inf: the fewest whose probabilities add up to `top_p`.

    Tokens exactly as likely as the last of them stay too, so that no order of the vocabulary decides. One `top_p`, or one per
    row; 1 keeps every token. Source: Holtzman et al. 2019, section 3.1 (arXiv:1904.09751).
    """
    shares = [top_p] if isinstance(top_p, float) else top_p
    if min(shares) >= 1.0:
        return logits_BV
    rising_BV = _rising(logits_BV)
    # Summed from the least likely on, as transformers does: the small ones are not lost in a sum that is nearly 1.
    outside_B1 = torch.tensor([[1 - share] for share in shares], dtype=logits_BV.dtype, device=logits_BV.device)
    is_out_BV = rising_BV.softmax(dim=-1).cumsum(dim=-1) <= outside_B1
    num_out_B1 = is_out_BV[..., :-1].sum(dim=-1, keepdim=True)  # the most likely token always stays
    return torch.where(logits_BV < rising_BV.gather(-1, num_out_B1), -torch.inf, logits_BV)


def with_gumbel_noise(logits_BV: "Tensor", generators: "Sequence[np.random.Generator]") -> "Tensor":
    """Return the logits plus each row's own Gumbel noise.

    -log of an exponential draw is a Gumbel draw. Drawn in float64, where it is never 0: in float32 one of 2**23 draws is, and
    with a vocabulary of 50,000 that is a token out of nowhere in every 200th draw. numpy's draws take a sixth of torch's time.
    """
    waits_BV = np.stack([each.standard_exponential(logits_BV.shape[-1]) for each in generators])
    return logits_BV - torch.from_numpy(waits_BV.astype(np.float32)).log().to(logits_BV.device)


Change = Callable[["Tensor", Sequence[RowDraw]], "Tensor"]

# Each change with the rows that want it, in the order of transformers' generate: processors, then warpers.
_CHANGES: dict[Change, Callable[[RowDraw], bool]] = {
    biased: lambda row: bool(row.sampling.logit_bias),
    penalized: lambda row: (row.sampling.repetition_penalty, *_additive(row.sampling)) != (1.0, 0.0, 0.0),
    constrained: lambda row: row.matcher is not None,
    tempered: lambda row: row.sampling.temperature not in (0.0, 1.0),
    only_top_k: lambda row: row.sampling.top_k > 0,
    only_top_p: lambda row: row.sampling.top_p < 1.0,
    only_min_p: lambda row: row.sampling.min_p > 0.0,
}


class _Tally:
    """The tokens that a row has seen, and how many times its answer has each."""

    def __init__(self, prompt_ids: Sequence[int], max_new_tokens: int):
        self.places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        self.ids_K = np.empty(len(self.places) + max_new_tokens, dtype=np.int64)
        self.ids_K[: len(self.places)] = list(self.places)
        self.counts_K = np.zeros(len(self.ids_K), dtype=np.float32)

    def add(self, token: int) -> None:
        place = self.places.setdefault(token, len(self.places))
        self.ids_K[place] = token
        self.counts_K[place] += 1

    def seen(self) -> "tuple[np.ndarray, np.ndarray]":
        return self.ids_K[: len(self.places)], self.counts_K[: len(self.places)]


def _changed(logits_BV: "Tensor", rows: Sequence[RowDraw], changes: Sequence[Change]) -> "Tensor":
    """Return the logits after the changes, each on the rows that want it; what nobody wants costs nothing."""
    for change in changes if any(row.changes for row in rows) else ():
        places = [place for place, row in enumerate(rows) if change in row.changes]
        if len(places) == len(rows):
            logits_BV = change(logits_BV, rows)
        elif places:
            index = torch.tensor(places, device=logits_BV.device)
            logits_BV = logits_BV.index_copy(0, index, change(logits_BV[index], [rows[place] for place in places]))
    return logits_BV


def _allowed(row: RowDraw, vocabulary: int) -> "np.ndarray":
    """What the constraint allows next (V); stop tokens exactly where it may end."""
    assert row.matcher is not None
    allowed_V = row.matcher.allowed(vocabulary)
    allowed_V[[token for token in row.stop_ids if token < vocabulary]] = row.matcher.is_accepting
    return allowed_V


def _logprobs(logits_BV: "Tensor", tokens: list[int], rows: Sequence[RowDraw]) -> dict[int, Drawn]:
    """By place, for the rows that ask: the token with its log-probability and the likeliest tokens."""
    asked = {place: row.sampling.logprobs for place, row in enumerate(rows) if row.sampling.logprobs is not None}
    if not asked:
        return {}
    index = torch.tensor(list(asked), device=logits_BV.device)
    logprobs_BV = logits_BV[index].log_softmax(dim=-1)
    own = logprobs_BV.gather(-1, torch.tensor([[tokens[place]] for place in asked], device=logits_BV.device))[:, 0].tolist()
    found = {}
    for (place, number), logprob, logprobs_V in zip(asked.items(), own, logprobs_BV, strict=True):
        # Row by row: among equals topk's choice depends on k, so the largest k of a batch would show in the other rows.
        likeliest = logprobs_V.topk(min(number, len(logprobs_V)))
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        found[place] = Drawn(tokens[place], logprob, tuple(pairs))
    return found


def _rising(logits_BV: "Tensor") -> "Tensor":
    """Each row's logits from the smallest to the largest. numpy sorts floats alone, thirteen times as fast as torch here."""
    if logits_BV.device.type == "cpu":
        return torch.from_numpy(np.sort(logits_BV.numpy(), axis=-1))
    return logits_BV.sort(dim=-1).values


def _column(scores_BV: "Tensor", rows: Sequence[RowDraw], name: str) -> "Tensor":
    """One setting of all rows, (B, 1)."""
    return torch.tensor([[getattr(row.sampling, name)] for row in rows], dtype=scores_BV.dtype, device=scores_BV.device)


def _additive(sampling: Sampling) -> tuple[float, float]:
    return sampling.presence_penalty, sampling.frequency_penalty
