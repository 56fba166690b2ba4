"""Commands of `phifleet`, one file an area; `fleet/cli/main.py` lists them."""
