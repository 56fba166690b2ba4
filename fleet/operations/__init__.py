"""What the operator's commands do, free of the command line: deploy, devices, views."""
