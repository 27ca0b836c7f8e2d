"""The service: loads model versions, scores images, keeps reconstructions for a while. Never imports `training`."""
