"""TPO by hand, where its gold completion is the chosen one, and as TRL's trainer computes it."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from loss_cases import compute, random_batch

from fused_prefopt import PreferenceLoss, sequence_logps
from fused_prefopt.losses import find
from fused_prefopt.types import LogpBatch


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def triples(size: int = 8) -> LogpBatch:
    """Pairs, and gold completions that are the same in both halves and have a gradient."""
    batch = random_batch(size)
    gold = batch.gold[: size // 2].repeat(2).requires_grad_()
    return dataclasses.replace(
        batch, gold=gold, gold_lengths=batch.gold_lengths[: size // 2].repeat(2)
    )


@pytest.mark.parametrize("nll", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tpo", {"label_smoothing": 0.2}),
        ("tpo", {"link": "hinge"}),
        ("tpo", {"link": "squared"}),
        ("tpo-l", {"gamma": 0.3, "label_smoothing": 0.1}),
    ],
    ids=str,
)
def test_losses_and_gradients_by_hand(name, options, nll):
    beta, alpha, pairs = 0.4, 0.7, 4
    batch = triples()
    sums, lengths = batch.policy.tolist(), batch.lengths.tolist()
    gold, tokens = batch.gold.tolist()[:pairs], batch.gold_lengths.tolist()[:pairs]
    per_token = name == "tpo-l" or options.get("link") == "squared"
    values = [a / b for a, b in zip(sums, lengths, strict=True)] if per_token else sums
    epsilon, losses = options.get("label_smoothing", 0.0), []
    for index in range(pairs):
        margin = values[index] - values[index + pairs]
        if options.get("link") == "squared":
            losses.append((margin - 1 / (2 * beta)) ** 2)
        elif options.get("link") == "hinge":
            losses.append(max(0.0, 1 - beta * margin))
        else:
            gap = beta * margin - options.get("gamma", 0.0)
            losses.append(-(1 - epsilon) * log_sigmoid(gap) - epsilon * log_sigmoid(-gap))
    own = [
        {
            "token_mean": -sum(gold) / sum(tokens),
            "sequence_mean": -one / length,
            "sum": -one,
        }[nll]
        for one, length in zip(gold, tokens, strict=True)
    ]
    shares = [
        {"token_mean": 1 / sum(tokens), "sequence_mean": 1 / length / pairs, "sum": 1 / pairs}[nll]
        for length in tokens
    ]
    losses = [loss + alpha * term for loss, term in zip(losses, own, strict=True)]
    result = compute(find(name).build(beta=beta, nll_weight=alpha, nll=nll, **options), batch)
    (gradient,) = torch.autograd.grad(result.loss, batch.gold)
    assert result.losses.tolist() == pytest.approx(losses, rel=1e-12)
    assert result.loss.item() == pytest.approx(sum(losses) / pairs, rel=1e-12)
    # Half of it comes by each of the two places of a gold completion.
    slopes = [-alpha * share / 2 for share in shares]
    assert gradient.tolist() == pytest.approx(slopes * 2, rel=1e-12)


@pytest.mark.parametrize("nll", ["token_mean", "sequence_mean", "sum"])
def test_a_gold_completion_that_is_the_chosen_one_makes_it_cpo(nll):
    batch = random_batch()
    chosen, lengths = batch.policy[:4].repeat(2), batch.lengths[:4].repeat(2)
    weights = torch.tensor([2.0, 0.0, 1.0, 3.0] * 2, dtype=torch.float64)
    for given in (None, weights):
        plain = dataclasses.replace(batch, weights=given)
        ours = dataclasses.replace(plain, gold=chosen, gold_lengths=lengths)
        options = {"beta": 0.1, "nll_weight": 0.6, "nll": nll}
        found, wanted = (
            PreferenceLoss(name, **options).from_logps(each).loss
            for name, each in (("tpo", ours), ("cpo", plain))
        )
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        slopes = [
            torch.autograd.grad(loss, batch.policy, retain_graph=True)[0]
            for loss in (found, wanted)
        ]
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("nll", ["token_mean", "sequence_mean", "sum"])
def test_a_gold_completion_that_is_not_finite_stays_in_its_pair(nll):
    clean, loss = triples(), find("tpo").build(nll=nll)
    gold = clean.gold.detach().clone()
    gold[[2, 6]] = math.nan
    losses = compute(loss, dataclasses.replace(clean, gold=gold)).losses
    rows = torch.tensor([0, 1, 3, 4, 5, 7])
    fields = {name: getattr(clean, name)[rows] for name in clean.given - {"kl"}}
    assert losses[2].isnan()
    wanted = compute(loss, LogpBatch(**fields)).losses
    torch.testing.assert_close(losses[[0, 1, 3]], wanted, rtol=1e-12, atol=0)


PROMPT, ROWS, PLACES, WIDTH, VOCABULARY = 2, 9, 8, 5, 31


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize(
    ("loss_type", "name", "options"),
    [
        ("sigmoid", "tpo", {"label_smoothing": 0.1}),
        ("sigmoid", "tpo", {}),
        ("hinge", "tpo", {"link": "hinge"}),
        ("ipo", "tpo", {"link": "squared"}),
        ("tpo-l", "tpo-l", {"gamma": 0.3, "label_smoothing": 0.1}),
    ],
    ids=str,
)
def test_hidden_states_equal_trls_trainer(loss_type, name, options, alpha):
    trainer_type = pytest.importorskip("trl.experimental.tpo").TPOTrainer
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    ends = torch.randint(PROMPT + 1, PLACES + 1, (ROWS,), generator=generator)
    places = torch.arange(PLACES)
    mask = ((places >= PROMPT) & (places < ends[:, None])).long()
    ids = torch.randint(0, VOCABULARY, (ROWS, PLACES), generator=generator)
    hidden = draw(ROWS, PLACES, WIDTH).requires_grad_()
    head = draw(VOCABULARY, WIDTH).requires_grad_()
    gathered = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=gathered,
        beta=0.3,
        loss_type=loss_type,
        tpo_alpha=alpha,
        tpo_l_gamma=options.get("gamma"),
        label_smoothing=options.get("label_smoothing", 0.0),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    rows = ROWS if alpha else 2 * ROWS // 3
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    outputs = SimpleNamespace(logits=(hidden @ head.T)[:rows])
    given = {key: value[:rows] for key, value in inputs.items()}
    theirs = trainer_type._compute_loss(trainer, lambda **_: outputs, given, False)
    labels = ids.masked_fill(mask == 0, -100)
    pairs = 2 * ROWS // 3
    loss_fn = PreferenceLoss(name, beta=0.3, nll_weight=alpha, **options)
    extras = {}
    if alpha:
        # As the docstring says.
        gold = sequence_logps(hidden[pairs:], head, labels[pairs:])
        extras = {"gold": gold.sums.repeat(2), "gold_lengths": gold.lengths.repeat(2)}
    ours = loss_fn(hidden[:pairs], head, labels[:pairs], **extras)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-9, atol=1e-12)
    gradients = [
        torch.autograd.grad(loss, (hidden, head), retain_graph=True) for loss in (ours.loss, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-11)
    logged = trainer._metrics["train"]
    for metric in ("logps/chosen", "logps/rejected"):
        if loss_type in ("sigmoid", "hinge"):
            assert ours.metrics[metric].item() == pytest.approx(logged[metric][0], rel=1e-9)
