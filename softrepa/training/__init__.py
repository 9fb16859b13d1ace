"""Learning tokens: the loop, its objectives and what a run is made of."""
