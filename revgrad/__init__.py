"""Reversible layers for PyTorch: activations are recomputed from outputs, gradients are exact, memory does not grow
with depth.
"""

from revgrad.actnorm import ActNorm
from revgrad.additive import AdditiveCoupling
from revgrad.affine import AffineCoupling
from revgrad.cell import CellUpdate, update_cell
from revgrad.chain import ChainState
from revgrad.checks import DeferredChecks
from revgrad.convert import MomentumNetwork, from_groups, from_pairs, momentum_from
from revgrad.coupling import Coupling
from revgrad.diagnostics import InvertibilityReport, LayerReport, check_invertible
from revgrad.errors import ResidueOverflow, ReversibilityError, StreamError
from revgrad.gated import GatedCoupling
from revgrad.hamiltonian import HamiltonianStep, LeapfrogStep, ReflectionCoupling, SymmetricTransform
from revgrad.invertible_conv import InvertibleConv1x1
from revgrad.layer import Inverse, LayerCall, ReversibleLayer
from revgrad.memory import LiveMemory
from revgrad.modes import set_mode
from revgrad.momentum import MomentumStep, VelocityCoupling
from revgrad.planning import ModeCost, Plan, plan
from revgrad.rearrangement import Concatenate, Permute, PixelShuffle, PixelUnshuffle, Split, Swap
from revgrad.residue import Residue, snap
from revgrad.sequential import ReversibleSequential
from revgrad.unrolling import unroll
from revgrad.wrapped import wrap

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "CellUpdate",
    "ChainState",
    "Concatenate",
    "Coupling",
    "DeferredChecks",
    "GatedCoupling",
    "HamiltonianStep",
    "Inverse",
    "InvertibilityReport",
    "InvertibleConv1x1",
    "LayerCall",
    "LayerReport",
    "LeapfrogStep",
    "LiveMemory",
    "ModeCost",
    "MomentumNetwork",
    "MomentumStep",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "Plan",
    "ReflectionCoupling",
    "Residue",
    "ResidueOverflow",
    "ReversibilityError",
    "ReversibleLayer",
    "ReversibleSequential",
    "Split",
    "StreamError",
    "Swap",
    "SymmetricTransform",
    "VelocityCoupling",
    "check_invertible",
    "from_groups",
    "from_pairs",
    "momentum_from",
    "plan",
    "set_mode",
    "snap",
    "unroll",
    "update_cell",
    "wrap",
]
