"""What Lightning sees: the strategy and the parts it is assembled from."""
