"""Networks whose code can be followed symbolically: each stage runs its part of the recorded graph."""
