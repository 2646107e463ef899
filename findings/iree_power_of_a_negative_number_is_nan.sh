#!/usr/bin/env bash
# iree-base-compiler 3.13.0, llvm-cpu: stablehlo.power (and torch.aten.pow, and math.powf)
# with the exponents in a tensor. (−2)² is 4 and (−1)^n alternates: so one would expect, as
# from XLA, torch and C. IREE computes exp(y · log(x)): every power of a negative number is
# NaN, and so is 0⁰. With a whole exponent that is a constant (torch.aten.pow.Tensor_Scalar)
# it multiplies and is right, but for x = 0: there x⁻² is −∞, where +∞ is right.
#
# Seen:
#   x −8, −2, −1, −1, 0, 2 to the power y 3, 2, 4, 0, 0, 3: NaN five times, and 8
#   XLA, on the same StableHLO: −512, 4, 1, 1, 1, 8
#   constant exponent −2, x −8, 0, 2: 0.015625, −∞, 0.25
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2
pip iree-base-compiler==3.13.0 iree-base-runtime==3.13.0

JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import iree.compiler
import iree.runtime
import jax
import numpy as np

SCALAR = """
func.func @main(%x: !torch.vtensor<[3],f32>) -> !torch.vtensor<[3],f32> {
  %two = torch.constant.float -2.0
  %y = torch.aten.pow.Tensor_Scalar %x, %two
    : !torch.vtensor<[3],f32>, !torch.float -> !torch.vtensor<[3],f32>
  return %y : !torch.vtensor<[3],f32>
}
"""
TENSOR = """
func.func @main(%x: !torch.vtensor<[6],f32>, %y: !torch.vtensor<[6],f32>)
    -> !torch.vtensor<[6],f32> {
  %z = torch.aten.pow.Tensor_Tensor %x, %y
    : !torch.vtensor<[6],f32>, !torch.vtensor<[6],f32> -> !torch.vtensor<[6],f32>
  return %z : !torch.vtensor<[6],f32>
}
"""


def by_iree(text, kind, *arguments):
    code = iree.compiler.compile_str(
        text,
        target_backends=["llvm-cpu"],
        input_type=kind,
        extra_args=["--iree-llvmcpu-target-cpu=generic"],
    )
    context = iree.runtime.SystemContext(config=iree.runtime.Config("local-sync"))
    module = iree.runtime.VmModule.copy_buffer(context.instance, code)
    context.add_vm_module(module)
    return context.modules[module.name].main(*arguments).to_host().copy()


x = np.array([-8, -2, -1, -1, 0, 2], np.float32)
y = np.array([3, 2, 4, 0, 0, 3], np.float32)
lowered = jax.jit(lambda x, y: x**y).lower(x, y)
xla = np.asarray(lowered.compile()(x, y))
found = by_iree(lowered.as_text(), "stablehlo", x, y)
torch_form = by_iree(TENSOR, "torch", x, y)
constant = by_iree(SCALAR, "torch", np.array([-8, 0, 2], np.float32))
print("iree", version("iree-base-compiler"), "jax", jax.__version__)
print("XLA", xla, "IREE", found, "by torch.aten.pow", torch_form)
print("constant exponent -2:", constant)
as_stated = (
    np.array_equal(xla, np.array([-512, 4, 1, 1, 1, 8]))
    and all(np.isnan(each[:5]).all() for each in (found, torch_form))
    and np.isclose(found[5], 8)
    and np.isclose(torch_form[5], 8)
    and np.allclose(constant[[0, 2]], [0.015625, 0.25])
    and constant[1] == -np.inf
)
sys.exit(0 if as_stated else 1)
PYTHON
