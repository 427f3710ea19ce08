from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rlhf_nb.errors import ShapeError
from rlhf_nb.maths.logprobs import completion_logprobs, entropy, position_ids, predicting_slice, token_logprobs


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 11, bias=False).double()


def test_completion_tokens_are_predicted_one_position_earlier():
    row = torch.arange(10)
    assert row[predicting_slice(6, 10)].tolist() == [5, 6, 7, 8]
    with pytest.raises(ShapeError, match="at least one prompt token"):
        predicting_slice(0, 4)


def test_positions_start_at_zero_after_left_padding():
    assert position_ids(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]


def test_worked_example():
    # softmax(0, ln 3) = (1/4, 3/4); at temperature 1/2 the logits double: (1/10, 9/10)
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    assert token_logprobs(logits, torch.tensor([1])).item() == pytest.approx(math.log(0.75))
    assert token_logprobs(logits, torch.tensor([0]), temperature=0.5).item() == pytest.approx(math.log(0.1))


def test_logprobs_and_entropy_agree_with_torch_categorical(draw):
    logits, tokens = draw(3, 5, 11), torch.randint(11, (3, 5))
    for temperature in (1.0, 0.7):
        oracle = torch.distributions.Categorical(logits=logits / temperature)
        torch.testing.assert_close(token_logprobs(logits, tokens, temperature=temperature), oracle.log_prob(tokens))
        torch.testing.assert_close(entropy(logits, temperature=temperature), oracle.entropy())


def test_entropy_of_uniform_is_log_v_and_of_a_sure_thing_zero():
    assert entropy(torch.zeros(8, dtype=torch.float64)).item() == pytest.approx(math.log(8))
    assert entropy(torch.tensor([0.0, -math.inf, -math.inf])).item() == 0


def test_pieces_give_the_same_values_and_gradients_as_the_whole(draw, mask_BT, head):
    hidden, tokens = draw(5, 7, 4), torch.randint(11, (5, 7))
    results = []
    for max_logits in (1 << 24, 3 * 11):
        leaf = hidden.clone().requires_grad_()
        head.zero_grad()
        logprobs, spread = completion_logprobs(
            leaf,
            head,
            tokens,
            mask_BT,
            temperature=0.8,
            with_entropy=True,
            entropy_gradient=True,
            max_logits=max_logits,
        )
        (logprobs.sum() + 0.3 * spread.sum()).backward()
        results.append((logprobs.detach(), spread.detach(), leaf.grad, head.weight.grad.clone()))
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-12, atol=1e-13)
    direct = token_logprobs(head(hidden), tokens, temperature=0.8)
    torch.testing.assert_close(results[0][0], direct.masked_fill(~mask_BT, 0).detach())


def test_watching_the_entropy_adds_no_gradient(draw, mask_BT, head):
    leaf, tokens = draw(5, 7, 4).requires_grad_(), torch.randint(11, (5, 7))
    _, spread = completion_logprobs(leaf, head, tokens, mask_BT, with_entropy=True)
    assert not spread.requires_grad


def test_padding_contents_never_change_logprobs_or_gradients(draw, mask_BT, head):
    hidden, tokens = draw(5, 7, 4), torch.randint(11, (5, 7))
    results = []
    for content in (hidden, hidden.masked_fill(~mask_BT[..., None], float("nan"))):
        leaf = content.clone().requires_grad_()
        logprobs, _ = completion_logprobs(leaf, head, tokens, mask_BT)
        results.append((logprobs.detach(), torch.autograd.grad(logprobs.sum(), leaf)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not results[1][1].isnan().any()


def test_never_more_logits_than_allowed_are_held(draw, head):
    seen: list[int] = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    tokens, mask = torch.randint(11, (5, 7)), torch.ones(5, 7, dtype=torch.bool)
    completion_logprobs(draw(5, 7, 4), head, tokens, mask, max_logits=66)
    assert max(seen) <= 66 and sum(seen) == 5 * 7 * 11


def test_no_token_that_counts_gives_zeros(draw, head):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    logprobs, spread = completion_logprobs(
        draw(2, 3, 4), head, torch.zeros(2, 3, dtype=torch.long), mask, with_entropy=True
    )
    assert not logprobs.any() and not spread.any()


def test_shapes_that_do_not_fit_are_refused(draw, head):
    with pytest.raises(ShapeError):
        token_logprobs(torch.zeros(2, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ShapeError, match="float32"):
        completion_logprobs(draw(2, 3, 4), head, torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3))
