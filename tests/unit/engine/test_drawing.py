"""Drawing against probabilities worked out in float64, and against its plain twin."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from luthier.engine.drawing import Drawn, RowDraw, draw, draw_plain, nucleus, penalized, processed
from luthier.engine.requests import Sampling

VOCABULARY = 1009

# One of each setting, and all at once: what a mixed batch may hold.
MIXED = [
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(presence_penalty=0.7, frequency_penalty=-0.4, logprobs=3),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=40, logprobs=0),
    Sampling(temperature=1.4, top_p=0.8),
    Sampling(temperature=1.0, min_p=0.05, logprobs=5),
    Sampling(temperature=0.8, logit_bias={3: 4.5, 11: -100.0}, repetition_penalty=1.1),
    Sampling(
        temperature=0.9, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2
    ),
]


def rows_of(samplings, prompts):
    return [RowDraw(each, prompt, seed=100 + place) for place, (each, prompt) in enumerate(zip(samplings, prompts, strict=True))]


@pytest.fixture
def steps():
    """Logits of twelve steps for each of MIXED, of few enough different values that ties are frequent in half of them."""
    logits = torch.randn(12, len(MIXED), VOCABULARY) * 3
    logits[::2] = (logits[::2] * 2).round() / 2
    return logits


@pytest.fixture
def prompts():
    return [torch.randint(0, VOCABULARY, (17,)).tolist() for _ in MIXED]


def drawn_one_by_one(places, steps, prompts):
    """What rows at `places` of MIXED draw together, in that order."""
    rows = [RowDraw(MIXED[place], prompts[place], seed=100 + place) for place in places]
    answers = [draw(logits[places], rows) for logits in steps]
    return {place: [answer[at] for answer in answers] for at, place in enumerate(places)}


def test_a_seeded_row_draws_the_same_alone_in_company_and_at_any_place(steps, prompts):
    everywhere = list(range(len(MIXED)))
    together = drawn_one_by_one(everywhere, steps, prompts)
    for other in (everywhere[::-1], [3, 0, 7], [5, 6], *([each] for each in everywhere)):
        for place, answer in drawn_one_by_one(other, steps, prompts).items():
            assert answer == together[place], MIXED[place]


def test_draw_is_its_plain_twin(steps, prompts):
    together, alone = rows_of(MIXED, prompts), rows_of(MIXED, prompts)
    made = [[] for _ in MIXED]
    for logits in steps:
        plain = [draw_plain(logits[place], row, prompts[place], made[place]) for place, row in enumerate(alone)]
        for place, (ours, theirs) in enumerate(zip(draw(logits, together), plain, strict=True)):
            assert ours.token == theirs.token
            assert [value for _, value in ours.alternatives] == pytest.approx([value for _, value in theirs.alternatives])
            made[place].append(ours.token)


def test_greedy_rows_take_the_arg_max_and_logits_stay_as_they_are(steps):
    before = steps[1].clone()
    assert [each.token for each in draw(steps[1], [RowDraw(Sampling())] * len(MIXED))] == before.argmax(-1).tolist()
    draw(steps[1], rows_of(MIXED, [[1, 2, 3]] * len(MIXED)))
    assert steps[1].equal(before)


def test_penalties_are_those_of_the_papers_in_float64():
    """Token 0 in the prompt only, 1 three times in the answer, 2 once in both, 3 nowhere."""
    row = RowDraw(Sampling(repetition_penalty=1.25, presence_penalty=0.5, frequency_penalty=0.25), [0, 2])
    for token in (1, 2, 1, 1):
        row.took(token)
    logits = torch.tensor([[2.0, 1.5, -1.0, 0.7]])
    expected = [2.0 / 1.25, 1.5 / 1.25 - 0.5 - 3 * 0.25, -1.0 * 1.25 - 0.5 - 0.25, 0.7]
    assert penalized(logits, [row])[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_bias_is_that_of_transformers():
    """Their processor of single tokens' bias, then that of repetition, against ours on rows of one batch."""
    bias = {3: 4.5, 11: -7.25, 900: 0.5}
    prompt = [3, 11, 20, 3]
    asked = Sampling(logit_bias=bias, repetition_penalty=1.3)
    logits = torch.randn(2, VOCABULARY) * 3
    expected = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(torch.tensor([prompt]), logits[:1])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt]), expected)
    found = processed(logits, [RowDraw(asked, prompt), RowDraw(Sampling())])
    torch.testing.assert_close(found, torch.cat([expected, logits[1:]]))


def test_logprobs_are_the_log_softmax_of_the_logits_as_given(steps, prompts):
    for logits in steps:
        expected = logits.double().log_softmax(-1)
        for place, (drawn, asked) in enumerate(zip(draw(logits, rows_of(MIXED, prompts)), MIXED, strict=True)):
            if asked.logprobs is None:
                assert drawn == Drawn(drawn.token)
                continue
            assert drawn.logprob == pytest.approx(float(expected[place, drawn.token]), abs=2e-6)
            assert [value for _, value in drawn.alternatives] == pytest.approx(
                expected[place].sort(descending=True).values[: asked.logprobs].tolist(), abs=2e-6
            )
            for token, value in drawn.alternatives:
                assert value == pytest.approx(float(expected[place, token]), abs=2e-6)


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [({}, {0, 1, 2, 3}), ({"top_k": 2}, {0, 2}), ({"top_p": 0.75}, {0, 2}), ({"min_p": 0.29}, {0, 2, 3})],
)
def test_draws_follow_the_distribution(asked, allowed):
    """Chi-square over 4,000 draws; 16.27 is the 99.9 % point for three degrees of freedom (fewer have less)."""
    probabilities = torch.tensor([0.3, 0.05, 0.5, 0.15], dtype=torch.float64)
    kept = torch.tensor([token in allowed for token in range(4)])
    expected = 4000 * torch.where(kept, probabilities, 0) / probabilities[kept].sum()
    rows = [RowDraw(Sampling(temperature=2.0, **asked), seed=seed) for seed in range(8)]
    logits = (2 * probabilities.log()).float().expand(8, 4)
    counts = torch.zeros(4, dtype=torch.float64)
    for _ in range(500):
        counts += torch.tensor([each.token for each in draw(logits, rows)]).bincount(minlength=4)
    assert counts[~kept].sum() == 0
    assert float(((counts - expected) ** 2 / expected)[kept].sum()) < 16.27


def test_a_token_that_equals_the_last_of_the_nucleus_stays_whatever_its_place():
    logits = torch.tensor([[0.2, 0.4, 0.2, 0.2]]).log()
    assert nucleus(logits, 0.5).isfinite().all()
    assert nucleus(logits, 0.3).isfinite().tolist() == [[False, True, False, False]]


def test_improbable_tokens_do_not_come_out_of_nowhere():
    """49,152 tokens at e**-40 each: not one in 2,000 draws. Noise from float32 uniforms gives about six."""
    logits = torch.full((8, 49152), -40.0)
    logits[:, 7] = 0.0
    rows = [RowDraw(Sampling(temperature=1.0), seed=seed) for seed in range(8)]
    assert {each.token for _ in range(250) for each in draw(logits, rows)} == {7}


def test_logits_that_are_not_finite_are_the_rows_fault_alone():
    logits = torch.zeros(3, 5)
    logits[1, 2] = torch.nan
    rows = [RowDraw(Sampling()), RowDraw(Sampling()), RowDraw(Sampling(temperature=1.0, top_p=0.5))]
    draw(logits, rows)
    assert [row.fault is None for row in rows] == [True, False, True]


def test_stop_ids_are_the_models_and_the_requests():
    assert RowDraw(Sampling(stop_token_ids=(5,)), stop_ids=[1, 2]).stop_ids == {1, 2, 5}
    assert RowDraw(Sampling(stop_token_ids=(5,), ignore_eos=True), stop_ids=[1, 2]).stop_ids == {5}


def test_rows_without_a_seed_differ():
    logits = torch.zeros(2, 49152)
    first, second = draw(logits, [RowDraw(Sampling(temperature=1.0)), RowDraw(Sampling(temperature=1.0))])
    assert first.token != second.token
