"""Define ``torch.ops.eflat``: the schemas that kernels of all devices implement."""

from __future__ import annotations

import torch

_FACTORS = "Tensor[] A, Tensor[] B, Tensor[] grad_A, Tensor[] grad_B"
_OPTIONS = 'str onto="B", str norm_scope="layer", float? rtol=None'

SCHEMAS = {
    "perturb": "(Tensor A, Tensor B, Tensor grad_A, Tensor grad_B, float scaling, float rho, "
    'str onto="B", float? rtol=None) -> (Tensor E, Tensor norm)',
    "foreach_perturb": f"({_FACTORS}, float[] scaling, float rho, {_OPTIONS}) -> "
    "(Tensor[] E, Tensor norms)",
    "foreach_perturb_ema_": f"({_FACTORS}, Tensor[] E, Tensor(a!)[] ema, Tensor(b!) skipped, "
    f"float[] scaling, float rho, float beta, {_OPTIONS}) -> Tensor norms",
    "foreach_adamw_step_": "(Tensor(a!)[] A, Tensor(b!)[] B, Tensor[] grad_A, Tensor[] grad_B, "
    "Tensor[] E, Tensor(c!)[] ema, Tensor(d!)[] exp_avg, Tensor(e!)[] exp_avg_sq, "
    "Tensor(f!)[] step, Tensor(g!) skipped, float[] scaling, float rho, float beta, float[] lr, "
    f"float[] beta1, float[] beta2, float[] eps, float[] weight_decay, {_OPTIONS}) -> Tensor norms",
    "foreach_bound": "(Tensor[] ema, Tensor[] B, float[] scaling, float rho, "
    'str norm_scope="layer") -> Tensor factors',
}

_library = torch.library.Library("eflat", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
