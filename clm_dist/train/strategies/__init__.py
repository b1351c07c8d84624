"""How weights, gradients and optimizer live on the ranks, behind one interface."""
