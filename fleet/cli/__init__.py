"""Commands of `phifleet`, one file an area; `fleet/__main__.py` lists them."""
