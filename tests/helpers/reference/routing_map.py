"""References of permute and unpermute by a routing map."""
