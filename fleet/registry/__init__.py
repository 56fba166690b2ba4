"""What the controller remembers: devices, artifacts, deployments, audit."""
