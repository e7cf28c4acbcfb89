"""References of routing on one device: init, re-routing, finalize."""
