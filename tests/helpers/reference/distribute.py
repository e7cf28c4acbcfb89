"""References of the distributed operators in a world of one rank."""
