"""Looking at what layers have learned."""

from .bands import band_maps
from .frequency import kernel_response, radial_profile

__all__ = ["band_maps", "kernel_response", "radial_profile"]
