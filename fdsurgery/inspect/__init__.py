"""Looking at what layers have learned."""

from .frequency import kernel_response, radial_profile

__all__ = ["kernel_response", "radial_profile"]
