"""What both programs need of the machine they run on: files, resources, settings, logs, systemd. Shared with fleet/."""
