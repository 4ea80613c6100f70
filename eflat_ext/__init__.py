"""EFlat-LoRA: sharpness-aware LoRA fine-tuning at LoRA's cost.

``import eflat_ext`` needs torch alone; the optimizers need peft when they are created.
"""

import importlib.util
import warnings

import torch

from .ops import foreach_perturb, perturb
from .optim.eflat import EFlatLoRA
from .optim.factories import (
    create_eflat_optimizer,
    create_flat_optimizer,
    create_lora_sam_optimizer,
)
from .optim.two_gradients import FlatLoRA, LoRASAM
from .perturbation import EFlatPerturbation

if importlib.util.find_spec("eflat_ext._C") is None:
    from ._build_info import BUILD_INFO

    warnings.warn(
        "eflat_ext was built without kernels and computes perturbations in plain torch, the same "
        f"numbers more slowly: {BUILD_INFO['reason']}",
        stacklevel=2,
    )
elif torch.version.cuda is not None and importlib.util.find_spec("eflat_ext._C_cuda") is not None:
    try:
        import eflat_ext._C_cuda  # noqa: F401  (registers the CUDA kernels)
    except ImportError as error:
        from ._build_info import BUILD_INFO

        warnings.warn(
            f"the CUDA kernels of eflat_ext, built for CUDA {BUILD_INFO['cuda_built_with']}, do "
            f"not load beside a torch of CUDA {torch.version.cuda}, only the CPU's do: {error}",
            stacklevel=2,
        )


def build_info() -> dict[str, object]:
    """Return how the package was built: CUDA, its architectures, the compiler, the torch target."""
    from ._build_info import BUILD_INFO

    return dict(BUILD_INFO)


__all__ = [
    "EFlatLoRA",
    "EFlatPerturbation",
    "FlatLoRA",
    "LoRASAM",
    "build_info",
    "create_eflat_optimizer",
    "create_flat_optimizer",
    "create_lora_sam_optimizer",
    "foreach_perturb",
    "perturb",
]
__version__ = "0.1.0"
