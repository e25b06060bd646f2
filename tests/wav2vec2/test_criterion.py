"""The losses against brute force, and properties of the draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from wav2vec2 import criterion
from wav2vec2.config import ObjectiveConfig
from wav2vec2.criterion import Negatives


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def own(rows: int, masked: int) -> torch.Tensor:
    return torch.arange(masked).expand(rows, masked)


def test_negatives_come_from_the_same_utterance_and_never_are_the_frame_itself():
    drawn = criterion.sample_negatives(
        ObjectiveConfig(num_negatives=50), own(3, 7), torch.full((3,), 7), 7, generator()
    )
    assert drawn.frames_bMN.shape == (3, 7, 50)
    assert drawn.frames_bMN.min() >= 0
    assert drawn.frames_bMN.max() <= 6
    assert (drawn.frames_bMN != own(3, 7)[..., None]).all()


def test_all_other_frames_are_drawn_equally_often():
    drawn = criterion.sample_negatives(
        ObjectiveConfig(num_negatives=6000), own(1, 5), torch.tensor([5]), 5, generator()
    )
    for frame in range(5):
        counts = torch.bincount(drawn.frames_bMN[0, frame], minlength=5)
        assert counts[frame] == 0
        others = counts[torch.arange(5) != frame]
        assert (others - 1500).abs().max() < 5 * math.sqrt(1500)


def test_cross_utterance_negatives_reach_all_rows_but_not_their_padding():
    objective = ObjectiveConfig(num_negatives=0, cross_sample_negatives=3000)
    candidates = torch.tensor([4, 2, 6])
    drawn = criterion.sample_negatives(objective, own(3, 2), candidates, 6, generator())
    assert drawn.across_rows
    row, place = drawn.frames_bMN // 6, drawn.frames_bMN % 6
    assert (place < candidates[row]).all()
    assert (drawn.frames_bMN != (own(3, 2) + 6 * torch.arange(3)[:, None])[..., None]).all()
    counts = torch.bincount(drawn.frames_bMN[1, 0], minlength=18)
    valid = [r * 6 + p for r in range(3) for p in range(int(candidates[r])) if (r, p) != (1, 0)]
    assert (counts[valid] - 3000 / 11).abs().max() < 5 * math.sqrt(3000 / 11)


def test_negatives_of_a_row_with_one_frame_are_excluded():
    drawn = criterion.sample_negatives(ObjectiveConfig(num_negatives=4), own(1, 1), torch.tensor([1]), 1, generator())
    x = torch.randn(1, 1, 3)
    logits = criterion.contrastive_logits(x, x, torch.tensor([[7]]), x, torch.tensor([[7]]), drawn, 0.1)
    assert criterion.info_nce(logits).item() == 0


def brute_force(predictions, targets, ids, candidates, candidate_ids, negatives, temperature):
    rows, masked, count = negatives.frames_bMN.shape
    logits = torch.empty(rows, masked, 1 + count, dtype=predictions.dtype)
    flat, flat_ids = candidates.flatten(0, 1), candidate_ids.flatten()
    for r, m in itertools.product(range(rows), range(masked)):
        logits[r, m, 0] = F.cosine_similarity(predictions[r, m], targets[r, m], dim=0)
        for n in range(count):
            index = int(negatives.frames_bMN[r, m, n]) + (0 if negatives.across_rows else r * candidates.shape[1])
            similarity = F.cosine_similarity(predictions[r, m], flat[index], dim=0)
            logits[r, m, 1 + n] = -torch.inf if flat_ids[index] == ids[r, m] else similarity
    return logits / temperature


@pytest.mark.parametrize("across", [False, True])
def test_contrastive_logits_and_gradients_equal_brute_force(across):
    torch.manual_seed(0)
    objective = ObjectiveConfig(num_negatives=6, cross_sample_negatives=4 if across else 0)
    predictions, targets = (torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ids = torch.randint(4, (3, 5))  # few codes, so that negatives equal to the positive occur
    drawn = criterion.sample_negatives(objective, own(3, 5), torch.full((3,), 5), 5, generator())
    found = criterion.contrastive_logits(predictions, targets, ids, targets, ids, drawn, 0.1)
    expected = brute_force(predictions, targets, ids, targets, ids, drawn, 0.1)
    assert torch.isinf(expected).any()
    torch.testing.assert_close(found, expected)
    for tensor in (predictions, targets):
        gradients = [
            torch.autograd.grad(criterion.info_nce(logits), tensor, retain_graph=True)[0]
            for logits in (found, expected)
        ]
        torch.testing.assert_close(*gradients)


def test_orthonormal_targets_give_the_loss_worked_out_by_hand():
    targets = torch.eye(2)[None]
    drawn = Negatives(torch.tensor([[[1], [0]]]), False)
    ids = torch.tensor([[0, 1]])
    logits = criterion.contrastive_logits(targets, targets, ids, targets, ids, drawn, 0.1)
    assert criterion.info_nce(logits).item() == pytest.approx(2 * math.log1p(math.exp(-10)), rel=1e-3)
    assert int(criterion.num_correct(logits)) == 2


def test_equal_similarities_count_as_wrong():
    assert int(criterion.num_correct(torch.zeros(2, 3, 5))) == 0


def test_perplexity_of_one_code_and_of_all_codes():
    one, even = F.one_hot(torch.tensor([1, 2]), 8).float(), torch.full((2, 8), 1 / 8)
    assert criterion.perplexity(one).item() == pytest.approx(2, rel=1e-4)
    assert criterion.perplexity(even).item() == pytest.approx(16, rel=1e-4)
    assert criterion.diversity(criterion.perplexity(even), 16).item() == pytest.approx(0, abs=1e-4)


def test_code_statistics_ignore_frames_of_weight_zero():
    logits = torch.randn(9, 2, 6)
    weights = torch.tensor([1.0] * 5 + [0.0] * 4)
    for found, expected in zip(
        criterion.code_statistics(logits, weights), criterion.code_statistics(logits[:5]), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_target_ids_are_equal_exactly_for_equal_targets(dtype):
    targets = torch.randn(40, 16).to(dtype)
    targets[7] = targets[3]
    targets[20] = 0.0
    targets[21] = -0.0
    ids = criterion.target_ids(targets)
    same = (targets[:, None] == targets).all(-1)
    assert torch.equal(ids[:, None] == ids, same)


def ctc_brute_force(log_probs: torch.Tensor, label: list[int]) -> float:
    """Sum over all paths of symbols that collapse to the label."""
    frames, symbols = log_probs.shape
    total = 0.0
    for path in itertools.product(range(symbols), repeat=frames):
        collapsed = [symbol for symbol, _ in itertools.groupby(path) if symbol != 0]
        if collapsed == label:
            total += math.exp(sum(log_probs[t, symbol].item() for t, symbol in enumerate(path)))
    return -math.log(total)


def test_ctc_equals_the_sum_over_all_paths():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3)
    labels, lengths = torch.tensor([[1, 2], [1, 1]]), (2, 2)
    found = criterion.ctc_losses(logits, (4, 3), labels, lengths)
    for row, frames in enumerate((4, 3)):
        expected = ctc_brute_force(F.log_softmax(logits[row, :frames], -1), labels[row].tolist())
        assert found[row].item() == pytest.approx(expected, rel=1e-5)


def test_a_transcript_that_does_not_fit_counts_zero_or_infinity():
    logits, labels = torch.randn(1, 2, 3, requires_grad=True), torch.tensor([[1, 1]])
    loss = criterion.ctc_losses(logits, (2,), labels, (2,))
    loss.sum().backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    assert criterion.ctc_losses(logits, (2,), labels, (2,), zero_infinity=False).item() == math.inf


def test_gumbel_noise_has_the_moments_of_the_distribution():
    noise = criterion.gumbel_noise((200000,), generator())
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert torch.isfinite(noise).all()
