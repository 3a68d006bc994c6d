"""The study: whether DDG reaches backpropagation's accuracy, over methods, numbers of stages and seeds."""
