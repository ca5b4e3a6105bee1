"""Finished runs for two targets, and their packages."""

from tests.device.packages import mock_device, model, orin, rtx, rtx_run

__all__ = ["mock_device", "model", "orin", "rtx", "rtx_run"]
