"""`hub`: the repository of the head's op and kernels for the Hugging Face kernel hub."""

from __future__ import annotations

import argparse
import base64
import hashlib
import inspect
import json
import re
from pathlib import Path

from fused_prefopt import __version__
from fused_prefopt.cli.console import UserError, blaming
from fused_prefopt.cli.relocation import Relocation
from fused_prefopt.hub import __all__ as exported
from fused_prefopt.hub import layers

HELP = "write the repository of the head's op and kernels for the Hugging Face kernel hub"
_WRITTEN = """\
Written are README.md, and under build/ the same card and a package for each of cuda, rocm and cpu,
which `kernels.get_kernel` loads on every version of Python and torch that this package runs on. It
needs torch and triton alone, and this package may be installed beside it. Equal sources give equal
bytes. `kernels.get_local_kernel(Path(OUT))` loads it from the folder."""
NAME = "fused-prefopt-head"
_MODULE = NAME.replace("-", "_")
_LICENSE = "Apache-2.0"
# Torch's name of the backend is the variant's; no architectures are listed, as the loader would
# refuse all others, on which the torch engine runs.
BACKENDS = ("cpu", "cuda", "rocm")
# Namespace of the ops that the package registers, as its sources write it.
_NAMESPACE = re.compile(r"\bfused_prefopt::")

# Older versions of `kernels` load the folder of the kernel's name inside of the variant's.
_OLDER = '''\
"""The kernel, for versions of `kernels` that look for it in a folder of its name."""

import importlib.util
import sys
from pathlib import Path


def _kernel():
    name = "{identifier}"
    if name not in sys.modules:
        front = Path(__file__).resolve().parents[1] / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, front)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


__all__ = list(_kernel().__all__)
globals().update({{name: getattr(_kernel(), name) for name in __all__}})
'''

_CARD = """\
---
library_name: kernels
license: {license_name}
tags:
- kernels
---

# {name}

Log-probabilities, entropies and KL divergences of the labels under an LM head, from the last hidden
states, without the (tokens, vocabulary) logits in memory; with gradients of hidden states, weight
and bias, under `torch.compile` too. The op and the Triton kernels of fused-prefopt {version}, for
{backends}; on a CPU, and on GPUs that Triton or the kernels do not serve, in torch. Needs Python
3.10 and torch 2.8, or newer.

```python
from kernels import get_kernel

head = get_kernel("OWNER/{name}", version={major}, trust_remote_code=True)
out = head.sequence_logps(hidden, head.LMHead(weight), labels)  # (S, T, D), (V, D), (S, T)
out.sums, out.lengths, out.means  # (S,) each
```

## Functions

{functions}

What they take and return: {types}. `LMHead.of(model)` reads the head of a causal language model
of Hugging Face's, with its softcap, scale and adapter.

## Layers

`kernels.kernelize` lends their forwards to modules with a `weight` and a `bias` (or None), such as
subclasses of `torch.nn.Linear`.

{layers}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.epilog = _WRITTEN
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write to")


def run(options: argparse.Namespace) -> int:
    """Write the repository.

    Raises:
        UserError: the folder has a repository already, or cannot be written to.
    """
    output: Path = options.output
    there = [str(path) for path in (output / "build", output / "README.md") if path.exists()]
    if there:
        raise UserError(
            f"OUT: got a folder with {' and '.join(there)}, wanted one without; remove it first, so"
            " that no file of another version stays"
        )
    with blaming("OUT"):
        for name, text in repository().items():
            path = output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
    print(f"wrote {', '.join(f'build/torch-{backend}' for backend in BACKENDS)} to {output}")
    return 0


def repository() -> dict[str, str]:
    """Path → text of each file of the repository, of this package's own sources.

    Raises:
        ValueError: a source imports what cannot come along (`Relocation.sources`), or registers
            no op of the package's namespace.
    """
    sources = Relocation(Path(__file__).resolve().parents[1], "hub").sources()
    if not any(_NAMESPACE.search(text) for text in sources.values()):
        raise ValueError(f"op: got none in {_NAMESPACE.pattern}, wanted those of the head")
    content = hashlib.sha256(json.dumps([__version__, sources]).encode()).hexdigest()
    card = _card()
    # The second is where `kernel-builder upload` looks.
    files = {"README.md": card, "build/CARD.md": card}
    for backend in BACKENDS:
        variant = _variant(sources, backend, f"_{_MODULE}_{backend}_{content[:12]}")
        files |= {f"build/torch-{backend}/{name}": text for name, text in variant.items()}
    return files


def _variant(sources: dict[str, str], backend: str, identifier: str) -> dict[str, str]:
    """Path → text of the files for a backend; its ops are `torch.ops.<identifier>`."""
    files = {name: _NAMESPACE.sub(f"{identifier}::", text) for name, text in sources.items()}
    files[f"{_MODULE}/__init__.py"] = _OLDER.format(identifier=identifier)
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in sorted(files.items())
    }
    metadata = {
        "name": NAME,
        "id": identifier,
        "version": _major(),
        "license": _LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return files | {"metadata.json": json.dumps(metadata, indent=2) + "\n"}


def _major() -> int:
    """Version of the kernel's interface: 0, the hub's for what may still change, before 1.0."""
    return int(__version__.partition(".")[0])


def _card() -> str:
    """The repository's page on the hub."""
    from fused_prefopt import hub

    values = {name: getattr(hub, name) for name in exported}
    functions = [name for name, value in values.items() if inspect.isfunction(value)]
    heads = [value for value in vars(layers).values() if _is_layer(value)]
    return _CARD.format(
        license_name=_LICENSE.lower(),
        name=NAME,
        version=__version__,
        backends=", ".join(BACKENDS),
        major=_major(),
        functions="\n".join(f"- `{name}`: {_first_line(values[name])}" for name in functions),
        types=", ".join(f"`{name}`" for name, value in values.items() if inspect.isclass(value)),
        layers="\n".join(f"- `{head.__name__}`: {_first_line(head)}" for head in heads),
    )


def _is_layer(value: object) -> bool:
    return inspect.isclass(value) and value.__module__ == layers.__name__


def _first_line(value: object) -> str:
    return (inspect.getdoc(value) or "").partition("\n")[0]
