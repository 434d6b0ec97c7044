"""`losses`: what is registered, one loss in full, and those that a data set allows."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from fused_prefopt.cli.choosing import choices
from fused_prefopt.cli.console import (
    UserError,
    between,
    blaming,
    markdown_table,
    text_table,
    wrapped,
)
from fused_prefopt.cli.judged_rows import DataSet
from fused_prefopt.losses import (
    NamedLoss,
    PairwiseLoss,
    WeightedSum,
    available_losses,
    bradley_terry_loss,
    find,
    length_desensitized,
    named_loss,
    preset,
    published_settings,
)
from fused_prefopt.losses.added_margin import MARGIN_NAMES
from fused_prefopt.losses.protocol import WHAT_IT_IS, Loss
from fused_prefopt.losses.registry import LossInfo

_WIDTH = 100
HELP = "the registered losses, one of them with its formula, or those that a data set allows"
# Writes docs/losses.md, the page of all losses, and the list in README.md.
COMMAND = "python -m fused_prefopt.cli.losses"
_START, _END = "<!-- losses:start -->", "<!-- losses:end -->"
# What a loss on pairs needs, or what another judges → how README calls such losses.
_FAMILIES = {
    "reference": "pairs, beside a reference model",
    "": "pairs alone",
    "gold": "pairs with a gold completion",
    "rewards": "pairs with scores",
    "lists, pairs": "lists of any length",
    "completions": "single completions",
}
_MARGIN_NAMES = ", ".join(f"`{name}`" for name in MARGIN_NAMES)
_INTRODUCTION = f"""\
# Losses

Written by `{COMMAND}` from the registered losses; edit nothing here.

```python
loss_fn = fp.PreferenceLoss("simpo", beta=2.5)
loss_fn = fp.PreferenceLoss("gamma-simpo/llama-3-8b-instruct", tau=3.0)  # published, but for τ
loss_fn = fp.PreferenceLoss("dpo", ld_alpha=0.5)  # LD-DPO: any loss on pairs, with weighted tails
loss_fn = fp.PreferenceLoss("simpo", use_weighting=True)  # any loss on pairs, with WPO's weights
loss_fn = fp.PreferenceLoss("ipo", margin={{"name": "dynamic", "gamma": 0.5}})  # γ-PO on any reward
loss_fn = fp.PreferenceLoss("0.8 dpo + 0.2 bco-pair + sft", beta=0.1)  # MPO: a sum, one β for all
```

Names may be written with `_` for `-` and in any case. `fused-prefopt losses --for data.jsonl` says
which of them the rows of a data set allow, and what each costs.

## Sums of losses

`+` joins losses on the same kind of data, a number before a name is its weight, and a
hyperparameter goes to every term that has it. Terms with hyperparameters of their own are entries
of a list:

```python
loss_fn = fp.PreferenceLoss(
    ["dpo", {{"name": "sft", "weight": 0.2, "hyperparameters": {{"nll": "sequence_mean"}}}}]  # RPO
)
```

One pass of the head serves all terms; each keeps its own statistic, saved under its name. `losses`
and `loss` are the weighted sums. Rewards and their metrics are those of the first term that trains
a reward (all but `sft` and those of weight 0); the loss of a term, before its weight, is logged as
`loss/` and its name.

The names and options of TRL's losses (`loss_type`, `loss_weights`, …) are translated in
`fused_prefopt/integrations/loss_types.py`.

## Another target margin

`margin` adds a target margin to that of any loss that compares the rewards of a pair, and of lists
of completions, whose pairs it then judges; of a sum to that of every such term. γ-PO's shares a
budget of mean γ₀ over the pairs, α-DPO's follows the gap between policy and reference; a loss keeps
a margin of its own (simpo's γ, ipo's 1/(2τ), odpo's offset), which neither of them sees.

```python
fp.PreferenceLoss("cpo", margin={{"name": "dynamic", "gamma": 0.5, "tau": 10.0}})
fp.PreferenceLoss("0.8 dpo + 0.2 sft", margin={{"name": "adaptive", "alpha": 0.05}})
fp.PreferenceLoss("f-dpo", margin=fp.losses.DynamicMargin(gamma=0.5, solver="exact"))
```

In a file: `loss_kwargs: {{margin: {{name: dynamic, gamma: 0.5}}}}`. Margins by name:
{_MARGIN_NAMES}.
Their options are the fields of the part (`losses.DynamicMargin`, …), those of `adaptive` are
alpha-dpo's: `gamma` (0), `alpha` (0.05), `implicit_reference`, `margin_scale`, `normalize`,
`stop_gradient`, `statistics`, `momentum`, `mean`, `std`. Its s is the reward's β, 1 where there is
none, and its gap is of the mean token where the reward is, else of whole completions, unless
`length_normalized` says otherwise. Losses to which a target margin makes no difference refuse one
(`sft`, `simper`, `listnet-dpo`, those that judge each completion against a level, those that sort),
and so does a loss whose own margin keeps a statistic (`alpha-dpo`, `gamma-simpo`, …) where the
other does, too. Over lists the budget and the statistics are of the pairs of all lists, each once.

## Lists

A batch with `groups` and `rewards` is lists of rated completions: `groups` has one number for the
completions of one prompt, of which there may be any number in any order, `rewards` their scores.
Every loss on pairs takes one:

```python
loss_fn = fp.PreferenceLoss("plackett-luce-dpo")  # or "dpo", "gamma-simpo", …
loss_fn(hidden, head, labels, groups=groups, rewards=scores, reference=reference)
```

Each two completions of a list whose scores differ are a pair, the better one chosen, as InstructGPT
(arXiv:2203.02155) compares all of a ranking. Equal scores are not compared, so the scores choose
the pairs: 1, 0, …, 0 sets one completion against each of the others, and NaN is refused. Each list
counts alike: the loss is the mean over the lists of the mean over their pairs, and a list without
two different scores counts 0. `weights` are those of lists, the same for all completions of one. A
list of two is its pair, exactly. A completion meets the model once, in however many pairs it is.

`plackett-luce-dpo`, `lipo-lambda` and `listnet-dpo` judge whole lists, and pairs as lists of two;
with `use_weighting` a list counts by the mean of its pairs' weights, in `lipo-lambda` each pair by
its own. Plackett–Luce of another reward is a `losses.PairwiseLoss` with
`ranking=losses.PlackettLuce()`. Losses that sort the pairs (`aot`, `aot-unpaired`) refuse lists,
and so does `ld_alpha`. Single completions (`dro`, `kto`, …) are no lists: they stay on their own,
but `dro` takes its mean over `groups`.

In data a list is a row (`prompt`, `completions`, `scores`), which `data.ListCollator` and the
trainers take. `data.lists_of_points` makes such rows of rated completions that have a row each
(`prompt`, `completion`, `score`), of those of one `group`; `fused-prefopt train` does so by itself.
There losses that need `desirable` are given the best and the worst completion of each list, and a
gold completion (`tpo`) is a column of pairs alone.

`losses`, `rewards` and `target_margins` are of the pairs that `losses.pairs_of_lists` returns; of a
ranking the loss of a list stands at each of its pairs. Metrics are means over the lists that have a
pair; `lists/pairs` is the number of pairs of a list.

## Notation

| symbol | meaning |
| --- | --- |
| w, l | the chosen and the rejected completion of a pair |
| g | the gold completion of a prompt, a third one beside w and l: `gold` |
| L, \\|y\\| | summed log-probability of a completion under the policy, in nats, and its tokens |
| L̄ | L / \\|y\\|, as any letter with a bar |
| L_ref, Δ | the same sum under the reference model, and L − L_ref |
| r, m | reward of a completion, and reward margin: that of w less that of l |
| i, j, k | completions of one prompt, where a loss is one of lists; else i is one of the pairs |
| s | score of a completion from outside, `rewards` |
| K | Σ over tokens of KL(reference ‖ policy), `sequence_kl` |
| σ, sg | the sigmoid, and the stopped gradient |
| NLL | negative log-likelihood, of the chosen completions if of no others |
| 1[…] | 1 where it holds, else 0 |
| P | cost of one matmul of the completions' tokens with the head |

The loss of a batch is the mean over its pairs, or over its completions where a loss is point-wise,
unless said otherwise; of lists the mean over the lists of the mean over their pairs. An empty
completion has L = L̄ = 0."""
_NEEDS = """\
## What losses need

Beyond `policy` and `lengths`, which the fused call computes; fields of `LogpBatch`, arguments of
`PreferenceLoss`. Pairs are given chosen half first; a loss on pairs takes lists by their `groups`
and `rewards`."""
_JUDGED = {
    "lists, pairs": "lists, rated completions of a prompt, as a whole; a pair is a list of two",
    "pairs": "pairs, chosen and rejected",
    "completions": "single completions",
}
_BESIDE = "## Beside the registered losses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "name", nargs="?", help="a loss, an alias, a published setting such as alpha-dpo/… or a sum"
    )
    parser.add_argument(
        "--for",
        dest="data",
        metavar="DATA",
        help="say which losses its rows allow and what they cost, or whether NAME is one: hub name,"
        " folder, JSON, CSV or Parquet file, or embedded",
    )
    defaults = DataSet("")
    parser.add_argument("--split", help=f"of DATA; {defaults.split} by default")
    parser.add_argument("--adapter", help="that reads its rows; told by the name or the columns")
    parser.add_argument("--limit", type=int, help="rows to look at; all by default")


def run(options: argparse.Namespace) -> int:
    """Print the table, one loss, or what a data set allows.

    Raises:
        UserError: there is no such loss or setting (the message lists the closest names), or the
            data cannot be read, or do not allow the loss.
    """
    of_data = {name: getattr(options, name) for name in ("split", "limit", "adapter")}
    given = {name: value for name, value in of_data.items() if value is not None}
    if options.data is None and given:
        name, value = next(iter(given.items()))
        raise UserError(f"--{name}: got {value!r} alone, needs --for DATA, whose rows it is about")
    with blaming("losses"):
        if options.data is not None:
            text = choices(DataSet(options.data, **given), options.name)
        else:
            text = losses_table() if options.name is None else one_loss(options.name)
    print(text)
    return 0


def losses_table() -> str:
    """Every registered loss by name: what it judges and needs, and its first options."""
    heading = ("loss", "judges", "needs", "hyperparameters")
    rows = [
        (
            name,
            _judges(find(name).build()),
            ", ".join(info.needs) or "-",
            textwrap.shorten(_values(info.defaults) or "-", 80, placeholder=" …"),
        )
        for name, info in available_losses().items()
    ]
    more = (
        "`fused-prefopt losses NAME`: its formula, what the options mean, and its paper.\n"
        "`fused-prefopt losses --for DATA`: which of them its rows allow, and what they cost."
    )
    return f"{text_table(heading, wrapped(rows, (None, None, 22, 41)))}\n\n{more}"


def one_loss(name: str) -> str:
    """Formula, needs, hyperparameters and published settings of one loss, or the terms of a sum.

    Args:
        name: of the loss, an alias, or a published setting, whose values then stand for the
            defaults; a sum such as "dpo + 0.2 sft".

    Raises:
        ValueError: there is none; the message lists the closest names.
    """
    named = named_loss(name, {})
    if named.is_sum:
        return _one_sum(named)
    loss, chosen = preset(name) if "/" in name else (name, {})
    spec = find(loss)
    info, meanings = spec.info(), hyperparameters(spec.factory)
    called = f" (also {', '.join(info.aliases)})" if info.aliases else ""
    parts = [f"{spec.name}{called}\n{info.paper}", formula(spec.factory).replace("``", "")]
    parts.append(_facts(named.loss))
    options = [
        (option, f"{value!r}", meanings.get(option, ""))
        for option, value in (info.defaults | chosen).items()
    ]
    if options:
        column = "published" if chosen else "default"
        meaning = _WIDTH - 4 - max(len(name) for name in ("hyperparameter", *info.defaults))
        meaning -= max(len(value) for _, value, _ in [("", column, ""), *options])
        rows = wrapped(options, (None, None, meaning))
        parts.append(text_table(("hyperparameter", column, "meaning"), rows))
    published = {k: each for k, each in published_settings().items() if each.loss == spec.name}
    if published:
        settings = [
            (key, _values(each.hyperparameters), f"{each.learning_rate:g}")
            for key, each in published.items()
        ]
        heading = ("published setting", "hyperparameters", "learning rate")
        papers = " and ".join(dict.fromkeys(each.paper for each in published.values()))
        parts.append(f"{text_table(heading, settings)}\n\nThey are those of {papers}.")
    return "\n\n".join(parts)


def _one_sum(named: NamedLoss) -> str:
    """Terms, formulas, needs and hyperparameters of a sum."""
    parts = [named.name, "a sum of losses: one pass of the head serves all its terms"]
    terms = []
    for term in named.terms:
        (shown,) = re.findall(r"``(.*?)``", formula(find(term.name).factory), re.DOTALL)[:1]
        terms.append((term.name, f"{term.weight:g}", " ".join(shown.split())))
    width = _WIDTH - 12 - max(len(name) for name, _, _ in terms)
    parts.append(text_table(("term", "weight", "loss"), wrapped(terms, (None, None, width))))
    parts.append(_facts(named.loss))
    options = [
        (label, option, f"{value!r}")
        for label, term in zip(named.labels, named.terms, strict=True)
        for option, value in term.hyperparameters.items()
    ]
    if options:
        parts.append(text_table(("term", "hyperparameter", "value"), options))
    parts.append("`fused-prefopt losses TERM`: what a term's options mean, and its paper.")
    return "\n\n".join(parts)


def _facts(loss: Loss) -> str:
    """What a loss judges, needs and keeps, a line each."""
    facts = [f"judges  {_JUDGED[_judges(loss)]}"]
    facts += [f"needs   {field}: {WHAT_IT_IS[field]}" for field in sorted(loss.needs)]
    facts += [f"uses    {field}, where given: {WHAT_IT_IS[field]}" for field in sorted(loss.wants)]
    if loss.statistics() is not None:
        facts.append("keeps   a statistic, which belongs in checkpoints")
    if loss.coupled:
        facts.append("spans   the batch of all ranks")
    return "\n".join(textwrap.fill(fact, _WIDTH, subsequent_indent=" " * 8) for fact in facts)


def _judges(loss: Loss) -> str:
    """What a loss judges, a key of `_JUDGED`."""
    terms = [term.loss for term in loss.terms] if isinstance(loss, WeightedSum) else [loss]
    if any(isinstance(term, PairwiseLoss) and term.ranking is not None for term in terms):
        return "lists, pairs"
    return "pairs" if loss.pairwise else "completions"


def losses_page() -> str:
    """The page: every registered loss with its formula, needs, options and source."""
    losses = available_losses()
    parts = [_INTRODUCTION, _index(losses)]
    needs = ((f"`{field}`", meaning) for field, meaning in WHAT_IT_IS.items())
    parts += [_NEEDS, markdown_table(("field", "what it is"), needs)]
    parts += ["## The losses", *(_section(name, info) for name, info in losses.items())]
    parts += [_BESIDE, *(_function(each) for each in (bradley_terry_loss, length_desensitized))]
    return "\n\n".join(parts) + "\n"


def write_losses_page(page: Path) -> None:
    """Write `losses_page` to a file."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(losses_page(), encoding="utf-8")


def with_losses(text: str) -> str:
    """README's text with all losses, by family; ValueError as `between` raises it."""
    links: dict[str, list[str]] = {family: [] for family in _FAMILIES}
    for name, info in available_losses().items():
        judged = _judges(find(name).build())
        needed = (field for field in ("rewards", "gold", "reference") if field in info.needs)
        links[next(needed, "") if judged == "pairs" else judged].append(
            f"[{name}](docs/losses.md#{name})"
        )
    rows = ((_FAMILIES[family], ", ".join(found)) for family, found in links.items())
    return between(text, _START, _END, markdown_table(("judge", "losses"), rows))


def formula(documented: Any) -> str:
    """What a docstring says before its first section."""
    return re.split(r"\n\n(?:Args|Returns|Raises):", inspect.getdoc(documented) or "")[0]


def hyperparameters(documented: Any) -> dict[str, str]:
    """Name → meaning, from the `Args` of a docstring."""
    _, _, arguments = (inspect.getdoc(documented) or "").partition("\n\nArgs:\n")
    found: dict[str, str] = {}
    for line in arguments.split("\n\n")[0].splitlines():
        name, _, meaning = line.strip().partition(": ")
        if line.startswith("     "):
            found[list(found)[-1]] += f" {line.strip()}"
        else:
            found[name] = meaning
    return found


def _index(losses: dict[str, LossInfo]) -> str:
    rows = (
        (
            f"[{name}](#{name})",
            ", ".join(info.aliases),
            _judges(find(name).build()),
            ", ".join(f"`{field}`" for field in info.needs),
            "yes" if info.stateful else "",
            info.paper,
        )
        for name, info in losses.items()
    )
    heading = ("loss", "also called", "judges", "needs", "statistic", "paper")
    return "## Index\n\n" + markdown_table(heading, rows)


def _section(name: str, info: LossInfo) -> str:
    spec = find(name)
    meanings = hyperparameters(spec.factory)
    options = (
        (f"`{option}`", f"`{default!r}`", meanings.get(option, ""))
        for option, default in info.defaults.items()
    )
    facts = [
        f"- Paper: {info.paper}.",
        f"- Needs: {', '.join(f'`{field}`' for field in info.needs) or 'nothing more'}.",
    ]
    if info.wants:
        facts.append(f"- Uses where given: {', '.join(f'`{field}`' for field in info.wants)}.")
    statistic = spec.build().statistics()
    if statistic is not None:
        said = (inspect.getdoc(statistic) or "").splitlines()[0].rstrip(".")
        facts.append(
            f"- Statistic: `{type(statistic).__name__}` ({said}), over all ranks; put"
            " `loss_fn.state_dict()` in checkpoints."
        )
    if info.coupled:
        facts.append(
            "- Spans the batch: in training the ranks exchange their pairs' log-probs, and the"
            " mean of their gradients is that of one process with all pairs."
        )
    parts = [f"### {name}", formula(spec.factory), "\n".join(facts)]
    if info.defaults:
        parts.append(markdown_table(("hyperparameter", "default", "meaning"), options))
    presets = [
        (
            f"`{key}`",
            ", ".join(f"`{option}={value:g}`" for option, value in each.hyperparameters.items()),
            f"{each.learning_rate:g}",
            each.paper,
        )
        for key, each in published_settings().items()
        if each.loss == name
    ]
    if presets:
        heading = ("published setting", "hyperparameters", "learning rate", "of")
        parts.append(markdown_table(heading, presets))
    return "\n\n".join(parts)


def _function(documented: Any) -> str:
    return f"### `{documented.__name__}`\n\n{formula(documented)}"


def _values(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_losses_page(Path(sys.argv[1]))
    else:
        write_losses_page(Path("docs/losses.md"))
        _readme = Path("README.md")
        _readme.write_text(with_losses(_readme.read_text(encoding="utf-8")), encoding="utf-8")
