"""The public import path of :mod:`eflat_ext.analysis.hessian`."""

import importlib
import sys

sys.modules[__name__] = importlib.import_module("eflat_ext.analysis.hessian")
