"""The host: hardware facts, systemd, signals. The only place for what is particular to one OS."""
