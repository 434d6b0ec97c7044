"""What must hold of the package where it is installed: a script for the Python that has it.

`python -I installed_package.py FOLDER` prints, as JSON, how many modules it imported and which
refused, with their messages; it fails where the files, the data or the numbers are wrong. It wants
nothing but the package and torch. FOLDER is where the package was installed.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import distribution
from pathlib import Path


def main(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    files = check_files(folder)
    check_corpus()
    check_loss()
    print(json.dumps(import_all(files)))


def check_files(folder: Path) -> list[Path]:
    """Files of the package below the folder, of which none is missing, strange or a link."""
    import fused_prefopt

    found = distribution("fused-prefopt")
    assert Path(fused_prefopt.__file__).is_relative_to(folder), fused_prefopt.__file__
    assert found.version == fused_prefopt.__version__, found.version
    listed = [Path(str(file)) for file in found.files or ()]
    tops = {file.parts[0] for file in listed if file.parts[0] not in ("..", "bin", "__pycache__")}
    assert tops == {"fused_prefopt", f"fused_prefopt-{found.version}.dist-info"}, tops
    assert all((folder / file).is_file() for file in listed if file.parts[0] in tops)
    assert not (folder / "fused_prefopt" / "kernels").is_symlink()
    assert (folder / "fused_prefopt" / "py.typed").is_file()
    return [file for file in listed if file.parts[0] == "fused_prefopt" and file.suffix == ".py"]


def import_all(files: list[Path]) -> dict[str, object]:
    """Import every module, the kernels too, which are no package that a walk would enter."""
    refused, imported = {}, 0
    for file in files:
        name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
            imported += 1
        except ImportError as error:
            refused[name] = str(error)
    return {"imported": imported, "refused": refused}


def check_corpus() -> None:
    """The text that trainings without a download read is this Python's own documentation."""
    from fused_prefopt.data.corpus import load_documents, paragraphs

    found = sum(len(paragraphs(document)) for document in load_documents())
    assert found > 1000, found


def check_loss() -> None:
    """DPO and its gradients on the torch engine, against eager float64."""
    import torch

    import fused_prefopt as fp

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 9, 16, generator=generator).requires_grad_()
    weight = torch.randn(37, 16, generator=generator).requires_grad_()
    labels = torch.randint(0, 37, (4, 9), generator=generator)
    reference = torch.tensor([-30.0, -28.0, -31.0, -27.0])
    loss_fn = fp.PreferenceLoss("dpo", beta=0.1, engine="torch")
    result = loss_fn(hidden, fp.LMHead(weight), labels, reference=reference)
    result.loss.backward()

    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    logps = (exact[0][:, :-1] @ exact[1].t()).log_softmax(-1)
    sums = logps.gather(2, labels[:, 1:, None]).sum((1, 2))
    ratios = sums - reference
    truth = -torch.nn.functional.logsigmoid(0.1 * (ratios[:2] - ratios[2:])).mean()
    truth.backward()
    assert abs(result.loss.item() - truth.item()) < 1e-5, (result.loss, truth)
    for ours, right in zip((hidden, weight), exact, strict=True):
        error = (ours.grad - right.grad).norm() / right.grad.norm()
        assert error < 1e-5, error


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
