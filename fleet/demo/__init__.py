"""`phifleet demo`: the whole way on one machine, with nothing simulated."""
