"""The phifleet controller: what runs on the operator's machine."""
