"""ms-swift 4.6: a plugin that trains ``swift rlhf`` with any loss of this package.

``--external_plugins`` takes the path of a file: this one, or one that imports this module, as
``examples/frameworks/ms_swift_plugin.py`` does. Then the trainers of `trainers` are in the place of
ms-swift's own for ``--rlhf_type dpo``, ``kto``, ``cpo``, ``simpo`` and ``orpo``.

Plugins are loaded when the command line has been read, so they cannot add an option to it. What
ms-swift hands on to what it does not know itself is ``--model_kwargs``, whose entries it puts into
the environment. The entry ``fused_prefopt`` is ours, a mapping with the fields of `FusedOptions`,
such as ``--model_kwargs '{"fused_prefopt": {"loss": "alpha-dpo"}}'``. Without a ``loss`` in it the
loss is the one that ms-swift's own options describe.
"""

from __future__ import annotations

from fused_prefopt.checks import require_packages, require_version

try:
    require_version("swift")
    from swift.trainers import TrainerFactory
except ImportError:
    require_packages(__name__, "swift")
    raise

# Not by `__name__`, which is another where the file is loaded by its path.
_TRAINERS = "fused_prefopt.integrations.ms_swift.trainers"
TrainerFactory.TRAINER_MAPPING |= {
    "dpo": f"{_TRAINERS}.FusedDPOTrainer",
    "kto": f"{_TRAINERS}.FusedKTOTrainer",
    "cpo": f"{_TRAINERS}.FusedCPOTrainer",
    "orpo": f"{_TRAINERS}.FusedORPOTrainer",
}
