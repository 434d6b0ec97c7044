"""TRL's `loss_type`, its weights and options: the same loss and gradients as TRL's own trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from trainers import assert_same_logs, beside, build, config, first_batch, history, trl_classes

from fused_prefopt import PreferenceLoss
from fused_prefopt.integrations.loss_types import LossOptions, named_here, terms_here

trl = pytest.importorskip("trl")

PAIRED = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired"
PAIRED = (f"{PAIRED} apo_zero apo_down discopop sft sigmoid_norm").split()
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}
CURVED = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
# TRL refuses the first two, and of the others its own weights, in place, end the backward.
UNWEIGHTED = {"aot", "aot_unpaired", "sft", "hinge"}
DIVERGENCES: list[dict[str, Any]] = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
]
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


def of(kind: str, **options: Any) -> dict[str, Any]:
    smoothing = {"label_smoothing": 0.1} if kind in SMOOTHED else {}
    return {"loss_type": [kind]} | smoothing | options


CASES: list[dict[str, Any]] = [
    *(of(kind, beta=0.3) for kind in PAIRED),
    *(of(kind, **each) for kind in CURVED for each in DIVERGENCES),
    *(of(kind, use_weighting=True) for kind in PAIRED if kind not in UNWEIGHTED),
    *(of(kind, ld_alpha=0.4) for kind in ("sigmoid", "ipo", "bco_pair", "aot")),
    {"loss_type": ["robust"]},
    {"loss_type": ["discopop"], "discopop_tau": 0.2},
    MPO,
    {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2], "use_weighting": True},
    {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "js_divergence"},
    {"loss_type": ["sigmoid", "sft", "sigmoid"], "loss_weights": [1, 0.5, 2.0]},
    {"loss_type": ["aot", "ipo", "exo_pair"], "label_smoothing": 0.2, "ld_alpha": 1.0},
    {"loss_type": ["sigmoid"], "loss_weights": [0.3]},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """TRL's trainer and ours of the same models and rows, and the configurations of all cases."""
    folder = tmp_path_factory.mktemp("runs")
    # First: a configuration resets what a trainer has set up.
    given = [[config(kind, folder, **case) for kind in ("trl-dpo", "dpo")] for case in CASES]
    # TRL's head gives WPO's numbers where it is told to before it is built.
    return build("trl-dpo", folder, use_weighting=True), build("dpo", folder), given


def loss_and_gradients(run: Any) -> tuple[torch.Tensor, ...]:
    """Of the first batch."""
    torch.manual_seed(0)
    batch = first_batch(run)
    run.model.train()
    run.model.zero_grad()
    loss = run.compute_loss(run.model, dict(batch))
    loss.backward()
    gradients = torch.cat([each.grad.flatten() for each in run.model.parameters()])
    return loss.detach(), gradients


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_a_configuration_of_trls_has_trls_loss_and_gradients(runs, number):
    case, per_token = CASES[number], {"ipo", "sigmoid_norm"}
    old = Version(trl.__version__) < Version("1.10")
    if old and "f_divergence_type" in case and per_token & set(case["loss_type"]):
        pytest.skip("this TRL leaves out a divergence's constant, which per token is none")
    theirs, ours, configurations = runs
    given, our_config = configurations[number]
    theirs.loss_types = given.loss_type
    theirs.loss_weights = given.loss_weights or [1.0] * len(given.loss_type)
    theirs.args.discopop_tau = given.discopop_tau
    for name in ("beta", "label_smoothing", "ld_alpha", "use_weighting", "f_divergence_type"):
        setattr(theirs, name, getattr(given, name))
    theirs.f_alpha_divergence_coef = given.f_alpha_divergence_coef
    loss_fn = our_config.build_loss()
    ours.attachment.loss_fn = loss_fn
    ours._op_options["ld_alpha"] = loss_fn.ld_alpha
    wanted, slopes = loss_and_gradients(theirs)
    found, gradients = loss_and_gradients(ours)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (gradients - slopes).norm() <= 1e-5 * slopes.norm()


def test_a_whole_configuration_of_trls_trains_alike(tmp_path):
    theirs, ours = beside("dpo", tmp_path, max_steps=3, beta=0.2, **MPO)
    assert ours.attachment.loss_fn.name == "0.8 dpo + 0.2 bco-pair + sft"
    assert history(theirs, "loss") == pytest.approx(history(ours, "loss"), rel=1e-5)
    names = assert_same_logs(theirs, ours)
    assert {"rewards/margins", "rewards/chosen", "logps/chosen", "grad_norm"} < names
    terms = [history(ours, f"loss/{name}") for name in ("dpo", "bco-pair", "sft")]
    summed = [0.8 * one + 0.2 * two + three for one, two, three in zip(*terms, strict=True)]
    assert history(ours, "loss") == pytest.approx(summed, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"beta": 0.3, "undesirable_weight": 1.4}], ids=str)
def test_kto_takes_trls_loss_type(tmp_path, options):
    given = {"loss_type": "apo_zero_unpaired", "max_steps": 2} | options
    theirs, ours = beside("kto", tmp_path, **given)
    assert ours.attachment.loss_fn.name == "apo-zero-unpaired"
    assert ours.attachment.loss_fn.hyperparameters["undesirable_weight"] == (
        options.get("undesirable_weight", 1.0)
    )
    assert history(theirs, "loss") == pytest.approx(history(ours, "loss"), rel=1e-5)


def test_a_sum_on_single_completions_trains(tmp_path):
    run = build("kto", tmp_path, loss="kto + 0.5 apo-zero-unpaired", max_steps=2)
    run.train()
    kto, apo = (history(run, f"loss/{name}") for name in ("kto", "apo-zero-unpaired"))
    summed = [one + 0.5 * other for one, other in zip(kto, apo, strict=True)]
    assert history(run, "loss") == pytest.approx(summed, rel=1e-5)
    assert len(history(run, "kl")) == 2


def test_an_unchanged_configuration_is_that_of_the_loss(tmp_path):
    plain = config("dpo", tmp_path, loss_kwargs={"label_smoothing": 0.1}).build_loss()
    assert (plain.name, plain.hyperparameters["label_smoothing"]) == ("dpo", 0.1)
    weighed = config("dpo", tmp_path, loss="dpo + 0.2 sft", loss_kwargs={"nll": "sum"}, beta=0.3)
    assert weighed.build_loss().hyperparameters == {
        "dpo": {"beta": 0.3, "label_smoothing": 0.0, "length_normalized": False},
        "sft": {"nll": "sum"},
    }


BOTH = "an option of TRL's own losses, with loss 'simpo'; give one of them"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dpo", {"loss": "simpo", "loss_type": "ipo"}, rf"loss_type: got \['ipo'\], {BOTH}"),
        ("dpo", {"loss": "simpo", "label_smoothing": 0.1}, f"label_smoothing: got 0.1, {BOTH}"),
        ("dpo", {"loss_type": "ipo", "loss_kwargs": {"tau": 1.0}}, "loss_kwargs: got .* with loss"),
        ("dpo", {"loss_type": "sigmiod"}, "loss_type: got 'sigmiod' .did you mean 'sigmoid'"),
        ("dpo", {"label_smoothing": 0.1}, r"got 0.1, which none of loss_type \['sigmoid'\] reads"),
        ("dpo", {"discopop_tau": 0.1}, "discopop_tau: got 0.1, which none"),
        ("dpo", {"f_alpha_divergence_coef": 0.1}, "f_alpha_divergence_coef: got 0.1, which none"),
        ("dpo", {"loss_type": "sft", "f_divergence_type": "forward_kl"}, "f_divergence_type: got"),
        ("dpo", {"f_divergence_type": "kl"}, "f_divergence_type: got 'kl', wanted one of"),
        (
            "dpo",
            {"loss_type": ["sigmoid", "aot"], "f_divergence_type": "forward_kl"},
            "f_divergence_type: got 'forward_kl' with 'aot', wanted 'reverse_kl'",
        ),
        ("dpo", {"loss_type": "aot", "use_weighting": True}, "use_weighting: got True with aot"),
        ("dpo", MPO | {"ld_alpha": 0.5}, "ld_alpha: got 0.5 with loss_type .* whole completions"),
        ("dpo", MPO | {"loss_weights": [1, -1, 1]}, "weight of bco-pair: got -1"),
        ("dpo", {"loss_type": "kto"}, "'kto' is point-wise, wanted one on pairs"),
        ("kto", {"loss_type": "ktoo"}, "loss_type: got 'ktoo' .did you mean 'kto'"),
        ("kto", {"loss": "dro", "loss_type": "apo_zero_unpaired"}, "loss_type: got 'apo_zero"),
    ],
    ids=str,
)
def test_what_would_be_ignored_or_is_not_there_is_refused(tmp_path, kind, options, message):
    with pytest.raises(ValueError, match=message):
        config(kind, tmp_path, **options).build_loss()


def test_names_are_translated_without_trl():
    assert named_here("Exo-Pair", LossOptions(label_smoothing=0.1)) == (
        "exo-pair",
        {"beta": 0.1, "label_smoothing": 0.1},
    )
    assert PreferenceLoss(terms_here("robust")).hyperparameters["unbiased"] is True
    with pytest.raises(ValueError, match="loss_weights: got 1 for the 2 of loss_type"):
        terms_here(["ipo", "sft"], [1.0])


def test_a_sum_is_read_from_yaml_and_the_command_line(tmp_path):
    from trl import TrlParser

    path = tmp_path / "config.yaml"
    terms = "loss:\n- dpo\n- {name: sft, weight: 0.2, hyperparameters: {nll: sequence_mean}}\n"
    path.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nbeta: 0.3\n{terms}")
    parser = TrlParser((trl_classes("dpo")[1],))
    (read,) = parser.parse_args_and_config(["--config", str(path)])
    found = read.build_loss()
    assert (found.name, found.hyperparameters["sft"]) == ("dpo + 0.2 sft", {"nll": "sequence_mean"})
    assert found.hyperparameters["dpo"]["beta"] == 0.3
    (read,) = parser.parse_args_and_config(["--config", str(path), "--loss", "ipo + 0.5 sft"])
    with pytest.raises(TypeError, match=r"ipo \+ 0.5 sft has no hyperparameter 'beta'"):
        read.build_loss()
