"""The controller's HTTP API: what the command line does on the home, over the network and with tokens."""
