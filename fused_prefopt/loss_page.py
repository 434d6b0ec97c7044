"""docs/losses.md: every registered loss with its formula, needs, options and source.

`python -m fused_prefopt.loss_page` writes it again.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fused_prefopt.losses import (
    available_losses,
    bradley_terry_loss,
    find,
    length_desensitized,
    published_settings,
)
from fused_prefopt.losses.needs import WHAT_IT_IS
from fused_prefopt.losses.registry import LossInfo

COMMAND = "python -m fused_prefopt.loss_page"
_INTRODUCTION = f"""\
# Losses

Written by `{COMMAND}` from the registered losses; edit nothing here.

```python
loss_fn = fp.PreferenceLoss("simpo", beta=2.5)
loss_fn = fp.PreferenceLoss("gamma-simpo/llama-3-8b-instruct", tau=3.0)  # published, but for τ
loss_fn = fp.PreferenceLoss("dpo", ld_alpha=0.5)  # LD-DPO: any loss on pairs, with weighted tails
```

Names may be written with `_` for `-` and in any case.

## Notation

| symbol | meaning |
| --- | --- |
| w, l | the chosen and the rejected completion of a pair |
| L, \\|y\\| | summed log-probability of a completion under the policy, in nats, and its tokens |
| L̄ | L / \\|y\\| |
| L_ref, Δ | the same sum under the reference model, and L − L_ref |
| m | reward margin: reward of the chosen less that of the rejected completion |
| s | score of a completion from outside, `rewards` |
| K | Σ over tokens of KL(reference ‖ policy), `sequence_kl` |
| σ, sg | the sigmoid, and the stopped gradient |

The loss of a batch is the mean over its pairs, or over its completions where a loss is point-wise,
unless said otherwise. An empty completion has L = L̄ = 0."""
_NEEDS = """\
## What losses need

Beyond `policy` and `lengths`, which the fused call computes; fields of `LogpBatch`, arguments of
`PreferenceLoss`. Pairs are given chosen half first."""
_BESIDE = "## Beside the registered losses"


def text() -> str:
    """The page."""
    losses = available_losses()
    parts = [_INTRODUCTION, _index(losses)]
    needs = ((f"`{field}`", meaning) for field, meaning in WHAT_IT_IS.items())
    parts += [_NEEDS, _table(("field", "what it is"), needs)]
    parts += ["## The losses", *(_section(name, info) for name, info in losses.items())]
    parts += [_BESIDE, *(_function(each) for each in (bradley_terry_loss, length_desensitized))]
    return "\n\n".join(parts) + "\n"


def write(page: Path) -> None:
    """Write the page to a file."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text(), encoding="utf-8")


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
            "pairs" if info.pairwise else "completions",
            ", ".join(f"`{field}`" for field in info.needs),
            "yes" if info.stateful else "",
            info.paper,
        )
        for name, info in losses.items()
    )
    heading = ("loss", "also called", "judges", "needs", "statistic", "paper")
    return "## Index\n\n" + _table(heading, rows)


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
    parts.append(_table(("hyperparameter", "default", "meaning"), options))
    presets = [
        (f"`{key}`", _values(setting.hyperparameters), f"{setting.learning_rate:g}", setting.paper)
        for key, setting in published_settings().items()
        if setting.loss == name
    ]
    if presets:
        heading = ("published setting", "hyperparameters", "learning rate", "of")
        parts.append(_table(heading, presets))
    return "\n\n".join(parts)


def _function(documented: Any) -> str:
    return f"### `{documented.__name__}`\n\n{formula(documented)}"


def _values(values: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value:g}`" for name, value in values.items())


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading)]
    lines += [tuple(cell.replace("|", r"\|") for cell in row) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    write(Path(*sys.argv[1:] or ("docs/losses.md",)))
