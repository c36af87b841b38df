"""Neural operators that predict the next frame of a field, and their rollout."""

from shodh_moe.operators.dpot import DPOT_SIZES, DPOT2d, DPOTSize
from shodh_moe.operators.dpot3d import DPOT3d
from shodh_moe.operators.fno import FNO_SIZES, FNO2d, FNOSize
from shodh_moe.operators.layers import Coordinates
from shodh_moe.operators.rollout import nrmse, rollout, rollout_loss
from shodh_moe.operators.unet import UNet3d

__all__ = [
    "DPOT_SIZES",
    "FNO_SIZES",
    "Coordinates",
    "DPOT2d",
    "DPOT3d",
    "DPOTSize",
    "FNO2d",
    "FNOSize",
    "UNet3d",
    "nrmse",
    "rollout",
    "rollout_loss",
]
