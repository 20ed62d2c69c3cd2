"""One module for each way to do the same work: what its worker runs, and how a client submits and asks."""
